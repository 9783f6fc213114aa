"""The states of one recurrent layer."""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, fields
from typing import Any, Self

from torch import Tensor
from torch.nn.functional import pad


@dataclass
class LayerStates:
    """What one recurrent layer keeps, by the number that the model has for each of its states.

    The names are those of Transformers' own layers, which read and fill these dictionaries. The tensors are shared
    with forks, and with the pass before, so nothing writes into them that has not copied them first.

    Attributes:
        conv_states: `(num_rows, ..., num_columns)` the last inputs of a convolution; None before the first.
        recurrent_states: `(num_rows, ...)`; None before the first, and in layers that only convolve.
        is_conv_states_initialized: whether there is one.
        is_recurrent_states_initialized: whether there is one.
        has_previous_state: whether it has seen tokens.
        conv_kernel_size: columns that a convolution needs; there are more while the past is recorded.
        is_shared: whether somebody else may read the tensors, so that nothing is ever written into them.
        is_filled: whether a compiled graph has written the states after its pass into the tensors.
    """

    conv_states: dict[int, Tensor | None]
    recurrent_states: dict[int, Tensor | None]
    is_conv_states_initialized: dict[int, bool]
    is_recurrent_states_initialized: dict[int, bool]
    has_previous_state: dict[int, bool]
    conv_kernel_size: dict[int, int | None]
    is_shared: bool = False
    is_filled: bool = False

    @classmethod
    def empty(cls, num_states: int) -> Self:
        """States that have seen nothing."""
        values = None, None, False, False, False, None
        states: list[Any] = [dict.fromkeys(range(num_states), value) for value in values]
        return cls(*states)

    def changed(self, change: Callable[[Tensor], Tensor], *, records_past: bool = True) -> Self:
        """Return states of other tensors.

        Args:
            change: makes them.
            records_past: whether convolutions keep more columns than they need.
        """
        other = copy(self)
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), dict):
                setattr(other, field.name, dict(value))
        for index, state in other.conv_states.items():
            if state is not None:
                other.conv_states[index] = change(state if records_past else self._needed(index, state))
        for index, state in other.recurrent_states.items():
            if state is not None:
                other.recurrent_states[index] = change(state)
        return other

    def fill(self, before: Self) -> None:
        """Write the tensors of states like these into those of these."""
        for index, state in self.conv_states.items():
            if state is not None:
                state.copy_(before.conv_states[index])  # type: ignore[arg-type]
        for index, state in self.recurrent_states.items():
            if state is not None:
                state.copy_(before.recurrent_states[index])  # type: ignore[arg-type]

    def needs_more(self, num_removed: int, num_left: int) -> bool:
        """Whether tokens can't be taken back: of a recurrent state, or of columns that were not recorded.

        Args:
            num_removed: columns to take back, at least one.
            num_left: columns that are left.
        """
        if any(state is not None for state in self.recurrent_states.values()):
            return True
        widths = (
            (index, state.shape[-1] - num_removed) for index, state in self.conv_states.items() if state is not None
        )
        return any(width < (self.conv_kernel_size[index] or 0) and width != num_left for index, width in widths)

    def truncated(self, num_removed: int) -> Self:
        """Return states without the last columns, and without what the next pass does not need."""
        other = self.changed(lambda state: state)
        for index, state in other.conv_states.items():
            if state is not None:
                left = self._needed(index, state[..., : state.shape[-1] - num_removed])
                width = self.conv_kernel_size[index] or 0
                other.conv_states[index] = pad(left, (width - left.shape[-1], 0)).clone()
        return other

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        states = (*self.conv_states.values(), *self.recurrent_states.values())
        return [state for state in states if state is not None]

    def _needed(self, index: int, state: Tensor) -> Tensor:
        width = self.conv_kernel_size[index] or 0
        return state if state.shape[-1] <= width else state[..., -width:]
