"""The rows that take steps together."""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_paged._transformers import CACHE
from hf_paged.batch.known_ids import KnownIds
from hf_paged.batch.padding import Columns, Counts
from hf_paged.batch.prompt.prefixes import is_findable, let_be_found
from hf_paged.cache.joining import take_over
from hf_paged.cache.paged import PagedCache
from hf_paged.decoding.many.drafts.drafter import RowDrafter
from hf_paged.decoding.many.filling import padded
from hf_paged.decoding.many.row import Row
from hf_paged.decoding.passes import Passes
from hf_paged.decoding.ragged_passes import RaggedPasses
from hf_paged.decoding.speculate.budget import FIRST_HITS, Budget
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
    """Rows of one cache that joins others, and whose rows leave. It holds tokens of each, all but the last at most.

    Args:
        model: that computes it.
        pool: where its pages are.
        drafter: guesses the next tokens; None: nobody.

    Attributes:
        rows: in the order in which they came.
        drafts: the tokens of each row that `draft` has guessed for the next step.
    """

    def __init__(self, model: PreTrainedModel, pool: PagePool, drafter: RowDrafter | None = None) -> None:
        self.rows: list[Row] = []
        self.drafts: list[list[int]] = []
        self.cache = PagedCache(pool=pool)
        self._model = model
        self._takes = inspect.signature(model.forward).parameters
        self._ids = torch.empty((0, 0), dtype=torch.int64)
        self._num_empty = 0  # rows of the cache behind those, without a token
        self._passes: Passes | None = None  # until other rows are in the batch
        self._lengths = np.zeros(0, dtype=np.int64)  # of rows and empty ones when these passes began
        self._ragged: RaggedPasses | None = None  # likewise
        self._drafter = drafter
        self._budget: Budget | None = None
        self._hits = FIRST_HITS  # of rows of which nothing is known
        self._foreseen = np.zeros(0, dtype=np.int64)

    def join(self, rows: Sequence[Row], cache: PagedCache) -> None:
        """Take rows on.

        Args:
            rows: that come.
            cache: that holds all of their tokens but the last ones; is empty afterwards.

        Raises:
            OutOfPagesError: if they were in memory of the host, and the pool has too few pages; nothing has changed.
        """
        self._level()
        num_before = max(0, self.cache.batch_size)
        take_over(self.cache, cache)
        kept = [*range(len(self.rows)), *range(num_before, num_before + len(rows))]
        self.rows += rows
        self._shape(kept)

    def keep(self, indices: Sequence[int]) -> None:
        """Let all rows but these leave; their pages are free at once."""
        self._level()
        self.rows = [self.rows[index] for index in indices]
        if self.rows:
            self._shape(indices)
        else:
            self.cache.reset()
            self._passes = None
        if self._drafter is not None:
            self._drafter.keep(self.rows)

    def close(self) -> None:
        """Let all rows leave, whatever was under way."""
        self.rows, self._passes, self._ragged = [], None, None
        self.cache.reset()
        if self._drafter is not None:
            self._drafter.close()

    def take_newest(self) -> Row:
        """Let the row of the last prompt leave.

        If the pool has memory of the host with room, what was computed of it goes there; else it is forgotten, but
        can be found by its tokens as long as nobody takes the pages.
        """
        self._level()
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

    def draft(self) -> None:
        """Guess the next tokens of each row, as many as pay."""
        self.drafts = [[] for _ in self.rows]
        drafter = self._drafter
        if drafter is None:
            return
        if self._budget is None:
            count, device = len(self.rows), self._model.device
            self._budget = Budget(count, drafter.num_tokens, count, device, drafter.cost)
            self._budget.hits = np.array([self._hits if row.hits is None else row.hits for row in self.rows])
        left = np.array([row.num_left - 1 for row in self.rows])  # the last token is not drafted
        available = np.clip(drafter.available(self.rows), 0, left).astype(np.int64)
        self._foreseen = drafter.foreseen(self.rows)
        counts = self._budget.choose(available, np.ones(len(self.rows), dtype=bool))
        if counts.any():
            self.drafts = drafter.draft(self.rows, counts)

    @torch.no_grad()
    def step(self) -> Tensor:
        """Compute the last token of each row, and its drafts.

        Returns:
            `(num_rows, num_new, vocab_size)` float32 scores of what follows these, valid up to the drafts of each row.

        Raises:
            OutOfPagesError: if the pool has too few pages; nothing has changed.
        """
        if self._drafter is None:
            model: Any = self._model
            if self._passes is None:
                self._passes = self._begin()
            with model._optimize_model_for_decode():
                outputs = self._passes.next(self._ids)
            self._passes.update(outputs)
            logits = outputs.logits[: len(self.rows), -1:]
        else:
            counts = np.array([1 + len(draft) for draft in self.drafts])
            tokens = np.zeros((len(counts), int(counts.max())), dtype=np.int64)
            for own, row, draft in zip(tokens, self.rows, self.drafts, strict=True):
                own[: 1 + len(draft)] = [row.ids[-1], *draft]
            logits = self.run(tokens, counts)
        scores: Tensor = logits.to(torch.float32, copy=True)
        return scores

    def go_on(self, num_tokens: Sequence[int]) -> None:
        """Go on by the last of the `ids` of each row, which are new, and take back the drafts that are not in there.

        Args:
            num_tokens: that each row has got by the step: one at least, or none if it is going to leave.
        """
        if self._budget is None:
            tokens = [row.ids[-1:] for row in self.rows] + [[0]] * self._num_empty
            self._ids = torch.cat([self._ids, torch.tensor(tokens, device=self._ids.device)], dim=1)
            return
        drafted = np.array([len(draft) for draft in self.drafts])
        accepted = np.maximum(np.array(num_tokens) - 1, 0)
        self.cut(self.ends - drafted + accepted)
        is_known = (self._foreseen >= 0) & (np.array(num_tokens) > 0)
        came = np.array([row.ids[-max(1, count)] for row, count in zip(self.rows, num_tokens, strict=True)])
        self._budget.note(drafted, accepted, np.where(is_known, came == self._foreseen, np.nan))
        for row, hits in zip(self.rows, self._budget.hits.tolist(), strict=True):
            row.hits = hits
        if self._drafter is not None and self._drafter.cost > 0:  # else it costs nothing to learn it of each
            self._hits = float(self._budget.hits.mean())

    # Each row from its own end

    @property
    def ends(self) -> Counts:
        """`(num_rows,)` tokens of each row that are computed."""
        ends = self._apart().ends - self._ids.shape[1] + 1 + self._lengths
        return ends[: len(self.rows)]

    @torch.no_grad()
    def run(self, tokens: Counts, counts: Counts) -> Tensor:
        """Compute the next `counts[row]` of `(num_rows, num_new)` tokens; `(num_rows, num_new, vocab_size)` scores.

        Raises:
            OutOfPagesError: if the pool has too few pages; nothing has changed.
        """
        model: Any = self._model
        passes, empty = self._apart(), self._num_empty
        with model._optimize_model_for_decode():
            logits = passes.run(np.pad(tokens, ((0, empty), (0, 0))), np.pad(counts, (0, empty)))
        return logits[: len(self.rows)]

    def cut(self, ends: Counts) -> None:
        """Take back what was computed of each row from its token of `ends`, `(num_rows,)`, on."""
        passes, count = self._apart(), len(self.rows)
        passes.cut(np.concatenate([passes.ends[:count] - self.ends + ends, passes.ends[count:]]))

    def _apart(self) -> RaggedPasses:
        if self._ragged is None:
            if self._passes is None:
                self._passes = self._begin()
            sequences, passes = self.cache._sequences, self._passes
            self._ragged = RaggedPasses(self._model, passes.forward, sequences, passes.inputs, self._ids)
            self._ragged.__enter__()
        return self._ragged

    def _level(self) -> None:
        """Let rows that are not equally far end in one column, as padding on the left is stored as little."""
        self._budget = None
        if self._ragged is None:
            return
        sequences = self.cache._sequences
        sequences.end_step()
        rows = sequences.rows
        width = max(1, int(rows.lengths.max()))
        ids = np.zeros((rows.count, width), dtype=np.int64)
        for own, row, length in zip(ids, self.rows, rows.lengths.tolist(), strict=False):  # none for empty ones
            own[width - length :] = row.ids[:length]
        is_token = np.arange(width) >= width - rows.lengths[:, None]
        rows.columns, rows.known_ids = Columns(width, is_token, rows.columns.released), KnownIds()
        rows.known_ids.note(torch.from_numpy(ids).to(self._ids), 0, width)
        self._ragged.__exit__(None, None, None)  # from here on windows end where the last column does
        self._ragged = self._passes = None

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
        self._lengths = np.array(self.cache.lengths)
        ids = [row.ids[: length + 1] for row, length in zip(self.rows, self._lengths, strict=False)]  # none for empty
        self._ids, mask = padded(ids, self._model.device, self._num_empty)
        lengths = mask.sum(dim=1, keepdim=True)
        inputs: dict[str, Any] = {CACHE: self.cache, "attention_mask": None if mask.all() else mask, "use_cache": True}
        if "position_ids" in self._takes:
            inputs["position_ids"] = (lengths - 1).clamp(min=0)
        passes = Passes(self._model, self._model.generation_config, inputs)
        passes.go_on(self._ids.shape[1])
        return passes
