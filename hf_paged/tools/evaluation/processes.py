"""Processes that share the work, as `accelerate launch` and `torchrun` start them."""

import os
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


class Processes:
    """This process, and the others that work on the same.

    Where a launcher has said in the environment that there are several, they are joined by accelerate; a process that
    is alone needs no accelerate.

    Args:
        device: a kind of device to work on; with several processes on CUDA, each has one of its own.

    Raises:
        ModuleNotFoundError: there are several processes, and accelerate is not installed.

    Attributes:
        index: of this process.
        count: of all.
        device: of this process.
    """

    def __init__(self, device: torch.device) -> None:
        self.index, self.count, self.device = 0, 1, device
        if max(int(os.environ.get(name, 1)) for name in _SIZES) > 1:
            try:
                from accelerate import PartialState  # type: ignore[import-untyped]
            except ModuleNotFoundError as error:
                raise ModuleNotFoundError(
                    "Several processes were launched, which need accelerate to share the work, but it is not "
                    'installed. Run: pip install "hf-paged[eval]"'
                ) from error
            state = PartialState(cpu=device.type == "cpu")
            self.index, self.count = state.process_index, state.num_processes
            if device.type != "cpu":
                self.device = state.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.index == 0

    def gather(self, items: list[T]) -> list[T]:
        """Join the lists of all processes; all of them have to call this."""
        if self.count == 1:
            return items
        from accelerate.utils import gather_object  # type: ignore[import-untyped]

        joined: list[T] = gather_object(items)
        return joined

    def from_main(self, function: Callable[[], T]) -> T:
        """Call a function in the main process only, and return in all of them what it returns.

        Raises:
            ValueError: if the function does, in all of them.
        """
        answers: list[tuple[T | None, ValueError | None]] = []
        if self.is_main:
            try:
                answers.append((function(), None))
            except ValueError as error:
                answers.append((None, error))
        [(answer, mistake)] = self.gather(answers)
        if mistake is not None:
            raise mistake
        return answer  # type: ignore[return-value]  # None only where the function returned it
