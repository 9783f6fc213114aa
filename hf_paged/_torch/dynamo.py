"""What functions, tensors and modules are to dynamo."""

import inspect
import itertools
import os
import re
import sys
import types
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from hf_paged._torch.private import MissingNameError, Private
from hf_paged._torch.tricks import Trick

P = ParamSpec("P")
R = TypeVar("R")

_numbers = itertools.count()

# Dictionaries of which dynamo doesn't guard how long they are, by what it does instead.
_HOOKS = {
    "EMPTY_NN_MODULE_HOOKS_DICT": ("._forward_hooks", "._forward_pre_hooks"),
    "TYPE_MATCH": ("._global_forward_hooks", "._global_forward_pre_hooks"),
}

_SIZE = re.compile(r"\.(size\(\)\[\d+\]|stride\(\)\[\d+\]|storage_offset\(\))$")

_CONFIG = Private("torch._dynamo.config", check=lambda config: bool(config.disable))
_GUARD_OF_LENGTH = Private("torch._dynamo.guards:GuardBuilder.SEQUENCE_LENGTH", check=lambda make: make.__code__)
_TRACING = Private("torch._guards:TracingContext", check=lambda context: context.try_get())
_MARK = Private("torch._dynamo:mark_dynamic", check=callable)
_MAYBE_MARK = Private("torch._dynamo:maybe_mark_dynamic", check=callable)

HOOK_GUARDS = Trick(
    "hook_guards",
    "a compiled step is compiled anew when its model has a hook more or less",
    "compiled() runs models uncompiled, since a hook that comes later would be left out",
    _GUARD_OF_LENGTH,
    _TRACING,
    can_be_switched_off=False,
)
GUARDS_ONCE = Trick(
    "guards_once",
    "hf_paged.sample has dynamo look at a compiled model in its first steps only",
    "dynamo looks at all of the model before each step",
    _TRACING,
)
DYNAMIC_SIZES = Trick(
    "dynamic_sizes",
    "a kernel is compiled once for all lengths",
    "a kernel is compiled again the first times that its lengths change",
    _MARK,
)
COMPILED_PREFILL = Trick(
    "compiled_prefill",
    "within compiled(), prefill computes prompts in a compiled graph",
    "prefill computes prompts uncompiled",
    _MAYBE_MARK,
)


def outside_of_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function run as it is where `torch.compile` comes upon it: between two graphs."""
    disabled: Callable[P, R] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


def with_own_code(function: Callable[P, R]) -> Callable[P, R]:
    """Copy a function, so that its graphs are its own: dynamo keeps them with the code, up to a limit for each."""
    assert isinstance(function, types.FunctionType)
    name = f"{function.__name__}_{next(_numbers)}"
    code = function.__code__.replace(co_name=name)  # it tells codes apart by what they are, the name included
    return types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)


def switched_off() -> str | None:
    """Say which of torch's switches turns `torch.compile` off; None if it is on."""
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return "TORCHDYNAMO_DISABLE=1 switches torch.compile off"
    config = _CONFIG.value_or(None, "Only the environment is asked whether torch.compile is switched off")
    is_off = os.environ.get("TORCH_COMPILE_DISABLE") == "1" if config is None else config.disable
    return "torch._dynamo.config.disable (TORCH_COMPILE_DISABLE=1) switches torch.compile off" if is_off else None


def is_from_dynamo(error: BaseException) -> bool:
    """Whether an error says that something can't be traced or compiled."""
    return any(kind.__module__ == "torch._dynamo.exc" for kind in type(error).__mro__)


@outside_of_graphs  # dynamo refuses to trace it
def mark_dynamic(tensor: Tensor, size: int) -> None:
    """Have graphs made for any number where a tensor has this one of its sizes, with `DYNAMIC_SIZES`."""
    if DYNAMIC_SIZES.is_on:
        try:
            _MARK.value(tensor, size)
        except Exception as error:
            DYNAMIC_SIZES.fall_back(error)


@outside_of_graphs  # as above
def let_vary(tensor: Tensor, size: int) -> None:
    """Have graphs made for any number there, as far as the model lets it vary, with `COMPILED_PREFILL`."""
    try:
        _MAYBE_MARK.value(tensor, size)
    except Exception as error:
        COMPILED_PREFILL.fall_back(error)


def guard_hooks() -> None:
    """While a backend of dynamo runs, let its graph be compiled anew when there is a hook more or less.

    Dynamo takes it for granted that a module without hooks stays without, and would leave out a hook that comes later.
    What hooks of the backward pass are asked for there is no gradient.

    Raises:
        MissingNameError: if there are modules, but dynamo no longer asks for their hooks in the way that is known.
    """
    length = _GUARD_OF_LENGTH.value
    guards = _TRACING.value.get().guards_context.dynamo_guards
    of_hooks = [guard for guard in guards if guard.name.endswith(_HOOKS.get(guard.create_fn_name(), ()))]
    if not of_hooks and any("._modules[" in guard.name for guard in guards):
        raise MissingNameError("dynamo has no guards for the hooks of modules")
    for guard in of_hooks:
        guard.create_fn = length


def depends_on_sizes_only() -> bool:
    """While a backend of dynamo runs: whether the numbers that its graph leaves open are sizes of tensors alone.

    Any other number, such as the length of a cache, may be a graph's reason to be another one from some length on.
    """
    try:
        numbers = _TRACING.value.get().fake_mode.shape_env.source_to_var
        return all(_SIZE.search(source) for source in numbers)
    except Exception as error:
        GUARDS_ONCE.fall_back(error)
        return False


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether anything is called before or behind the forward pass of a module, its own or of all modules."""
    of_all = torch.nn.modules.module
    own = module._forward_hooks or module._forward_pre_hooks
    return bool(own or of_all._global_forward_hooks or of_all._global_forward_pre_hooks)


def unguarded(method: types.MethodType) -> types.FunctionType | None:
    """From within a graph, return what dynamo has made of a module's method, to be called without its guards.

    Like the method without its object. It does all that the method does, once it is known that nothing has changed of
    what dynamo would look at.

    Args:
        method: runs further up in the stack, called by its module's `__call__`.

    Returns:
        The function; None where the method is not what was captured, or more is done around it, as by hooks.
    """
    module, function = method.__self__, method.__func__
    assert isinstance(module, torch.nn.Module)
    if has_hooks(module) or type(module).__call__ is not torch.nn.Module.__call__:
        return None
    captured = function.__code__
    place = captured.co_filename, captured.co_firstlineno, captured.co_name
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code is not captured and (code.co_filename, code.co_firstlineno, code.co_name) == place:
            if _first_argument(frame) is not module or code.co_freevars != captured.co_freevars:
                return None
            made = types.FunctionType(
                code, frame.f_globals, function.__name__, function.__defaults__, function.__closure__
            )
            made.__kwdefaults__ = function.__kwdefaults__
            return made
        frame = frame.f_back
    return None


def _first_argument(frame: types.FrameType) -> object:
    names, others, _, values = inspect.getargvalues(frame)
    given = [*(values.get(name) for name in names), *(values.get(others, ()) if others else ())]
    return given[0] if given else None


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """Return what `torch.autocast` would have attention computed in, where this tensor is; None if it is off."""
    device = tensor.device.type
    if not _has_autocast(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch.compile before torch 2.13 can't look into what is called
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)
