"""What functions are to `torch.compile`."""

import itertools
import types
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.types import GuardFilterEntry

P = ParamSpec("P")
R = TypeVar("R")

_numbers = itertools.count()


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


def guards_with_hooks(entries: Sequence[GuardFilterEntry]) -> list[bool]:
    """Let a graph be compiled anew when there is a hook more or less; a `guard_filter_fn` of `torch.compile`.

    Dynamo takes it for granted that a module without hooks stays without, and would leave out a hook that comes later.
    What hooks of the backward pass are asked for there is no gradient.
    """
    for entry in entries:
        is_for_hooks = entry.name.endswith(("_forward_hooks", "_forward_pre_hooks")) and isinstance(entry.value, dict)
        if is_for_hooks and entry.guard_type in ("EMPTY_NN_MODULE_HOOKS_DICT", "TYPE_MATCH"):
            entry.orig_guard.create_fn = GuardBuilder.SEQUENCE_LENGTH
    return [True] * len(entries)


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
