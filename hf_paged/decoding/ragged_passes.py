"""Passes over new tokens of rows that are not equally far."""

from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_paged._transformers import compile_obstacle, keeps_to, layer_kinds
from hf_paged.attention.dispatch import reads_pages
from hf_paged.attention.mask import NAME
from hf_paged.batch.padding import Counts
from hf_paged.batch.sequences import Sequences
from hf_paged.batch.steps.ragged import RaggedRows
from hf_paged.decoding.inputs import StepInputs, inputs_after


class RaggedPasses:
    """The passes of a model in which each row of its cache goes on from its own end.

    A context, as `RaggedRows`.

    Args:
        model: makes them.
        forward: computes one, compiled or not.
        sequences: the rows of its cache.
        inputs: of the model beside its ids, up to the first column that is not cached.
        input_ids: `(num_rows, num_columns)` up to there.

    Raises:
        OutOfPagesError: if not even a token of each row fits into the pool.
        ValueError: if the model's inputs can't be made without it.
    """

    def __init__(
        self, model: Any, forward: Any, sequences: Sequences, inputs: dict[str, Any], input_ids: Tensor
    ) -> None:
        self._model = model
        self._forward = forward
        self._sequences = sequences
        self._rows = RaggedRows(sequences)
        self._first = int(self._rows.ends[0])
        self._num_ids = input_ids.shape[1] - 1  # there may be fewer than columns, behind those that were cached
        prepared = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **inputs)
        token = input_ids[:, -1:].clone(memory_format=torch.contiguous_format)
        step_inputs = inputs_after(model, sequences, inputs, prepared, token)
        if step_inputs is None or step_inputs.position_ids is None:
            raise _refused(model)
        self._inputs: StepInputs = step_inputs
        self._device = input_ids.device

    def __enter__(self) -> "RaggedPasses":
        self._rows.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._rows.__exit__()

    @property
    def ends(self) -> Counts:
        """`(num_rows,)` columns of ids of each row that are computed."""
        return self._rows.ends - self._first + self._num_ids

    @property
    def have_all_ids(self) -> bool:
        """Whether a column of the cache is the same one of ids, as none was cached before these."""
        return self._first == self._num_ids

    def run(self, tokens: Counts, counts: Counts) -> Tensor:
        """Compute the next `counts[row]` of `(num_rows, num_new)` tokens; return `(num_rows, num_new, vocab_size)`.

        Raises:
            OutOfPagesError: if they don't fit into the pool; nothing has changed.
        """
        num_new = tokens.shape[1]
        behind = np.minimum(np.arange(num_new), np.maximum(counts, 1)[:, None] - 1)  # no more for padding
        offsets = (self.ends - self._num_ids)[:, None] + behind
        pool = self._sequences.pool
        step = self._rows.begin(counts, num_new, reads_pages=reads_pages(pool, num_new))
        sent = [torch.from_numpy(array).to(self._device, non_blocking=True) for array in (tokens, offsets)]
        inputs = self._inputs.ragged(step, *sent)
        if inputs is None:
            self._sequences.roll_back(step)
            raise _refused(self._model)
        logits: Tensor = self._forward(**inputs, return_dict=True).logits
        self._rows.end(counts)
        return logits

    def cut(self, ends: Counts) -> None:
        """Take back what was computed of each row from these columns of ids on."""
        self._rows.cut(ends + self._first - self._num_ids)

    def give_up(self, ends: Counts) -> None:
        """Take back, after a failure, what was computed from these columns of ids on; no pass follows."""
        self._rows.give_up(ends + self._first - self._num_ids)


def check_ends_apart(model: Any) -> None:
    """Refuse a model whose rows can't end apart: of inputs or attention that want to know more than where they end."""
    obstacle = compile_obstacle(model.config)
    if obstacle is None and "chunked_attention" in layer_kinds(model.config):
        obstacle = "has layers that attend to chunks"
    if obstacle is not None:
        raise ValueError(
            f"Drafts need passes in which each row goes on from its own end, but this {type(model).__name__} "
            f"{obstacle}. Leave out custom_generate."
        )
    is_own = not keeps_to(model, "prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
    if is_own or hasattr(model, "create_masks_for_generate"):
        raise _refused(model)


def _refused(model: Any) -> ValueError:
    """Say that rows of a model can't go on from different columns."""
    return ValueError(
        f"Drafts need passes in which each row goes on from its own end, but {type(model).__name__} prepares its "
        f"inputs in a way of its own, or is not set to {NAME!r} with attention that is causal, or causal with a "
        f"window. Load it with attn_implementation={NAME!r}, or leave out custom_generate."
    )
