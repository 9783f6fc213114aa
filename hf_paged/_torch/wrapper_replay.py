"""What a function that inductor made for a CPU does, captured once and replayed with other tensors.

Around its loops, which are C++, inductor puts a function in Python that makes their buffers and views of them. What is
replayed is the loops alone, with the same buffers and new tensors for the results, and operations that are named.
"""

from collections.abc import Callable, Mapping, Sequence
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from hf_paged._torch.tricks import Trick

WRAPPER_REPLAY = Trick(
    "wrapper_replay",
    "of a kernel on a CPU, layers after the first call the loops alone",
    "each layer calls what inductor put around the loops, too",
    device_type="cpu",
)

_PREFIX = "cpp_fused"  # of the names that inductor gives to loops
_DTYPES = {"float32", "bfloat16", "float16"}
# What else that function may refer to. Nothing of it reads or writes what is in a tensor.
_HARMLESS = _DTYPES | {
    "empty_strided_cpu", "reinterpret_tensor", "assert_alignment", "clear", "size",
    "torch", "ops", "hf_paged", "default",
}  # fmt: skip

Run = Callable[[list[Any]], Sequence[Tensor]]
Call = tuple[Callable[..., Tensor | None], list[Any], Tensor | None]


class WrapperReplay:
    """The loops of one call and the buffers that it made. For one thread at a time, since the buffers are shared.

    Args:
        calls: each a function, what it is called with, and where what it returns goes, if it returns something.
        results: what the call returned.
        uses: where the changing inputs are, and behind them the results: a list of arguments, the index in it, and
            the number of the input or result.
    """

    def __init__(self, calls: list[Call], results: Sequence[Tensor], uses: list[tuple[list[Any], int, int]]) -> None:
        self._calls = calls
        self._results = [(result.shape, result.stride(), result.dtype) for result in results]
        self._uses = uses
        self.release()

    def replay(self, *changing: Any) -> list[Tensor]:
        """Return the results for other inputs of the same sizes and strides."""
        results = [torch.empty_strided(shape, strides, dtype=dtype) for shape, strides, dtype in self._results]
        filled = *changing, *results
        for arguments, index, number in self._uses:
            arguments[index] = filled[number]
        for function, arguments, target in self._calls:
            if target is None:
                function(*arguments)
            else:
                target.copy_(function(*arguments))  # type: ignore[arg-type]
        return results

    def release(self) -> None:
        """Hold none of the inputs and results any more."""
        for arguments, index, _ in self._uses:
            arguments[index] = None


def capture(
    run: Run, inputs: list[Any], changing: Sequence[Any], operations: Mapping[str, Callable[..., Tensor]] | None = None
) -> tuple[Sequence[Tensor], WrapperReplay | None]:
    """Call what inductor compiled, and take down what it does.

    Args:
        run: takes a list of inputs, which it may clear, and returns tensors.
        inputs: for it.
        changing: those of the inputs that will be others when it is replayed.
        operations: by their names in `torch.ops.hf_paged`: what may be called besides loops, and gives a tensor of the
            same size for the same sizes.

    Returns:
        The results, and what repeats the call; None where it does more, as on a GPU.
    """
    operations = operations or {}
    function = getattr(run, "__func__", None)
    names = set(function.__code__.co_names) if isinstance(function, FunctionType) else set()
    loops = {name for name in names if name.startswith(_PREFIX)}
    if not isinstance(function, FunctionType) or names - loops - _HARMLESS - set(operations):
        return run(inputs), None
    if not loops.issubset(function.__globals__):
        return run(inputs), None
    calls: list[Call] = []

    def captured(step: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
        def call(*arguments: Any) -> Tensor | None:
            output = step(*arguments)
            if output is not None:
                with torch.inference_mode(False):  # or it could not be written to outside of that mode
                    output = output.clone()
            calls.append((step, list(arguments), output))
            return output

        return call

    operations_by_name = {name: SimpleNamespace(default=captured(operation)) for name, operation in operations.items()}
    dtypes = {name: getattr(torch, name) for name in _DTYPES}
    scope = function.__globals__ | {name: captured(function.__globals__[name]) for name in loops}
    scope["torch"] = SimpleNamespace(ops=SimpleNamespace(hf_paged=SimpleNamespace(**operations_by_name)), **dtypes)
    results = FunctionType(function.__code__, scope)(run.__self__, inputs)  # type: ignore[attr-defined]
    uses = _uses(calls, [*changing, *results], len(changing))
    return results, None if uses is None else WrapperReplay(calls, results, uses)


def _uses(calls: list[Call], values: list[Any], num_inputs: int) -> list[tuple[list[Any], int, int]] | None:
    """Where these are handed to what is called.

    Returns:
        As for `WrapperReplay`; None if there is only a part of one, or nothing of a result, or if a result is written
        over what an operation returned.
    """
    found = []
    results = {value.untyped_storage().data_ptr() for value in values[num_inputs:]}
    if any(output is not None and output.untyped_storage().data_ptr() in results for *_, output in calls):
        return None
    addresses = {value.untyped_storage().data_ptr() for value in values if isinstance(value, Tensor)}
    for _, arguments, _ in calls:
        for index, argument in enumerate(arguments):
            numbers = [number for number, value in enumerate(values) if value is argument]
            if not numbers:
                if not isinstance(argument, Tensor) or argument.untyped_storage().data_ptr() not in addresses:
                    continue
                numbers = [number for number, value in enumerate(values) if _is_same_memory(argument, value)]
            if len(numbers) != 1:
                return None
            found.append((arguments, index, numbers[0]))
    is_whole = {number for _, _, number in found}.issuperset(range(num_inputs, len(values)))
    return found if is_whole else None


def _is_same_memory(one: Tensor, other: Any) -> bool:
    return isinstance(other, Tensor) and one.data_ptr() == other.data_ptr() and one.numel() == other.numel()
