"""Compiled decoding and compiled prefill."""

import gc
import inspect
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from transformers import CompileConfig, PreTrainedModel

from hf_paged._torch.dynamo import (
    COMPILED_PREFILL,
    GUARDS_ONCE,
    HOOK_GUARDS,
    depends_on_sizes_only,
    guard_hooks,
    is_from_dynamo,
    with_own_code,
)
from hf_paged._torch.graphs import UNUSED_ATTENTION, compile_graph, graph_pass
from hf_paged._torch.host_memory import give_back_freed
from hf_paged._torch.inductor import hindrance
from hf_paged._torch.opaque import OPAQUE_INPUTS
from hf_paged._transformers import compile_obstacle, decoder_of, model_in, uncompiled_weights
from hf_paged.compile.convolutions import choose_convolutions
from hf_paged.compile.cpu_replay import StepReplay
from hf_paged.compile.cuda_graph import CUDA_GRAPHS, StepGraphs
from hf_paged.compile.linear import MANY_ROWS, choose_linear_layers
from hf_paged.compile.ops import leave_out_unused_attention, unmark
from hf_paged.compile.steady import SteadyGraph

logger = logging.getLogger(__name__)

Filling = Callable[..., None]

_UUID = "hf_paged.compile.ops.leave_out_unused_attention-1"
MIN_TOKENS = MANY_ROWS  # of what `compiled_filling` returns


@dataclass
class _Use:
    """Contexts that have the same `generation_config`.

    Attributes:
        settings: the `generation_config`.
        before: its `compile_config` before the first of them.
        count: how many there are.
    """

    settings: Any
    before: CompileConfig | None
    count: int = 0


_lock = threading.Lock()
_active: WeakKeyDictionary[torch.nn.Module, tuple[Filling, int]] = WeakKeyDictionary()
_configured: dict[int, _Use] = {}
_fillings: WeakKeyDictionary[torch.nn.Module, Filling] = WeakKeyDictionary()


class _Context(AbstractContextManager[PreTrainedModel]):
    """What `compiled` returns: a context, and nothing that could be taken for a model."""

    def __init__(self, context: AbstractContextManager[PreTrainedModel]) -> None:
        self._context = context

    def __enter__(self) -> PreTrainedModel:
        return self._context.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self._context.__exit__(*error)

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise self._misuse("was called like a model")

    def __getattr__(self, name: str) -> NoReturn:
        raise self._misuse(f"was asked for its {name!r}")

    def _misuse(self, what: str) -> AttributeError:
        return AttributeError(
            f"What compiled(model) returned {what}, but it is a context. Write `with compiled(model): "
            "model.generate(...)`."
        )


def compiled(model: PreTrainedModel) -> AbstractContextManager[PreTrainedModel]:
    """Let `generate()` decode in compiled graphs within this context, and `PagedCache.prefill` compute in them.

    It sets the model's `generation_config.compile_config`, which Transformers looks at, and nothing else: a
    `generation_config` of your own that is handed to `generate()` must have the same. One graph serves one row,
    another one any other number of rows, and a third one prompts; none depends on lengths, pages or caches. From
    Transformers 5.24 on assisted decoding has one, too, for any number of drafted tokens. Compiling
    takes about half a minute for each on the first use on a machine, and some seconds in each process after that; a
    log message tells. The linear layers are compiled to read the weights as they are, without a second copy in
    another layout. What changes about the model meanwhile, such as a hook, an adapter or a weight, counts from the
    next step on; in `hf_paged.sample`, where only Transformers' own code runs between two steps, from the next
    `generate()` on. Contexts nest, and threads may enter and leave them in any order: the model is as it was when the
    last one is left. On a GPU each step is also recorded as a CUDA graph, for a number of rows, and repeated until the
    pool grows.

    Where torch's own switches turn `torch.compile` off, there is no C++ compiler for a CPU, or Transformers does not
    compile the model's quantised weights, the model runs uncompiled; a log message tells.

    Args:
        model: a decoder with `attn_implementation="paged_flex"`.

    Returns:
        A context, which gives the model.

    Raises:
        ValueError: if the model is in training mode, can't be compiled as one graph, or changes its keys between
            cache and attention.
    """
    return _Context(_compiled(model))


@contextmanager
def _compiled(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    model = model_in(model, "compiled()")
    _check(model)
    reason = hindrance(model.device) or uncompiled_weights(model)
    if reason is not None:
        logger.warning("%s, so %s runs uncompiled within compiled().", reason, type(model).__name__)
    if reason is not None or not (OPAQUE_INPUTS.is_on and HOOK_GUARDS.is_on):
        yield model
        return
    decoder = decoder_of(model)
    settings: Any = model.generation_config
    with _lock:
        _begin(decoder, settings)
    try:
        with _explained(model):
            yield model
    finally:
        with _lock:
            _end(decoder, settings)


def _check(model: PreTrainedModel) -> None:
    name = type(model).__name__
    if model.training:
        raise ValueError("A model in training mode was given, but compiled() is for inference. Call model.eval().")
    if getattr(model, "generation_config", None) is None:
        raise ValueError(
            f"compiled() was given a {name}, which has no generate(). Pass a model for generation, such as one of "
            "AutoModelForCausalLM."
        )
    reason = compile_obstacle(model.config)
    if reason is not None:
        raise ValueError(
            f"This {name} {reason}, so its steps over pages can't be compiled. Leave out compiled(): the same cache "
            "works uncompiled."
        )
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise ValueError(
            f"This {name} has hooks of accelerate, which move tensors between the layers (device_map, offloading), "
            "so its steps can't be compiled as one graph. Load it on one device, or leave out compiled()."
        )


def _begin(decoder: torch.nn.Module, settings: Any) -> None:
    if decoder in _active:
        fill, count = _active[decoder]
    else:
        # Dynamo keeps graphs with the code, so what was compiled in an earlier context is found again.
        own = _fillings.setdefault(decoder, with_own_code(_fill))
        run = torch.compile(own, backend=_prompt_backend, fullgraph=True, dynamic=False)
        fill, count = partial(_call, run, decoder), 0
    _active[decoder] = fill, count + 1
    use = _configured.setdefault(id(settings), _Use(settings, settings.compile_config))
    use.count += 1
    settings.compile_config = _config()


def _end(decoder: torch.nn.Module, settings: Any) -> None:
    fill, count = _active.pop(decoder)
    if count > 1:
        _active[decoder] = fill, count - 1
    use = _configured[id(settings)]
    use.count -= 1
    if use.count == 0:
        settings.compile_config = use.before
        del _configured[id(settings)]


@contextmanager
def _explained(model: torch.nn.Module) -> Iterator[None]:
    """Say what to do where torch fails at compiling this model."""
    try:
        yield
    except Exception as error:
        if not is_from_dynamo(error) or not _passed_through(error.__traceback__, model):
            raise
        if type(error).__name__ == "FailOnRecompileLimitHit":
            raise ValueError(
                f"torch has compiled steps of {type(model).__name__} as often as it does. Threads that begin at the "
                "same time compile one each: let one of them generate first. Leave settings of the model as they are "
                "between steps, or leave out compiled(): the same cache works uncompiled."
            ) from error
        reason = " ".join(" ".join(str(error).splitlines()[:2]).split())
        raise ValueError(
            f"torch.compile can't make one graph of a step of {type(model).__name__}, as compiled() wants it to. "
            f"Leave out compiled(): the same cache works uncompiled. What torch says: {reason}"
        ) from error


def _passed_through(traceback: TracebackType | None, model: torch.nn.Module) -> bool:
    """Whether an error came out of a method of this model, or of what computes its prompts."""
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_locals.get("self") is model or frame.f_code is _call.__code__:
            return True
        traceback = traceback.tb_next
    return False


def compiled_filling(decoder: torch.nn.Module) -> Filling | None:
    """A compiled forward pass of a model without its head that fills the cache, no more; None outside of `compiled`.

    It takes `MIN_TOKENS` or more. Where dynamo is told that their number varies, as it has to be, one graph serves all
    numbers. Nothing is computed for the output alone: of the last layer, that is all but keys and values.
    """
    with _lock:
        fill, _ = _active.get(decoder, (None, 0))
    return fill if fill is not None and COMPILED_PREFILL.is_on else None


def _fill(decoder: torch.nn.Module, **inputs: Any) -> None:
    decoder(**inputs)


def _call(run: Callable[..., None], decoder: torch.nn.Module, **inputs: Any) -> None:
    run(decoder, **inputs)


def _config() -> CompileConfig:
    config: Any = CompileConfig(fullgraph=True, backend=_backend)
    config.mode = None  # inductor's, whose CUDA graphs know nothing of pages
    config._compile_all_devices = True
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:  # not in torch 2.11
        # Of all models in a process dynamo would keep eight graphs together, and then fail: all have the same code.
        config.isolate_recompiles = True
    return config  # type: ignore[no-any-return]


def _backend(graph: torch.fx.GraphModule, inputs: list[Any], is_prompt: bool = False) -> Any:
    reason = unmark(graph.graph)
    if reason is not None:
        return partial(_refuse, reason)
    logger.warning("Compiling a model for hf_paged: about half a minute the first time, some seconds later on.")
    begin = time.perf_counter()
    try:
        guard_hooks()
    except Exception as error:
        HOOK_GUARDS.fall_back(error)
        return _refuse_unwatched
    is_steady = not is_prompt and GUARDS_ONCE.is_on and depends_on_sizes_only()
    # Dynamo's guards have looked at every weight; the graph need not do so again on each call.
    options: dict[str, Any] = {"size_asserts": False}
    if UNUSED_ATTENTION.is_on:
        options["post_grad_custom_post_pass"] = graph_pass(leave_out_unused_attention, _UUID)
    choose_convolutions(graph)
    is_one_row = choose_linear_layers(graph, has_many_rows=is_prompt) == {"one_row"}
    result = compile_graph(graph, inputs, options, StepReplay if is_one_row else None)
    give_back_freed()
    logger.warning("Compiled in %.0f s.", time.perf_counter() - begin)
    devices = {value.device for value in inputs if isinstance(value, torch.Tensor)}
    is_on_gpu = len(devices) == 1 and devices.pop().type == "cuda"
    run = _collecting(StepGraphs(result) if is_on_gpu and CUDA_GRAPHS.is_on else result)
    return SteadyGraph(run) if is_steady else run


def _collecting(run: Callable[..., Any]) -> Callable[..., Any]:
    """Drop what dynamo has left before the first call: cycles that hold the cache, and so its pages, of that step."""
    is_first = True

    def call(*inputs: Any) -> Any:
        nonlocal is_first
        if is_first:
            is_first = False
            gc.collect()
        return run(*inputs)

    return call


def _refuse(reason: str, *inputs: Any) -> Any:
    # When the graph is called, as torch would wrap what is raised while it is made.
    raise ValueError(reason)


def _refuse_unwatched(*inputs: Any) -> Any:
    raise ValueError(
        "What torch.compile captured of this model can't be told to watch for hooks, and would leave out those that "
        "are added later. Run it uncompiled: leave out compiled()."
    )


def _prompt_backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    return _backend(graph, inputs, is_prompt=True)
