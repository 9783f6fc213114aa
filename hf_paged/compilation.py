"""Compiled decoding and compiled prefill."""

import inspect
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import CompileConfig, PreTrainedModel

from hf_paged import linear
from hf_paged.cuda_graphs import StepGraphs
from hf_paged.graphs import guard_hooks, with_own_code
from hf_paged.host_memory import give_back_freed
from hf_paged.operation import WithoutUnusedAttention
from hf_paged.step_launches import compile_step
from hf_paged.weights import gather_weights

logger = logging.getLogger(__name__)

Filling = Callable[..., None]

MIN_TOKENS = linear.MANY_ROWS  # of what `compiled_filling` returns

_active: WeakKeyDictionary[torch.nn.Module, Filling] = WeakKeyDictionary()
_fillings: WeakKeyDictionary[torch.nn.Module, Filling] = WeakKeyDictionary()


@contextmanager
def compiled(model: PreTrainedModel) -> Iterator[None]:
    """Let `generate()` decode in compiled graphs within this context, and `PagedCache.prefill` compute in them.

    It sets the model's `generation_config.compile_config`, which Transformers looks at, and nothing else: a
    `generation_config` of your own that is handed to `generate()` must have the same. One graph serves one row,
    another one any other number of rows, and a third one prompts; none depends on lengths, pages or caches. From
    Transformers 5.24 on assisted decoding has one, too, for any number of drafted tokens. Compiling
    takes about half a minute for each on the first use on a machine, and some seconds in each process after that; a
    log message tells. The linear layers are compiled to read the weights as they are, without a second copy in
    another layout. What changes about the model meanwhile, such as a hook, an adapter or a weight, counts from the
    next step on. On a CPU the weights are moved once, together into memory with huge pages, where all of them are
    read faster: parameters remain the same objects with the same values, and stay there after the context; but like
    `model.to`, the first context must not begin while another thread runs the model. On a GPU each step is also
    recorded as a CUDA graph, for a number of rows, and repeated until the pool grows.

    Args:
        model: a decoder with `attn_implementation="paged_flex"`.

    Raises:
        ValueError: if the model is in training mode.
    """
    if model.training:
        raise ValueError("A model in training mode was given, but compiled() is for inference. Call model.eval().")
    gather_weights(model)
    decoder: torch.nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    settings: Any = model.generation_config
    previous = settings.compile_config
    outer = _active.get(decoder)
    # Dynamo keeps graphs with the code, so what was compiled in an earlier context is found again.
    fill = _fillings.setdefault(decoder, with_own_code(_fill))
    _active[decoder] = partial(torch.compile(fill, backend=_prompt_backend, fullgraph=True, dynamic=False), decoder)
    settings.compile_config = _config()
    try:
        yield
    finally:
        settings.compile_config = previous
        if outer is None:
            del _active[decoder]
        else:
            _active[decoder] = outer


def compiled_filling(decoder: torch.nn.Module) -> Filling | None:
    """A compiled forward pass of a model without its head that fills the cache, no more; None outside of `compiled`.

    It takes `MIN_TOKENS` or more. Where dynamo is told that their number varies, one graph serves all numbers. Nothing
    is computed for the output alone: of the last layer, that is all but keys and values.
    """
    return _active.get(decoder)


def _fill(decoder: torch.nn.Module, **inputs: Any) -> None:
    decoder(**inputs)


def _config() -> CompileConfig:
    config: Any = CompileConfig(fullgraph=True, backend=_backend)
    config.mode = None  # inductor's, whose CUDA graphs know nothing of pages
    config._compile_all_devices = True
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:  # not in torch 2.11
        # Of all models in a process dynamo would keep eight graphs together, and then fail: all have the same code.
        config.isolate_recompiles = True
    return config  # type: ignore[no-any-return]


def _backend(graph: torch.fx.GraphModule, inputs: list[Any], is_prompt: bool = False) -> Any:
    logger.warning("Compiling a model for hf_paged: about half a minute the first time, some seconds later on.")
    begin = time.perf_counter()
    guard_hooks()
    with torch._inductor.config.patch(post_grad_custom_post_pass=WithoutUnusedAttention()):
        result = linear.backend(graph, inputs, for_one_row=compile_step, has_many_rows=is_prompt)
    give_back_freed()
    logger.warning("Compiled in %.0f s.", time.perf_counter() - begin)
    devices = {value.device for value in inputs if isinstance(value, torch.Tensor)}
    return StepGraphs(result) if len(devices) == 1 and devices.pop().type == "cuda" else result


def _prompt_backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    return _backend(graph, inputs, is_prompt=True)
