"""Decoding steps of one row on a CPU, captured once and replayed.

In such a step everything is loops that inductor made, one call for each layer, and the attention of the layers. What
inductor puts around them makes buffers and views by the hundred, and torch's dispatcher is asked for each attention.
Neither is needed for a step that is like the one before.
"""

import threading
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hf_paged._torch.wrapper_replay import Run, WrapperReplay, capture
from hf_paged.attention.metadata import AttentionMetadata
from hf_paged.compile.ops import write_and_attend


class StepReplay:
    """What inductor made of a decoding step. What it was given is not held between two steps.

    Args:
        run: takes a list of tensors and metadata, which it may clear, and returns tensors.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._wrapper: WrapperReplay | None = None
        self._is_captured = False
        self._lock = threading.Lock()

    def __call__(self, inputs: list[Any]) -> Sequence[Tensor]:
        """Run the step, or replay it."""
        # A capture has one set of buffers, for one thread at a time.
        if not self._lock.acquire(blocking=False):
            return self._run(inputs)
        try:
            if self._wrapper is not None:
                return self._replay(self._wrapper, inputs)
            if self._is_captured or not all(isinstance(value, Tensor | AttentionMetadata) for value in inputs):
                return self._run(inputs)
            operations = {"write_and_attend": write_and_attend}
            results, self._wrapper = capture(self._run, inputs, inputs.copy(), operations)
            self._is_captured = True
            return results
        finally:
            self._lock.release()

    @staticmethod
    def _replay(wrapper: WrapperReplay, inputs: list[Any]) -> Sequence[Tensor]:
        try:
            return wrapper.replay(*inputs)
        finally:
            wrapper.release()
