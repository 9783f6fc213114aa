"""What functions are to `torch.compile`."""

import itertools
import types
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

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
