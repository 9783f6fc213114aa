"""Prompts that are being computed, before they join the batch."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_paged.cache.paged import PagedCache
from hf_paged.decoding.many.row import Row


def padded(rows: Sequence[Sequence[int]], device: torch.device, num_empty: int = 0) -> tuple[Tensor, Tensor]:
    """Lay out the tokens of each row as a batch, and behind them rows of padding alone.

    Returns:
        `(num_rows, num_columns)` ids, padded on the left to two columns at least, so that the last token of none is
        all that there is, and like it 0 for padding and 1 for tokens.
    """
    width = max(2, *map(len, rows))
    ids = [[0] * (width - len(row)) + [*row] for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    empty = [[0] * width] * num_empty
    return torch.tensor(ids + empty, device=device), torch.tensor(mask + empty, device=device)


class Filling:
    """Some rows of a cache of their own, computed packed, but for their last tokens.

    Several rows are computed at once. One that is longer than a piece is computed alone, piece by piece, unless the
    model has recurrent layers.

    Args:
        model: that computes them.
        cache: empty.
        rows: whose tokens are computed.
        max_tokens: of a piece.
    """

    def __init__(self, model: PreTrainedModel, cache: PagedCache, rows: Sequence[Row], max_tokens: int) -> None:
        self.cache = cache
        self.rows = list(rows)
        self._model = model
        self._max_tokens = max_tokens
        self._ids, self._mask = padded([row.ids for row in self.rows], model.device)
        # Some recurrent layers of Transformers go on from a state by single tokens alone.
        is_whole = len(self.rows) > 1 or cache.pool.has_states
        self._end = self._ids.shape[1] if is_whole else 1

    def advance(self) -> bool:
        """Compute a piece; return whether it was the last one.

        Raises:
            OutOfPagesError: if it does not fit into the pool; nothing has changed.
        """
        end = min(self._end + self._max_tokens, self._ids.shape[1])
        # As generate() would have it, a mask without padding is none.
        mask = None if self._mask[:, :end].all() else self._mask[:, :end]
        ids = self._ids[:, :end]
        self.cache.prefill(self._model, ids, torch.ones_like(ids) if mask is None else mask)
        self._end = end
        return end == self._ids.shape[1]
