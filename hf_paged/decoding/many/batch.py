"""The rows that take steps together."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_paged._transformers import CACHE
from hf_paged.batch.prompt.prefixes import is_findable, let_be_found
from hf_paged.cache.joining import take_over
from hf_paged.cache.paged import PagedCache
from hf_paged.decoding.many.filling import padded
from hf_paged.decoding.many.row import Row
from hf_paged.decoding.passes import Passes
from hf_paged.errors import OutOfPagesError
from hf_paged.pages.pool import PagePool


def captured_count(num_rows: int, device_type: str) -> int:
    """How many rows a compiled batch has for so many that run.

    On a CPU one graph serves any number but one, for which another would be compiled. On a GPU each number is captured
    by itself, so there are few of them.
    """
    if device_type == "cpu":
        return max(2, num_rows)
    return 1 << (num_rows - 1).bit_length() if num_rows <= 8 else -(-num_rows // 8) * 8


class Batch:
    """Rows of one cache that joins others, and whose rows leave. It holds all tokens of each but the last.

    Args:
        model: that computes it.
        pool: where its pages are.

    Attributes:
        rows: in the order in which they came.
    """

    def __init__(self, model: PreTrainedModel, pool: PagePool) -> None:
        self.rows: list[Row] = []
        self.cache = PagedCache(pool=pool)
        self._model = model
        self._takes = inspect.signature(model.forward).parameters
        self._ids = torch.empty((0, 0), dtype=torch.int64)
        self._num_empty = 0  # rows of the cache behind those, without a token
        self._passes: Passes | None = None  # until other rows are in the batch

    def join(self, rows: Sequence[Row], cache: PagedCache) -> None:
        """Take rows on.

        Args:
            rows: that come.
            cache: that holds all of their tokens but the last ones; is empty afterwards.

        Raises:
            OutOfPagesError: if they were in memory of the host, and the pool has too few pages; nothing has changed.
        """
        num_before = max(0, self.cache.batch_size)
        take_over(self.cache, cache)
        kept = [*range(len(self.rows)), *range(num_before, num_before + len(rows))]
        self.rows += rows
        self._shape(kept)

    def keep(self, indices: Sequence[int]) -> None:
        """Let all rows but these leave; their pages are free at once."""
        self.rows = [self.rows[index] for index in indices]
        if self.rows:
            self._shape(indices)
        else:
            self.cache.reset()
            self._passes = None

    def take_newest(self) -> Row:
        """Let the row of the last prompt leave.

        If the pool has memory of the host with room, what was computed of it goes there; else it is forgotten, but
        can be found by its tokens as long as nobody takes the pages.
        """
        last = max(range(len(self.rows)), key=lambda index: self.rows[index].prompt.index)
        row = self.rows[last]
        part = self.cache.fork()
        part.batch_select_indices(torch.tensor([last]))
        rows = part._sequences.rows
        rows.drop_padding()
        self.keep([index for index in range(len(self.rows)) if index != last])
        pool = self.cache.pool
        if pool.host is not None:
            try:
                part.swap_out()
            except OutOfPagesError:
                pass
            else:
                row.parked = part
                return row
        if pool.prefix_index is not None and is_findable(rows):
            let_be_found(rows, torch.tensor([row.ids]))
        part.reset()
        return row

    @torch.no_grad()
    def step(self) -> Tensor:
        """Compute the last token of each row; return `(num_rows, vocab_size)` float32 scores of the next ones.

        Raises:
            OutOfPagesError: if the pool has too few pages; nothing has changed.
        """
        model: Any = self._model
        if self._passes is None:
            self._passes = self._begin()
        with model._optimize_model_for_decode():
            outputs = self._passes.next(self._ids)
        self._passes.update(outputs)
        scores: Tensor = outputs.logits[: len(self.rows), -1].to(torch.float32, copy=True)
        return scores

    def add_column(self) -> None:
        """Go on by the last of the `ids` of each row, which is new."""
        tokens = [row.ids[-1:] for row in self.rows] + [[0]] * self._num_empty
        column = torch.tensor(tokens, device=self._ids.device)
        self._ids = torch.cat([self._ids, column], dim=1)

    def _shape(self, indices: Sequence[int]) -> None:
        """Let the cache have these rows, and behind them so many without a token that steps of as many are captured.

        It has as many columns as the longest row needs.
        """
        model: Any = self._model
        is_compiled = model._valid_auto_compile_criteria({CACHE: self.cache}, model.generation_config)
        num_rows = captured_count(len(indices), model.device.type) if is_compiled else len(indices)
        self.cache.batch_select_indices(torch.tensor([*indices, *[indices[0]] * (num_rows - len(indices))]))
        self.cache.release(range(len(indices), num_rows))
        self.cache._sequences.rows.drop_padding()
        self._num_empty = num_rows - len(indices)
        self._passes = None

    def _begin(self) -> Passes:
        self._ids, mask = padded(self.rows, self._model.device, self._num_empty)
        lengths = mask.sum(dim=1, keepdim=True)
        inputs: dict[str, Any] = {CACHE: self.cache, "attention_mask": None if mask.all() else mask, "use_cache": True}
        if "position_ids" in self._takes:
            inputs["position_ids"] = (lengths - 1).clamp(min=0)
        passes = Passes(self._model, self._model.generation_config, inputs)
        passes.go_on(self._ids.shape[1])
        return passes
