"""What a kernel that inductor made for a CPU does, recorded once and repeated with other tensors.

Around its loops, which are C++, inductor puts a function in Python that makes their buffers, which would run again for
every layer. What is repeated is the loops alone, with the same buffers, and one new tensor for the result.
"""

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

_PREFIX = "cpp_fused"  # of the names that inductor gives to loops
# What else that function may refer to. Nothing of it reads or writes what is in a tensor.
_HARMLESS = {"empty_strided_cpu", "reinterpret_tensor", "clear", "size", "torch", "float32", "bfloat16", "float16"}

Run = Callable[[list[Any]], Sequence[Tensor]]
Launch = tuple[Callable[..., None], list[Any]]


class Launches:
    """The loops of one call and the buffers that it made. For one thread at a time, since the buffers are shared.

    Args:
        launches: each a function and what it is called with.
        result: what the call returned.
        places: where the changing tensors are, and behind them the result: a list of arguments, the index in it, and
            the number of the tensor.
    """

    def __init__(self, launches: list[Launch], result: Tensor, places: list[tuple[list[Any], int, int]]) -> None:
        self._launches = launches
        self._shape, self._strides, self._dtype = result.shape, result.stride(), result.dtype
        self._places = places

    def repeat(self, *tensors: Tensor) -> Tensor:
        """Return the result for other tensors of the same sizes and strides."""
        output = torch.empty_strided(self._shape, self._strides, dtype=self._dtype)
        filled = *tensors, output
        for arguments, index, number in self._places:
            arguments[index] = filled[number]
        for function, arguments in self._launches:
            function(*arguments)
        return output


def record(run: Run, inputs: list[Any], changing: Sequence[Tensor]) -> tuple[Tensor, Launches | None]:
    """Call what inductor compiled, and take down what it does.

    Args:
        run: takes a list of inputs, and returns one tensor in a sequence.
        inputs: for it.
        changing: those of the inputs that will be others when it is repeated.

    Returns:
        The result, and what repeats it; None where that is more than loops, as on a GPU.
    """
    function = getattr(run, "__func__", None)
    names = set(function.__code__.co_names) if isinstance(function, FunctionType) else set()
    loops = {name for name in names if name.startswith(_PREFIX)}
    if not isinstance(function, FunctionType) or names - loops - _HARMLESS:
        return run(inputs)[0], None
    launches: list[Launch] = []

    def recorded(loop: Callable[..., None]) -> Callable[..., None]:
        def launch(*arguments: Any) -> None:
            launches.append((loop, list(arguments)))
            loop(*arguments)

        return launch

    scope = function.__globals__ | {name: recorded(function.__globals__[name]) for name in loops}
    (result,) = FunctionType(function.__code__, scope)(run.__self__, inputs)  # type: ignore[attr-defined]
    places = _places(launches, [*changing, result])
    return result, None if places is None else Launches(launches, result, places)


def _places(launches: list[Launch], tensors: list[Tensor]) -> list[tuple[list[Any], int, int]] | None:
    """Where loops are given these tensors; None if they are given only a part of one, or one not at all."""
    found = []
    addresses = [tensor.untyped_storage().data_ptr() for tensor in tensors]
    for _, arguments in launches:
        for index, argument in enumerate(arguments):
            if not isinstance(argument, Tensor) or argument.untyped_storage().data_ptr() not in addresses:
                continue
            numbers = [number for number, tensor in enumerate(tensors) if _is_same_memory(argument, tensor)]
            if len(numbers) != 1:
                return None
            found.append((arguments, index, numbers[0]))
    return found if len({number for _, _, number in found}) == len(tensors) else None


def _is_same_memory(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel()
