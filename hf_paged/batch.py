"""The rows of one cache, and the forward pass that they are in."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_paged.columns import BoolMatrix, Columns, Counts
from hf_paged.edits import Edits
from hf_paged.gather import gather_columns
from hf_paged.kernel import repacks_storage
from hf_paged.page_table import PageTable
from hf_paged.pool import PagePool
from hf_paged.routine import Routine
from hf_paged.shared import SharedStates
from hf_paged.step import PaddedStep, Step
from hf_paged.storage import LayerStorage
from hf_paged.tiling import Tiling


class Batch:
    """Rows, their padded view, and the step under way.

    A step is planned before the first layer and becomes part of the rows when the last layer was written. A pass that
    fails before that leaves no trace: the next one starts from what there was.

    Args:
        pool: where the pages are.
    """

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.tables = [PageTable(group) for group in pool.groups]
        self.tilings = {table: Tiling(table) for table in self.tables}
        self.columns = Columns()
        self.edits = Edits()
        self._shared: WeakSet[SharedStates] = WeakSet()
        self.step: Step | None = None
        self._layers = sorted(pool.group_of_layer)
        self._all_layers_store = len(self._layers) == pool.config.num_hidden_layers
        self._is_planned = False  # whether a mask function of ours has planned the pass under way
        self._is_fanned_out = False  # whether the pass under way made several rows of one
        self._is_rehearsing = False  # whether the pass under way is only recorded
        self._records_past = False
        self._missing: set[int] = set()  # layers that the step under way has not written yet
        self._routines: dict[int, Routine] = {}  # how to write the others of a group, once one is written

    @property
    def num_rows(self) -> int:
        """Rows of the batch."""
        return self.tables[0].num_rows

    @property
    def lengths(self) -> Counts:
        """`(num_rows,)` tokens of each row, padding excluded, without those of a pass under way."""
        self.absorb()
        return self.tables[0].lengths[: self._num_settled]

    @property
    def _num_settled(self) -> int:
        """Rows without what a pass under way made of them."""
        if self.columns.count == 0:
            return 0
        return 1 if self._is_fanned_out else self.num_rows

    @property
    def records_past(self) -> bool:
        """Whether tokens that have left a window are kept until `truncate` or `rest`."""
        return self._records_past

    @records_past.setter
    def records_past(self, value: bool) -> None:
        self.settle()
        self._records_past = value

    # One forward pass

    def plan(self, num_rows: int, num_new: int, attention_mask: Tensor | None) -> Step:
        """Plan a forward pass: check it, reserve its pages, and say which slots its tokens go to.

        Args:
            num_rows: rows of the batch. One row that is cached makes as many rows of itself.
            num_new: new columns.
            attention_mask: `(num_rows, num_columns)`, 0 for padding; None without padding.

        Raises:
            OutOfPagesError: if the pool has too few pages; nothing has changed. Where rows may turn out to be equal,
                it is raised by the first layer instead, before anything is written.
            ValueError: if rows or mask don't fit what is cached; nothing has changed.
        """
        self.absorb()
        self._check_rows(num_rows, num_new)
        mask = None if attention_mask is None else attention_mask.bool().cpu().numpy()
        new, past_is_visible = self._columns_for(num_rows).split(mask, num_rows, num_new)
        self._is_planned = True
        if self.step is not None and self.step.matches(num_rows, num_new, new):
            return self.step  # another mask of the same pass
        return self._begin(num_rows, num_new, new, past_is_visible, reads_pages=self._reads_pages(num_new))

    def step_for(self, layer: int, keys: Tensor, values: Tensor) -> Step:
        """Return the step that new keys of a layer belong to, planning one if no mask function did.

        Args:
            layer: its index.
            keys: `(num_rows, num_kv_heads, num_new, head_dim)`.
            values: like `keys`.
        """
        self.absorb()
        num_rows, _, num_new, _ = keys.shape
        step = self.step
        if step is None or len(self._missing) == len(self._layers):
            is_ours = step is not None and self._is_planned and (num_rows, num_new) == (step.num_rows, step.num_new)
            if step is None or not is_ours:
                # Another attention than paged_flex keeps its mask to itself, so that every column counts as a token.
                self._check_rows(num_rows, num_new)
                new = self._columns_for(num_rows).without_released(None, num_rows, num_new)
                step = self._begin(num_rows, num_new, new, True, reads_pages=False)
        elif layer not in self._missing:
            missing = sorted(self._missing)
            raise ValueError(
                f"Layer {layer} was updated twice in one forward pass, but layers {missing} not yet. Update every "
                "layer once per pass; after a pass that failed, call cache.crop(0) first."
            )
        elif (num_rows, num_new) != (step.num_rows, step.num_new):
            raise ValueError(
                f"Layer {layer} was given {num_new} tokens in {num_rows} rows, but this forward pass was planned for "
                f"{step.num_new} tokens in {step.num_rows} rows."
            )
        step.settle_twins(keys, values)
        return step

    def note_written(self, layer: int) -> None:
        """Note that the step went through a layer."""
        if not self._is_rehearsing:
            self._missing.discard(layer)
            self.settle()

    def note_all_written(self) -> None:
        """Note that the step went through all layers."""
        self._missing.clear()
        self.settle()

    def is_past(self, layer: int) -> bool:
        """Whether a pass is under way that has written a layer."""
        return self.step is not None and layer not in self._missing

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """Let a pass be made that writes nothing: its step is still to come."""
        self._is_rehearsing = True
        try:
            yield
        finally:
            self._is_rehearsing = False

    @property
    def is_untouched(self) -> bool:
        """Whether a pass is planned whose layers are all going to be written by `write`, and none was yet."""
        return self.is_written_by_attention and len(self._missing) == len(self._layers)

    @property
    def is_written_by_attention(self) -> bool:
        """Whether the attention function of a compiled graph is going to call `write`, so that `update` need not."""
        return self.step is not None and self._is_planned and self._all_layers_store

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new tokens of a layer and return what its attention function is to be handed.

        Args:
            layer: its index.
            keys: `(num_rows, num_kv_heads, num_new, head_dim)`.
            values: like `keys`.

        Raises:
            OutOfPagesError: if the tokens don't fit; nothing is written.
            ValueError: if shapes, dtype or device don't fit; nothing is written.
        """
        if self.edits.copies and self.step is not None:
            self.edits.check_untouched(layer)
        group = self.pool.group_of_layer[layer]
        routine = self._routines.get(group)
        result = None
        if routine is not None and layer in self._missing:
            result = routine.write(layer, keys, values)
        if result is None:
            storage = self.pool.open_storage(layer, keys, values)
            step = self.step_for(layer, keys, values)
            step.write(group, storage, keys, values)
            result = step.read(group, storage, keys, values)
            if group not in self._routines and Routine.begins(step, group, storage):
                self._routines[group] = Routine(step, group, self._alike(group, keys, values), keys, values)
        self.note_written(layer)
        return result

    def share(self, step: Step, layer: int, pages: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return what stands for the pages of a layer that was written in `step`, and for a copy where need be."""
        group = self.pool.group_of_layer[layer]
        storage = self.pool.storage(layer)
        if storage is None or not isinstance(step, PaddedStep):
            return pages
        states = SharedStates(step, step.placements[group].table, storage, pages)
        self._shared.add(states)
        return states.tensors()

    def _copy_shared(self) -> None:
        """Copy what is still shared of the last pass, as pages are about to change."""
        for states in list(self._shared):
            states.part()
        self._shared.clear()

    def _alike(self, group: int, keys: Tensor, values: Tensor) -> dict[int, LayerStorage]:
        """Storages of a group's layers that are still to be written, where keys and values like these fit in."""
        layers = self._missing.intersection(self.pool.groups[group].layers)
        storages = {layer: storage for layer in layers if (storage := self.pool.storage(layer)) is not None}
        return {layer: storage for layer, storage in storages.items() if storage.fits(keys, values)}

    def begin_pass(self, layer: int) -> None:
        """Note that a forward pass begins, if it is a new one, by asking for the mask of a layer."""
        self.absorb()
        self._is_planned = False
        if self.step is not None and layer not in self._missing:
            self._abandon()  # the pass that wrote this layer did not get to its end

    def settle(self) -> None:
        """Make a step that went through all layers part of the rows."""
        step = self.step
        if step is not None and not self._missing:
            self._routines.clear()
            for table in self.tables:
                table.commit(step.counts)
            self.columns = step.next_columns
            self.edits.copies.clear()  # they are out of date
            self.step = None
            self._is_fanned_out = False

    def absorb(self) -> None:
        """Settle, and let the pages hold what was done to copies of them, unless a pass is under way."""
        self.settle()
        if self.edits.copies and self.step is None:
            self._copy_shared()
            self.edits.absorb(self)

    def tidy(self) -> None:
        """Absorb, and release what has left a window, unless it is recorded or a pass is under way."""
        self.absorb()
        if self.step is None and not self._records_past:
            if self._shared:
                self._copy_shared()
            self._drop_past()

    def _drop_past(self) -> None:
        # Not as soon as a step is settled: the attention of its last layer is still to come.
        for table in self.tables:
            window = table.group.window
            if window is not None and self.columns.count >= window:
                first = np.array([self.columns.count + 1 - window])
                table.drop(self.columns.num_tokens_before(first, self.num_rows)[:, 0])

    def _check_rows(self, num_rows: int, num_new: int) -> None:
        if num_new < 1:
            raise ValueError(f"A forward pass needs at least one new token, but was given {num_new}.")
        if self.columns.count and num_rows != self._num_settled and not self._fans_out(num_rows):
            raise ValueError(
                f"This cache holds {self._num_settled} rows, but a batch of {num_rows} was given. Use a new "
                "PagedCache, reset() this one, or batch_repeat_interleave() or batch_select_indices() its rows."
            )

    def _fans_out(self, num_rows: int) -> bool:
        return self._num_settled == 1 and num_rows > 1

    def _columns_for(self, num_rows: int) -> Columns:
        """The columns as a batch of `num_rows` has them, which may be more than one cached row, or as many again."""
        if self.columns.count == 0 or num_rows == self.num_rows:
            return self.columns
        return self.columns.selected([0] * num_rows)

    def _reads_pages(self, num_new: int) -> bool:
        """Whether FlexAttention reads the pages in place; else SDPA is handed a copy, layer by layer."""
        storage = self.pool.storage(self._layers[0])
        # Where tiles must be small, many queries are SDPA's.
        return num_new == 1 or storage is None or not repacks_storage(storage.dtype, storage.device)

    def _begin(
        self, num_rows: int, num_new: int, new: BoolMatrix | None, past_is_visible: bool, reads_pages: bool
    ) -> Step:
        self._abandon()
        self.tidy()
        if self.columns.count == 0:
            for table in self.tables:
                table.open_rows(num_rows)
        elif self._fans_out(num_rows):
            self._select([0] * num_rows)
            self._is_fanned_out = True
        try:
            self.step = PaddedStep(
                self.tables, self.columns, num_new, new, past_is_visible, reads_pages, self._records_past
            )
        except Exception:
            self._undo()
            raise
        self._missing.update(self._layers)
        return self.step

    def _abandon(self) -> None:
        if self._shared:
            self._copy_shared()
        if self.step is not None:
            self.step.is_cancelled = True
            self.step = None
            self._routines.clear()
            self._undo()

    def _undo(self) -> None:
        for table in self.tables:
            table.rollback()
            if self.columns.count == 0:
                table.clear()
        if self._is_fanned_out:
            self._select([0])
            self._is_fanned_out = False

    # Between forward passes

    def rest(self) -> None:
        """Come to a state between two forward passes."""
        self.settle()
        self._abandon()
        self.tidy()

    def clear(self) -> None:
        """Release all pages and have no rows."""
        self.edits.copies.clear()
        self.rest()
        for table in self.tables:
            table.clear()
        self.columns = Columns()

    def truncate(self, count: int) -> None:
        """Keep the first `count` columns, and drop what no query will see any more.

        Raises:
            ValueError: if that takes tokens which have left a window; nothing has changed.
        """
        self.rest()
        kept = self.columns.num_tokens_before(np.array([count]), self.num_rows)[:, 0]
        for table in self.tables:
            if table.group.window is None or count == 0:
                continue
            first = self.columns.num_tokens_before(np.array([count + 1 - table.group.window]), self.num_rows)[:, 0]
            if (first < table.starts).any():
                raise ValueError(
                    f"Taking {self.columns.count - count} tokens back would need tokens that have left the window of "
                    f"{table.group.window} and were dropped. Call cache.activate_past_recording() before the passes "
                    "that may be taken back."
                )
        for table in self.tables:
            table.truncate(kept)
        columns = self.columns.truncated(count)
        self.edits.copies = self.edits.truncated(self, columns)
        self.columns = columns
        self._drop_past()

    def select(self, indices: Sequence[int]) -> None:
        """Let row `i` be what row `indices[i]` was.

        Raises:
            ValueError: if a row does not exist; nothing has changed.
        """
        self.rest()
        if self.columns.count:  # else as for Transformers' own caches
            self._select(self._existing(indices))

    def release(self, rows: Sequence[int]) -> None:
        """Give back the pages of rows that are finished.

        Raises:
            ValueError: if a row does not exist; nothing has changed.
        """
        self.rest()
        rows = sorted(set(self._existing(rows)))
        if not rows:
            return
        for table in self.tables:
            table.release(rows)
        self.columns = self.columns.without(rows, self.num_rows)

    def replace(self, states: dict[int, tuple[Tensor, Tensor]], num_rows: int, count: int) -> None:
        """Hold other keys and values; rows that were released stay so.

        Args:
            states: for each layer keys and values, each `(num_rows, num_kv_heads, num_columns, head_dim)`, the last
                columns of `count` or all of them.
            num_rows: rows from now on.
            count: columns from now on, all of them tokens.

        Raises:
            OutOfPagesError: if they don't fit into the pool beside what is held; nothing has changed.
            ValueError: if rows were released and their number changes; nothing has changed.
        """
        released = self.columns.released
        if released is not None and len(released) != num_rows:
            raise ValueError(
                f"Keys and values of {num_rows} rows were assigned to a cache of {len(released)} rows, some of them "
                "released. Choose rows by batch_select_indices() first."
            )
        mask = None if released is None else torch.from_numpy(~released)[:, None].expand(-1, count)
        other = Batch(self.pool)
        try:
            other.plan(num_rows, count, mask)
            for layer, pair in states.items():
                keys, values = (pad(tensor, (0, 0, count - tensor.shape[2], 0)) for tensor in pair)
                other.write(layer, keys, values)
            self.exchange(other)
        finally:
            other.clear()
        if released is not None:
            self.columns = self.columns.without(np.flatnonzero(released).tolist(), num_rows)

    def become_fork_of(self, other: "Batch") -> None:
        """Hold what `other` holds, sharing its pages."""
        other.rest()
        self.clear()
        self.tables = [table.fork() for table in other.tables]
        self.tilings = {table: Tiling(table) for table in self.tables}
        self.columns = other.columns
        self._records_past = other._records_past

    def exchange(self, other: "Batch") -> None:
        """Hold what `other` holds, and let it hold what this does."""
        self.tables, other.tables = other.tables, self.tables
        self.tilings, other.tilings = other.tilings, self.tilings
        self.columns, other.columns = other.columns, self.columns

    def gather(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """Copy a layer into the padded layout; `(None, None)` when empty.

        Returns:
            Keys and values, each `(num_rows, num_kv_heads, num_columns, head_dim)`, 0 where there was padding. Layers
            with a window begin at the first column that the next query sees.

        Raises:
            ValueError: if keys or values of another shape were assigned to some layers and not to all.
        """
        self.absorb()
        return self.copied(layer)

    def copied(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """As `gather`, without what was done to earlier copies."""
        storage = self.pool.storage(layer)
        if storage is None or self.columns.count == 0:
            return None, None
        table = self.tables[self.pool.group_of_layer[layer]]
        keys, values = gather_columns(storage, table, self.columns, self.first_column(layer))
        return keys[: self._num_settled], values[: self._num_settled]

    def count(self, layer: int) -> int:
        """Columns before the forward pass under way; of a layer alone, where not all have been assigned yet."""
        self.settle()
        if not self.edits.copies or self.step is not None:
            return self.columns.count
        return self.edits.count(self, layer)

    def first_column(self, layer: int) -> int:
        """The first column that the next query of a layer sees."""
        window = self.pool.layers[layer].window
        return 0 if window is None else max(0, self.columns.count + 1 - window)

    def _existing(self, indices: Sequence[int]) -> list[int]:
        num_rows = self._num_settled
        wrong = [index for index in indices if not -num_rows <= index < num_rows]
        if wrong:
            raise ValueError(f"Rows {wrong} were asked for, but this cache holds {num_rows} rows.")
        return [index % num_rows for index in indices]

    def _select(self, indices: list[int]) -> None:
        for table in self.tables:
            table.select(indices)
        self.columns = self.columns.selected(indices)
