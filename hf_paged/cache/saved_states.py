"""The states of recurrent layers in a file, beside the tokens of their rows."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_paged.batch.recurrent.layer_states import LayerStates
from hf_paged.batch.sequences import Sequences

_KINDS = "conv_states", "recurrent_states"


def described_states(sequences: Sequences) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The states of all rows as tensors, `(num_rows, ...)`, and numbers: what says which there are, by layer."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for layer in _recurrent(sequences):
        states = sequences.rows.states[layer]
        numbers[str(layer)] = [list(states.has_previous_state.values()), list(states.conv_kernel_size.values())]
        for kind in _KINDS:
            held: dict[int, Tensor | None] = getattr(states, kind)
            tensors |= {f"{kind}.{layer}.{number}": state for number, state in held.items() if state is not None}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, numbers


def read_states(
    tensors: dict[str, Tensor], numbers: dict[str, Any], num_rows: int, sequences: Sequences
) -> dict[int, LayerStates] | None:
    """Make states of what `described_states` has returned.

    Returns:
        Those of each layer; None if the parts don't belong together, or not to rows and layers like these.
    """
    found: dict[int, LayerStates] = {}
    for layer in _recurrent(sequences):
        has_previous, widths = numbers[str(layer)]
        states = found[layer] = LayerStates.empty(sequences.pool.layers[layer].num_states)
        if len(has_previous) != len(states.conv_states) or len(widths) != len(states.conv_states):
            return None
        for number, (has, width) in enumerate(zip(has_previous, widths, strict=True)):
            conv, recurrent = (tensors.get(f"{kind}.{layer}.{number}") for kind in _KINDS)
            present = [state for state in (conv, recurrent) if state is not None]
            if any(state.ndim < 2 or len(state) != num_rows for state in present) or bool(present) < has:
                return None
            if conv is not None and not (isinstance(width, int) and 1 <= width <= conv.shape[-1]):
                return None
            states.conv_states[number], states.recurrent_states[number] = conv, recurrent
            states.is_conv_states_initialized[number] = conv is not None
            states.is_recurrent_states_initialized[number] = recurrent is not None
            states.has_previous_state[number], states.conv_kernel_size[number] = bool(has), width
    return found


def hold_states(sequences: Sequences, found: dict[int, LayerStates], devices: dict[int, torch.device]) -> None:
    """Let rows have states.

    Args:
        sequences: the rows.
        found: what `read_states` has returned.
        devices: of the layers.
    """
    for layer, states in found.items():
        sequences.rows.states.hold(layer, states.changed(partial(Tensor.to, device=devices[layer], copy=True)))


def _recurrent(sequences: Sequences) -> list[int]:
    return [layer for layer, spec in enumerate(sequences.pool.layers) if spec.num_states]
