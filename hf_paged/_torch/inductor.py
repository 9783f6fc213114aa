"""Attention functions compiled by inductor, once for each kind of arguments, and called without dynamo."""

import inspect
import logging
import os
import re
import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.convert_frame import compile_lock
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch.utils._python_dispatch import _disable_current_modes

from hf_paged._torch.dynamo import outside_of_graphs, with_own_code
from hf_paged._torch.wrapper_replay import WrapperReplay, capture

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kernel:
    """What inductor compiled, and how it wants to be called.

    Attributes:
        run: takes a list of inputs.
        inputs_of: makes that list of the function's arguments: the tensors in another order, and sizes of them.
        argument_indices: where in the list the queries, keys, values and sinks are; -1 for sinks without a index.
    """

    run: Callable[[list[Any]], Sequence[Tensor]]
    inputs_of: Callable[..., list[Any]]
    argument_indices: tuple[int, int, int, int]

    def bound_to(self, arguments: Sequence[Tensor | None]) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """Return what attends with other queries, keys, values and sinks of the same sizes, in one thread."""
        inputs = self.inputs_of(*arguments)
        argument_indices = [index for index in self.argument_indices if index >= 0]
        replay: WrapperReplay | None = None
        is_captured = False

        def attend(*tensors: Tensor) -> Tensor:
            nonlocal replay, is_captured
            used = tensors[: len(argument_indices)]
            if replay is not None:
                return replay.replay(*used)[0]
            filled = inputs.copy()
            for index, tensor in zip(argument_indices, used, strict=True):
                filled[index] = tensor
            if is_captured:
                return self.run(filled)[0]
            (output,), replay = capture(self.run, filled, used)
            is_captured = True
            return output

        return attend


_kernels: dict[Hashable, Kernel] = {}
_lock = threading.RLock()


def num_specializations() -> int:
    """Kernels compiled in this process."""
    return len(_kernels)


def switched_off() -> str | None:
    """Say which of torch's switches turns `torch.compile` off; None if it is on."""
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return "TORCHDYNAMO_DISABLE=1 switches torch.compile off"
    if torch._dynamo.config.disable:
        return "torch._dynamo.config.disable (TORCH_COMPILE_DISABLE=1) switches torch.compile off"
    return None


def can_compile() -> bool:
    """Whether kernels can be compiled; tells once in a log message if not."""
    reason = switched_off()
    if reason is not None:
        _tell_once(f"{reason}, so attention is handed a copy of what is cached in each layer, which is slow.")
    return reason is None


@cache
def _tell_once(message: str) -> None:
    logger.warning(message)


def compiled_kernel(
    key: Hashable,
    build: Callable[[], Callable[..., Tensor]],
    arguments: Sequence[Tensor | None],
    dynamic_sizes: Callable[[str], tuple[int, ...]],
) -> Kernel:
    """Return the kernel for arguments like these, compiling it the first time.

    Args:
        key: all that a kernel doesn't adapt to. The number of threads, which is one of these things, is added.
        build: makes the function, whose first three arguments are queries, keys and values, and whose last are sinks.
        arguments: to compile it with.
        dynamic_sizes: for an argument's name, which of its sizes change without a recompilation. Those that are 1 in
            `arguments` never do.
    """
    key = key, torch.get_num_threads()
    kernel = _kernels.get(key)
    if kernel is None:
        with _lock:
            kernel = _kernels.get(key)
            if kernel is None:
                logger.info("Compiling attention for %s; this takes 5 to 30 seconds, once.", key)
                kernel = _kernels[key] = _compile(build(), arguments, dynamic_sizes)
    return kernel


def _compile(
    attend: Callable[..., Tensor],
    arguments: Sequence[Tensor | None],
    dynamic_sizes: Callable[[str], tuple[int, ...]],
) -> Kernel:
    """Compile for arguments like these.

    Dynamo finds the kernel by looking at hundreds of guards. Between two layers' weights nothing of them is left in
    the processor's caches, and the look takes several times as long as the attention of a short row. What the guards
    would find out is in the key of `compiled_kernel`, so the kernel is called without them.
    """
    sources: list[str] = []
    compiled: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        # Read before inductor takes the graph apart: where dynamo has each input from, as an expression over L.
        sources.extend(node.meta["grapharg"].source.name for node in graph.graph.nodes if node.op == "placeholder")
        # That cache would find what AOTAutograd makes of the kernel without compiling what is inside.
        inside = torch._functorch.config.patch(enable_autograd_cache=False)
        # The sizes are those of the tensors that they are read from, so there is nothing to be asserted on each call.
        # Nor are indices: block tables name pages that exist.
        unchecked = torch._inductor.config.patch(size_asserts=False, assert_indirect_indexing=False)
        # Not around the whole: before torch 2.12 threads share such settings, but dynamo calls one backend at a time.
        with inside, unchecked:
            return compile_fx(graph, inputs, inner_compile=compile_inner)

    def compile_inner(graph: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
        compiled.append(compile_fx_inner(graph, inputs, **options))
        return compiled[-1]

    reason = switched_off()
    if reason is not None:
        raise ValueError(
            f"{reason}, but attention over pages needs to be compiled. Switch it on, or load the model with "
            'attn_implementation="sdpa": PagedCache works with it.'
        )
    own = with_own_code(attend)
    names = list(inspect.signature(attend).parameters)
    device = next(tensor.device for tensor in arguments if tensor is not None)
    for name, tensor in zip(names, arguments, strict=True):
        for size in dynamic_sizes(name):
            if tensor is not None and tensor.shape[size] > 1:
                torch._dynamo.mark_dynamic(tensor, size)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        # With dynamic=True, as a model may be compiled, what is a constant of the kernel would become an input.
        _call_once(torch.compile(own, backend=backend, fullgraph=True, dynamic=False), arguments)
    if not compiled:
        raise RuntimeError(
            "torch.compile has not compiled the attention over pages, which needs it. Its log says why. Or load the "
            'model with attn_implementation="sdpa": PagedCache works with it.'
        )
    (graph,) = compiled
    inputs = [_expression(source) for source in sources]
    query, keys, values = (inputs.index(name) for name in names[:3])
    sinks = inputs.index(names[-1]) if names[-1] in inputs else -1
    inputs_of = eval(f"lambda {', '.join(names)}: [{', '.join(inputs)}]")
    return Kernel(graph.current_callable, inputs_of, (query, keys, values, sinks))


@outside_of_graphs  # where the stance can't be changed
def _call_once(function: Callable[..., Tensor], arguments: Sequence[Tensor | None]) -> None:
    """Call what `torch.compile` returned, and let it compile whatever is to be done with code of the caller."""
    stance = torch._dynamo.eval_frame._stance
    with ExitStack() as stack:
        if stance.stance != "default" or stance.backend is not None:
            stack.enter_context(torch.compiler.set_stance("default"))
        # Dynamo leaves alone what runs in a mode that looks at each operation, such as one that counts them.
        stack.enter_context(_disable_current_modes())
        # Before torch 2.15 a flag of the process says that something is traced, and refuses whoever calls meanwhile.
        stack.enter_context(compile_lock)
        function(*arguments)


def _expression(source: str) -> str:
    """Turn `"L['keys'].size()[2]"` into `"keys.size()[2]"`."""
    return re.sub(r"L\['(\w+)'\]", r"\1", source)
