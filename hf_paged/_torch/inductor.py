"""Attention functions compiled by inductor, once for each kind of arguments, and called without dynamo."""

import inspect
import logging
import re
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
import torch.compiler.config
from torch import Tensor

from hf_paged._torch.dynamo import (
    DYNAMIC_SIZES,
    mark_dynamic,
    outside_of_graphs,
    switched_off,
    with_own_code,
)
from hf_paged._torch.private import Private
from hf_paged._torch.tricks import Trick
from hf_paged._torch.wrapper_replay import WRAPPER_REPLAY, WrapperReplay, capture

logger = logging.getLogger(__name__)


def _entered(context: Callable[[], Any]) -> None:
    with context():
        pass


_ON_DISK_S = 5  # in which inductor finds what it has compiled before, its own imports included
_MAX_GRAPHS = 64  # of one kernel, which torch.compile makes one by one where it isn't told which sizes change

COMPILE_FX = Private("torch._inductor.compile_fx:compile_fx", check=callable)
COMPILE_FX_INNER = Private("torch._inductor.compile_fx:compile_fx_inner", check=callable)
AUTOGRAD_CONFIG = Private("torch._functorch.config", check=lambda config: config.patch(enable_autograd_cache=False))
_EVAL_FRAME = Private("torch._dynamo.eval_frame", check=lambda module: (module._stance.stance, module._stance.backend))
_WITHOUT_MODES = Private("torch.utils._python_dispatch:_disable_current_modes", check=_entered)
_CPP_COMPILER = Private("torch._inductor.cpp_builder:get_cpp_compiler", check=lambda find: _finds(find))
_COMPILE_LOCK = Private("torch._dynamo.convert_frame:compile_lock", check=lambda lock: _entered(lambda: lock))

UNGUARDED_KERNELS = Trick(
    "unguarded_kernels",
    "kernels are called without the guards of torch.compile",
    "they are called through torch.compile, which looks at hundreds of guards each time",
    COMPILE_FX,
    COMPILE_FX_INNER,
    AUTOGRAD_CONFIG,
)

BoundKernel = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Attends with other queries, keys, values and sinks of the same sizes, in one thread."""


class Kernel(Protocol):
    """A compiled attention function."""

    def bound_to(self, arguments: Sequence[Tensor | None]) -> BoundKernel:
        """Return what attends with these arguments, of which queries, keys, values and sinks are given anew."""


@dataclass(frozen=True)
class GuardedKernel:
    """A function as `torch.compile` returned it, with all its guards.

    Attributes:
        run: takes the arguments, of which the first three are queries, keys and values, and the last are sinks.
    """

    run: Callable[..., Tensor]

    def bound_to(self, arguments: Sequence[Tensor | None]) -> BoundKernel:
        """Return what attends with these arguments, of which queries, keys, values and sinks are given anew."""
        others = arguments[3:-1]
        config: Any = torch.compiler.config

        def attend(query: Tensor, keys: Tensor, values: Tensor, sinks: Tensor) -> Tensor:
            with config.patch(recompile_limit=_MAX_GRAPHS):
                return _call(self.run, [query, keys, values, *others, sinks])

        return attend


@dataclass(frozen=True)
class UnguardedKernel:
    """What inductor compiled, and how it wants to be called.

    Attributes:
        run: takes a list of inputs.
        inputs_of: makes that list of the function's arguments: the tensors in another order, and sizes of them.
        argument_indices: where in the list the queries, keys, values and sinks are; -1 for sinks without a index.
    """

    run: Callable[[list[Any]], Sequence[Tensor]]
    inputs_of: Callable[..., list[Any]]
    argument_indices: tuple[int, int, int, int]

    def bound_to(self, arguments: Sequence[Tensor | None]) -> BoundKernel:
        """Return what attends with these arguments, of which queries, keys, values and sinks are given anew."""
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
            if is_captured or not WRAPPER_REPLAY.is_on:
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


def can_compile(device: torch.device | None) -> bool:
    """Whether kernels can be compiled for a device, None: for some; tells once in a log message if not."""
    reason = hindrance(device)
    if reason is not None:
        _tell_once(
            f"{reason}, so attention is handed a copy of what is cached in each layer: steps are up to a third slower "
            "than with DynamicCache."
        )
    return reason is None


def hindrance(device: torch.device | None) -> str | None:
    """Say why nothing can be compiled for a device, None: for any; None if it can."""
    reason = switched_off()
    if reason is None and device is not None and device.type == "cpu" and not _has_cpp_compiler():
        return "torch finds no C++ compiler (g++ on the PATH, or what the environment variable CXX names)"
    return reason


@cache
def _has_cpp_compiler() -> bool:
    """Whether inductor finds a compiler; it wants one even for kernels on disk, which it finds by its version."""
    find = _CPP_COMPILER.value_or(None, "Whether there is a C++ compiler is found out when a kernel is compiled")
    return find is None or _finds(find)


def _finds(find: Callable[[], str]) -> bool:
    try:
        return bool(find())
    except RuntimeError as error:
        if type(error).__name__ != "InvalidCxxCompiler":
            raise
        return False


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
                logger.info("Compiling attention for %s.", key)
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
    would find out is in the key of `compiled_kernel`, so the kernel is called without them. If that can't be done with
    this torch, it is called with them.
    """
    reason = hindrance(next(tensor.device for tensor in arguments if tensor is not None))
    if reason is not None:
        raise ValueError(
            f"{reason}, but attention over pages needs to be compiled here. Change that, or load the model with "
            'attn_implementation="sdpa": PagedCache works with it.'
        )
    for name, tensor in zip(inspect.signature(attend).parameters, arguments, strict=True):
        for size in dynamic_sizes(name):
            if tensor is not None and tensor.shape[size] > 1:
                mark_dynamic(tensor, size)
    if not (UNGUARDED_KERNELS.is_on and DYNAMIC_SIZES.is_on):
        return _compile_with_guards(attend, arguments)
    try:
        return _compile_without_guards(attend, arguments)
    except Exception as error:
        failure = error
    kernel = _compile_with_guards(attend, arguments)  # where nothing can be compiled, this says so
    UNGUARDED_KERNELS.fall_back(failure)
    return kernel


def _compile_with_guards(attend: Callable[..., Tensor], arguments: Sequence[Tensor | None]) -> GuardedKernel:
    # Sizes that change become dynamic by themselves, one after the other. With dynamic=True, as a model may be
    # compiled, what is a constant of the kernel would become an input.
    kernel = GuardedKernel(torch.compile(with_own_code(attend), fullgraph=True, dynamic=None))
    _call(kernel.run, arguments)
    return kernel


def _compile_without_guards(attend: Callable[..., Tensor], arguments: Sequence[Tensor | None]) -> UnguardedKernel:
    compile_fx, compile_fx_inner = COMPILE_FX.value, COMPILE_FX_INNER.value
    sources: list[str] = []
    compiled: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        # Read before inductor takes the graph apart: where dynamo has each input from, as an expression over L.
        sources.extend(node.meta["grapharg"].source.name for node in graph.graph.nodes if node.op == "placeholder")
        # The sizes are those of the tensors that they are read from, so there is nothing to be asserted on each call.
        # Nor are indices: block tables name pages that exist.
        unchecked = {"size_asserts": False, "assert_indirect_indexing": False}
        # That cache would find what AOTAutograd makes of the kernel without compiling what is inside. Not around the
        # whole: before torch 2.12 threads share such settings, but dynamo calls one backend at a time.
        with AUTOGRAD_CONFIG.value.patch(enable_autograd_cache=False):
            return compile_fx(graph, inputs, inner_compile=compile_inner, config_patches=unchecked)

    def compile_inner(graph: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
        with _told_if_slow():
            compiled.append(compile_fx_inner(graph, inputs, **options))
        return compiled[-1]

    expected = _call(torch.compile(with_own_code(attend), backend=backend, fullgraph=True, dynamic=False), arguments)
    if not compiled:
        raise RuntimeError("torch.compile has not called inductor; its log says why")
    (graph,) = compiled
    names = list(inspect.signature(attend).parameters)
    inputs = [_expression(source) for source in sources]
    query, keys, values = (inputs.index(name) for name in names[:3])
    sinks = inputs.index(names[-1]) if names[-1] in inputs else -1
    inputs_of = eval(f"lambda {', '.join(names)}: [{', '.join(inputs)}]")
    kernel = UnguardedKernel(graph.current_callable, inputs_of, (query, keys, values, sinks))
    output = kernel.run(kernel.inputs_of(*arguments))[0]
    if not torch.allclose(output, expected, rtol=0.01, atol=0.01, equal_nan=True):
        raise RuntimeError("without guards, inductor's function gives something else")
    return kernel


@contextmanager
def _told_if_slow() -> Iterator[None]:
    """Tell once, while the first kernel is compiled, what takes so long; not where it is found on disk."""
    message = "Compiling attention: about 15 s, once. Later processes find it on disk."
    timer = threading.Timer(_ON_DISK_S, _tell_once, [message])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@outside_of_graphs  # where the stance can't be changed
def _call(function: Callable[..., Tensor], arguments: Sequence[Tensor | None]) -> Tensor:
    """Call what `torch.compile` returned, and let it compile whatever is to be done with code of the caller."""
    device = next(tensor.device for tensor in arguments if tensor is not None)
    eval_frame = _EVAL_FRAME.value_or(None, "The stance of torch.compile is set even where it is the usual one")
    without_modes = _WITHOUT_MODES.value_or(
        nullcontext, "In a mode that looks at each operation, such as one that counts them, kernels are not compiled"
    )
    lock = _COMPILE_LOCK.value_or(nullcontext(), "torch.compile may refuse what other threads call meanwhile")
    with ExitStack() as stack:
        if eval_frame is None or eval_frame._stance.stance != "default" or eval_frame._stance.backend is not None:
            stack.enter_context(torch.compiler.set_stance("default"))
        # Dynamo leaves alone what runs in a mode that looks at each operation, such as one that counts them.
        stack.enter_context(without_modes())
        # Before torch 2.15 a flag of the process says that something is traced, and refuses whoever calls meanwhile.
        stack.enter_context(lock)
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        return function(*arguments)


def _expression(source: str) -> str:
    """Turn `"L['keys'].size()[2]"` into `"keys.size()[2]"`."""
    return re.sub(r"L\['(\w+)'\]", r"\1", source)
