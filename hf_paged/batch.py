"""The rows of one cache, and the forward pass that they are in."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hf_paged.columns import BoolMatrix, Columns
from hf_paged.page_table import PageTable
from hf_paged.pool import PagePool
from hf_paged.step import Step, gather_columns
from hf_paged.tiles import Tiling


class Batch:
    """Rows, their padded view, and the step under way.

    A step is planned before the first layer and becomes part of the rows when the last layer was written. A pass that
    fails before that leaves no trace: the next one starts from what there was.

    Args:
        pool: where the pages are.
        layers: indices of the layers that store keys and values.
    """

    def __init__(self, pool: PagePool, layers: list[int]) -> None:
        self.pool = pool
        self.table = PageTable(pool)
        self.tiling = Tiling(self.table)
        self.columns = Columns()
        self.step: Step | None = None
        self._layers = layers
        self._is_planned = False  # whether a mask function of ours has planned the pass under way
        self._written = [True] * len(pool.layers)  # layers without storage count as written

    # One forward pass

    def plan(self, num_rows: int, num_new: int, attention_mask: Tensor | None) -> Step:
        """Plan a forward pass: check it, reserve its pages, and say which slots its tokens go to.

        Args:
            num_rows: rows of the batch.
            num_new: new columns.
            attention_mask: `(num_rows, num_columns)`, 0 for padding; None without padding.

        Raises:
            OutOfPagesError: if the pool has too few pages; nothing has changed.
            ValueError: if rows or mask don't fit what is cached; nothing has changed.
        """
        self.settle()
        self._check_rows(num_rows, num_new)
        mask = None if attention_mask is None else attention_mask.bool().cpu().numpy()
        new, past_is_visible = self.columns.split(mask, num_rows, num_new)
        self._is_planned = True
        if self.step is not None and self.step.matches(num_rows, num_new, new):
            return self.step  # another mask of the same pass
        return self._begin(num_rows, num_new, new, past_is_visible)

    def step_for(self, layer: int, keys: Tensor) -> Step:
        """Return the step that new keys of a layer belong to, planning one if no mask function did.

        Args:
            layer: its index.
            keys: `(num_rows, num_kv_heads, num_new, head_dim)`.
        """
        self.settle()
        num_rows, _, num_new, _ = keys.shape
        step = self.step
        if step is None or not any(self._written[index] for index in self._layers):
            if step is not None and self._is_planned and (num_rows, num_new) == (step.num_rows, step.num_new):
                return step
            # Another attention than paged_flex keeps its mask to itself, so that every column counts as a token.
            self._check_rows(num_rows, num_new)
            return self._begin(num_rows, num_new, None, True)
        if self._written[layer]:
            missing = [index for index in self._layers if not self._written[index]]
            raise ValueError(
                f"Layer {layer} was updated twice in one forward pass, but layers {missing} not yet. Update every "
                "layer once per pass; after a pass that failed, call cache.crop(0) first."
            )
        if (num_rows, num_new) != (step.num_rows, step.num_new):
            raise ValueError(
                f"Layer {layer} was given {num_new} tokens in {num_rows} rows, but this forward pass was planned for "
                f"{step.num_new} tokens in {step.num_rows} rows."
            )
        return step

    def note_written(self, layer: int) -> None:
        """Note that the step went through a layer."""
        self._written[layer] = True
        if not torch.compiler.is_compiling():
            self.settle()

    def begin_pass(self, layer: int) -> None:
        """Note that a forward pass begins, if it is a new one, by asking for the mask of a layer."""
        self.settle()
        self._is_planned = False
        if self.step is not None and self._written[layer]:
            self._abandon()  # the pass that wrote this layer did not get to its end

    def settle(self) -> None:
        """Make a step that went through all layers part of the rows."""
        step = self.step
        if step is not None and self._written[self._layers[-1]] and all(self._written):
            self.table.commit(step.counts)
            self.columns = self.columns.extended(step.new, step.num_rows, step.num_new)
            self.step = None

    def _check_rows(self, num_rows: int, num_new: int) -> None:
        if num_new < 1:
            raise ValueError(f"A forward pass needs at least one new token, but was given {num_new}.")
        if self.columns.count and num_rows != self.table.num_rows:
            raise ValueError(
                f"This cache holds {self.table.num_rows} rows, but a batch of {num_rows} was given. Use a new "
                "PagedCache, reset() this one, or batch_repeat_interleave() or batch_select_indices() its rows."
            )

    def _begin(self, num_rows: int, num_new: int, new: BoolMatrix | None, past_is_visible: bool) -> Step:
        self._abandon()
        is_empty = self.columns.count == 0
        if is_empty:
            self.table.open_rows(num_rows)
        counts = np.full(num_rows, num_new, dtype=np.int64) if new is None else new.sum(axis=1, dtype=np.int64)
        try:
            self.table.reserve(counts)
        except Exception:
            if is_empty:
                self.table.clear()
            raise
        self.step = Step(self.table, self.columns, num_new, new, past_is_visible)
        for layer in self._layers:
            self._written[layer] = False
        return self.step

    def _abandon(self) -> None:
        if self.step is not None:
            self.step.is_cancelled = True
            self.step = None
            self.table.rollback()
            if self.columns.count == 0:
                self.table.clear()

    # Between forward passes

    def rest(self) -> None:
        """Come to a state between two forward passes."""
        self.settle()
        self._abandon()

    def clear(self) -> None:
        """Release all pages and have no rows."""
        self.rest()
        self.table.clear()
        self.columns = Columns()

    def truncate(self, count: int) -> None:
        """Keep the first `count` columns."""
        self.rest()
        self.table.truncate(self.table.lengths - self.columns.num_tokens_after(count, self.table.num_rows))
        self.columns = self.columns.truncated(count)

    def select(self, indices: list[int]) -> None:
        """Let row `i` be what row `indices[i]` was.

        Raises:
            ValueError: if a row does not exist; nothing has changed.
        """
        self.rest()
        num_rows = self.table.num_rows
        if self.columns.count == 0:
            return  # as for Transformers' own caches
        wrong = [index for index in indices if not -num_rows <= index < num_rows]
        if wrong:
            raise ValueError(f"Rows {wrong} were asked for, but this cache holds {num_rows} rows.")
        indices = [index % num_rows for index in indices]
        self.table.select(indices)
        self.columns = self.columns.selected(indices)

    def become_fork_of(self, other: "Batch") -> None:
        """Hold what `other` holds, sharing its pages."""
        other.rest()
        self.clear()
        self.table = other.table.fork()
        self.tiling = Tiling(self.table)
        self.columns = other.columns

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """`(num_rows,)` tokens of each row, padding excluded, without those of a pass under way."""
        self.settle()
        return self.table.lengths if self.columns.count else self.table.lengths[:0]

    def gather(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """Copy a layer into the padded layout; `(None, None)` when empty.

        Returns:
            Keys and values, each `(num_rows, num_kv_heads, num_columns, head_dim)`, 0 where there was padding.
        """
        self.settle()
        storage = self.pool.storage(layer)
        if storage is None or self.columns.count == 0:
            return None, None
        return gather_columns(storage, self.table, self.columns)
