"""What functions and tensors are to dynamo."""

import itertools
import types
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._dynamo.guards import GuardBuilder
from torch._guards import TracingContext

P = ParamSpec("P")
R = TypeVar("R")

_numbers = itertools.count()

# Dictionaries of which dynamo doesn't guard how long they are, by what it does instead.
_HOOKS = {
    "EMPTY_NN_MODULE_HOOKS_DICT": ("._forward_hooks", "._forward_pre_hooks"),
    "TYPE_MATCH": ("._global_forward_hooks", "._global_forward_pre_hooks"),
}


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


def guard_hooks() -> None:
    """While a backend of dynamo runs, let its graph be compiled anew when there is a hook more or less.

    Dynamo takes it for granted that a module without hooks stays without, and would leave out a hook that comes later.
    What hooks of the backward pass are asked for there is no gradient.
    """
    for guard in TracingContext.get().guards_context.dynamo_guards:
        if guard.name.endswith(_HOOKS.get(guard.create_fn_name(), ())):
            guard.create_fn = GuardBuilder.SEQUENCE_LENGTH


def without_graph(run: Any) -> Any:
    """Part what AOTAutograd returned from the graph it was made of, whose nodes take megabytes.

    It carries methods of the graph along, which nothing calls once the function is compiled.
    """
    function = run
    while function is not None:
        for name in ("zero_grad", "named_parameters", "named_buffers"):
            vars(function).pop(name, None)
        function = getattr(function, "_torchdynamo_orig_callable", None)
    return run


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """Return what `torch.autocast` would have attention computed in, where this tensor is; None if it is off."""
    device = tensor.device.type
    if not _has_autocast(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch.compile before torch 2.13 can't look into what is called
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)
