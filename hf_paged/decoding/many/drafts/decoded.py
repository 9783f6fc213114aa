"""Drafts that a smaller model makes."""

import logging
from collections.abc import Iterable, Sequence
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_paged.batch.padding import BoolVector, Counts
from hf_paged.cache.paged import PagedCache
from hf_paged.cache.prompt.prefill import usual_chunk
from hf_paged.decoding.many.batch import Batch
from hf_paged.decoding.many.choice import choose
from hf_paged.decoding.many.filling import Filling
from hf_paged.decoding.many.room import growing_pool
from hf_paged.decoding.many.row import Row
from hf_paged.decoding.speculate.assistant import Ahead, Assisted, max_length

logger = logging.getLogger(__name__)


class Decoded:
    """Has a smaller model decode ahead of the rows of a batch, in a batch and a pool of its own.

    A row is computed there when it is first drafted for, packed with others that are, and leaves with the row that it
    is a copy of. No guess depends on what runs beside it, nor does it change what is drawn. If the model fails, rows
    go on without drafts, and one log message says so.

    Args:
        assisted: the model, and how many tokens it drafts.
        model: that decides.
        page_size: tokens per page.
    """

    def __init__(self, assisted: Assisted, model: PreTrainedModel, page_size: int) -> None:
        self.num_tokens = assisted.num_tokens
        self.cost = assisted.cost(model)
        self._model = assisted.draft_model
        self._device = model.device
        self._pool = growing_pool(self._model, page_size)
        self._batch = Batch(self._model, self._pool)
        self._ahead: Ahead | None = None  # until other rows are in the batch
        self._max_length = max_length(self._model)
        self._failed: WeakSet[Row] = WeakSet()
        self._has_failed = False

    def available(self, rows: Sequence[Row]) -> Counts:
        """See `RowDrafter`."""
        are_going = [not self._has_failed and row not in self._failed for row in rows]
        lengths = np.array([len(row.ids) for row in rows])
        return np.where(are_going, np.maximum(0, self._max_length - lengths), 0)

    def foreseen(self, rows: Sequence[Row]) -> Counts:
        """See `RowDrafter`."""
        return np.full(len(rows), -1)

    @torch.no_grad()
    def draft(self, rows: Sequence[Row], counts: Counts) -> list[list[int]]:
        """See `RowDrafter`."""
        wanted = {row: count for row, count in zip(rows, counts.tolist(), strict=True) if count}
        try:
            new = [row for row in wanted if row not in self._batch.rows]
            if new:
                self._take_on(new)
            drafts = self._guess(wanted)
        except Exception as error:
            logger.warning("No more drafts are made, as %s failed: %r", type(self._model).__name__, error)
            self._has_failed = True
            self.close()
            drafts = {}
        return [drafts.get(row, []) for row in rows]

    def keep(self, rows: Sequence[Row]) -> None:
        """See `RowDrafter`."""
        kept = [place for place, own in enumerate(self._batch.rows) if own in rows]
        if len(kept) < len(self._batch.rows):
            self._settle()
            self._batch.keep(kept)

    def close(self) -> None:
        """See `RowDrafter`."""
        self._ahead = None
        self._batch.close()
        self._pool.forget_prefixes()
        self._pool.trim()

    def _settle(self) -> None:
        """Hold nothing but what is known of the rows, so that others may come, or some leave."""
        if self._ahead is not None:
            self._ahead.take_back()
            self._ahead = None

    def _take_on(self, rows: Sequence[Row]) -> None:
        """Compute rows that are new, each by itself if they fail together."""
        with PagedCache(pool=self._pool) as cache:
            filling = Filling(self._model, cache, rows, usual_chunk(self._model.device))
            try:
                while not filling.advance():
                    pass
            except Exception as error:
                if len(rows) == 1:
                    self._leave_out(rows[0], error)
                    return
            else:
                self._settle()
                self._batch.join(rows, cache)
                return
        for row in rows:
            self._take_on([row])

    def _guess(self, wanted: dict[Row, int]) -> dict[Row, list[int]]:
        rows = self._batch.rows
        counts = np.array([wanted.get(row, 0) for row in rows], dtype=np.int64)
        if not counts.any():
            return {}
        if self._ahead is None:
            self._ahead = Ahead(self._batch, _Known(rows))
        copies = [row.ahead() if count else row for row, count in zip(rows, counts.tolist(), strict=True)]
        valid = counts.copy()

        def choose_apart(logits: Tensor, are_wanted: BoolVector) -> Counts:
            places, tokens = np.flatnonzero(are_wanted), np.zeros(len(rows), dtype=np.int64)
            scores = logits[torch.from_numpy(places).to(logits.device)].to(self._device, torch.float32)
            for place, token in zip(places.tolist(), choose([copies[place] for place in places], scores), strict=True):
                if isinstance(token, Exception):
                    self._leave_out(rows[place], token)
                    valid[place] = 0
                else:
                    tokens[place] = token
            return tokens

        drafted = self._ahead.go_on(counts, choose_apart).tolist()
        return {row: tokens[:count] for row, tokens, count in zip(rows, drafted, valid.tolist(), strict=True)}

    def _leave_out(self, row: Row, error: Exception) -> None:
        self._failed.add(row)
        logger.warning(
            "Prompt %d goes on without drafts, as %s failed: %r", row.prompt.index, type(self._model).__name__, error
        )


class _Known:
    """What rows have said by now, as `Text` has it of rows that are padded."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows = list(rows)

    @property
    def known(self) -> Counts:
        """`(num_rows,)` tokens of each row."""
        return np.array([len(row.ids) for row in self._rows])

    def at(self, begins: Counts, num_columns: int) -> Counts:
        """`(num_rows, num_columns)` tokens of each row from its one of `begins` on; 0 behind them."""
        found = np.zeros((len(self._rows), num_columns), dtype=np.int64)
        for own, row, begin in zip(found, self._rows, begins.tolist(), strict=True):
            tokens = row.ids[begin : begin + num_columns]
            own[: len(tokens)] = tokens
        return found
