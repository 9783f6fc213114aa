"""The rows of one cache, and the forward pass that they are in."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_paged._torch.surroundings import check_surroundings
from hf_paged.batch.edits import Edits
from hf_paged.batch.known_ids import KnownIds
from hf_paged.batch.padded_step import PaddedStep
from hf_paged.batch.padding import BoolMatrix, Columns, Counts, gather_columns
from hf_paged.batch.routine import Routine
from hf_paged.batch.shared import SharedStates
from hf_paged.batch.step import Step
from hf_paged.errors import UnclearPassError
from hf_paged.pages.block_table import BlockTable
from hf_paged.pages.pool import PagePool
from hf_paged.pages.storage import LayerStorage


class Sequences:
    """Rows, their padded view, and the step under way.

    A step is planned before the first layer and becomes part of the rows when the last layer was written. Layers that
    the model passes over, as it has been cut or changed, hold nothing. A pass that stops before the last layer has
    failed, or belongs to a model without the layers behind: nothing here can tell, so the next pass is refused until
    `roll_back` says that it failed. What fails in here is rolled back at once.

    Args:
        pool: where the pages are.

    Attributes:
        num_layers: layers that the model has, which may be fewer than the pool's.
    """

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.num_layers = len(pool.layers)
        self.tables = [BlockTable(group) for group in pool.groups]
        self.columns = Columns()
        self.edits = Edits()
        self._shared: WeakSet[SharedStates] = WeakSet()
        self.known_ids = KnownIds()
        self.step: Step | None = None
        self._layers = sorted(pool.group_of_layer)
        self._is_planned = False  # whether a mask function of ours has planned the pass under way
        self._is_fanned_out = False  # whether the pass under way made several rows of one
        self._captured_layers: list[int] | None = None  # layers of the pass under way, if it is only recorded
        self._records_past = False
        self._absent: frozenset[int] = frozenset()  # layers that hold none of the tokens
        self._missing: set[int] = set()  # layers that the step under way has not written yet
        self._last_written = self._last_awaited = -1  # the last layer that it has written, and will have at its end
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
    def holding_layers(self) -> list[int]:
        """The layers that hold the tokens."""
        return [layer for layer in self._layers if layer not in self._absent]

    @property
    def records_past(self) -> bool:
        """Whether tokens that have left a window are kept until `truncate` or `rest`."""
        return self._records_past

    @records_past.setter
    def records_past(self, value: bool) -> None:
        self.settle()
        self._records_past = value

    # One forward pass

    def reserve(
        self,
        num_rows: int,
        num_new: int,
        attention_mask: Tensor | None,
        *,
        num_layers: int | None = None,
        reads_pages: bool = True,
    ) -> Step:
        """Plan a forward pass: check it, reserve its pages, and say which slots its tokens go to.

        Args:
            num_rows: rows of the batch. One row that is cached makes as many rows of itself.
            num_new: new columns.
            attention_mask: `(num_rows, num_columns)`, 0 for padding; None without padding.
            num_layers: layers that the model has by its configuration; None if that is not known.
            reads_pages: whether attention reads pages in place, if any are filled; else it is handed a copy.

        Raises:
            OutOfPagesError: if the pool has too few pages; nothing has changed. Where rows may turn out to be equal,
                it is raised by the first layer instead, before anything is written.
            ValueError: if rows, mask or layers don't fit what is cached; nothing has changed.
        """
        check_surroundings()
        self.absorb()
        self._check_rows(num_rows, num_new)
        if num_layers is not None and num_layers > len(self.pool.layers):
            raise ValueError(
                f"A model of {num_layers} layers was given a PagedCache that was made for a model of "
                f"{len(self.pool.layers)} layers. Make a PagedCache for this model."
            )
        mask = None if attention_mask is None else attention_mask.bool().cpu().numpy()
        new, past_is_visible = self._columns_for(num_rows).split(mask, num_rows, num_new)
        self._is_planned = True
        if self.step is not None and self.step.matches(num_rows, num_new, new):
            return self.step  # another mask of the same pass
        return self._begin(num_rows, num_new, new, past_is_visible, reads_pages, num_layers)

    def step_for(self, layer: int, keys: Tensor, values: Tensor) -> Step:
        """Return the step that new keys of a layer belong to, planning one if no mask function did.

        Args:
            layer: its index.
            keys: `(num_rows, num_kv_heads, num_new, head_dim)`.
            values: like `keys`.
        """
        self._commit()
        num_rows, _, num_new, _ = keys.shape
        if self.step is not None and layer not in self._missing and self._last_written >= self._last_awaited:
            self._end_pass()
        if self.step is None:
            self.absorb()
        step = self.step
        if layer in self._absent:
            raise ValueError(
                f"Layer {layer} was given new tokens, but it holds none of those that are cached: the passes before "
                "left it out. When the layers of a model are changed, use a new PagedCache, or reset() this one."
            )
        if step is None or self._last_written < 0:
            is_ours = step is not None and self._is_planned and (num_rows, num_new) == (step.num_rows, step.num_new)
            if step is None or not is_ours:
                # Another attention than paged_flex keeps its mask to itself, so that every column counts as a token.
                check_surroundings()
                self._check_rows(num_rows, num_new)
                new = self._columns_for(num_rows).without_released(None, num_rows, num_new)
                step = self._begin(num_rows, num_new, new, True, False, None)
        elif layer not in self._missing:
            missing = sorted(self._missing)
            raise UnclearPassError(
                f"Layer {layer} was updated twice in one forward pass, but layers {missing} not yet. Update every "
                "layer once per pass; after a pass that failed, call cache.roll_back() first. What an encoder says "
                "needs a cache of its own: use PagedEncoderDecoderCache."
            )
        elif (num_rows, num_new) != (step.num_rows, step.num_new):
            raise ValueError(
                f"Layer {layer} was given {num_new} tokens in {num_rows} rows, but this forward pass was planned for "
                f"{step.num_new} tokens in {step.num_rows} rows."
            )
        step.settle_duplicates(keys, values)
        return step

    def note_written(self, layer: int) -> None:
        """Note that the step went through a layer."""
        if self._captured_layers is not None:
            self._captured_layers.append(layer)
            return
        self._missing.discard(layer)
        self._last_written = max(layer, self._last_written)
        self._commit()

    def is_past(self, layer: int) -> bool:
        """Whether a pass is under way that has written a layer."""
        return self.step is not None and layer not in self._missing | self._absent

    @contextmanager
    def capturing(self) -> Iterator[list[int]]:
        """Let a pass be made that writes nothing, as its step is still to come; give the layers it goes through."""
        self._captured_layers = []
        try:
            yield self._captured_layers
        finally:
            self._captured_layers = None

    @property
    def has_written_nothing(self) -> bool:
        """Whether no layer has written the step under way, which is no rehearsal."""
        return self._captured_layers is None and self._last_written < 0

    @property
    def is_untouched(self) -> bool:
        """Whether a pass is planned whose layers are going to be written by `write`, and none was yet."""
        return self.is_written_by_attention and self._last_written < 0

    @property
    def is_written_by_attention(self) -> bool:
        """Whether the attention function of a compiled graph is going to call `write`, so that `update` need not."""
        return self.step is not None and self._is_planned

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
        group = self.pool.group_of_layer[layer]
        routine = self._routines.get(group)
        result = None
        try:
            if self.edits.copies and self.step is not None:
                self.edits.check_untouched(layer)
            if routine is not None and layer in self._missing:
                result = routine.write(layer, keys, values)
            if result is None:
                storage = self.pool.open_storage(layer, keys, values)
                step = self.step_for(layer, keys, values)
                step.write(group, storage, keys, values)
                result = step.read(group, storage, keys, values)
                if group not in self._routines and Routine.begins(step, group, storage):
                    self._routines[group] = Routine(step, group, self._alike(group, keys, values), keys, values)
        except UnclearPassError:
            raise
        except BaseException:
            self.roll_back()
            raise
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

    def awaits(self, layer: int) -> bool:
        """Whether a layer is still to be written in the pass under way."""
        return self.step is not None and layer in self._missing

    def _alike(self, group: int, keys: Tensor, values: Tensor) -> dict[int, LayerStorage]:
        """Storages of a group's layers that are still to be written, where keys and values like these fit in."""
        layers = self._missing.intersection(self.pool.groups[group].layers)
        storages = {layer: storage for layer in layers if (storage := self.pool.storage(layer)) is not None}
        return {layer: storage for layer, storage in storages.items() if storage.fits(keys, values)}

    def begin_pass(self, layer: int) -> None:
        """Note that a forward pass begins, if it is a new one, by asking for the mask of a layer.

        Raises:
            ValueError: if it can't be told whether the pass before has failed; nothing has changed.
        """
        self.absorb()
        self._is_planned = False
        if self.step is not None and layer <= self._last_written:
            self._end_pass()

    def settle(self) -> None:
        """Make a step that is over part of the rows: it went through all layers.

        After the first pass the last layer says that those that were not written are passed over.
        """
        if self.step is not None and self._last_written >= self._last_awaited and self._is_empty:
            self._absent = frozenset(self._missing)
            self._missing.clear()
        self._commit()

    def _commit(self) -> None:
        step = self.step
        if step is not None and not self._missing:
            self._routines.clear()
            for table in self.tables:
                table.commit(step.counts)
            self.columns = step.next_columns
            self.edits.copies.clear()  # they are out of date
            self.known_ids.end_pass()
            self.step = None
            self._is_fanned_out = False

    def roll_back(self, step: Step | None = None) -> None:
        """Forget a pass that did not go through all layers.

        Args:
            step: do so only if it is this one.
        """
        if step is None:
            self.settle()
        self._commit()
        if step is None or step is self.step:
            self._abandon()

    def take_back(self, num_new: int) -> None:
        """Forget a pass over `num_new` columns that goes on behind the last layer."""
        if self.step is not None:
            self.roll_back()
        elif self.columns.count == num_new:
            self.clear()
        else:
            self.truncate(self.columns.count - num_new)

    def _end_pass(self) -> None:
        """Forget the pass under way if it wrote nothing, since another one begins.

        Raises:
            UnclearPassError: if it wrote something: whether it has failed can't be told; nothing has changed.
        """
        self.settle()
        if self.step is None or self._last_written < 0:
            self._abandon()
        elif self._last_written < self._last_awaited:
            raise UnclearPassError(
                f"The forward pass before went through layer {self._last_written} and no further, but this cache was "
                f"made for a model with {len(self.pool.layers)} layers. If that pass failed, call cache.roll_back() "
                "to forget it. If the model ends there, make its cache by PagedCache.from_model(model) after its "
                "layers are cut off."
            )
        else:
            raise UnclearPassError(
                f"The forward pass before left out layers {sorted(self._missing)}, which hold the tokens before it. "
                "Call cache.roll_back() to forget that pass; when the layers of a model are changed, use a new "
                "PagedCache, or reset() this one."
            )

    @property
    def _is_empty(self) -> bool:
        return self.columns.count == 0 and not self.tables[0].lengths.any()

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

    def _begin(
        self,
        num_rows: int,
        num_new: int,
        new: BoolMatrix | None,
        past_is_visible: bool,
        reads_pages: bool,
        num_layers: int | None,
    ) -> Step:
        self._end_pass()
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
        self._await_layers(num_layers)
        return self.step

    def _await_layers(self, num_layers: int | None) -> None:
        """Begin to note which layers are written, of a model that has so many; None: as many as ever."""
        if self._is_empty:
            self._absent = frozenset()
        self._missing = set(self._layers) - self._absent
        end = min(num_layers or self.num_layers, self.num_layers) if self._is_empty else len(self.pool.layers)
        self._last_awaited = max((layer for layer in self._missing if layer < end), default=self._layers[-1])
        self._last_written = -1

    def _abandon(self) -> None:
        if self._shared:
            self._copy_shared()
        if self.step is not None:
            self.step.is_cancelled = True
            self.step = None
            self._missing.clear()
            self._routines.clear()
            self._undo()

    def _undo(self) -> None:
        self.known_ids.abandon_pass()
        for table in self.tables:
            table.rollback()
            if self.columns.count == 0:
                table.clear()
        if self._is_fanned_out:
            self._select([0])
            self._is_fanned_out = False

    # Between forward passes

    def rest(self) -> None:
        """Come to a state between two forward passes.

        Raises:
            UnclearPassError: if it can't be told whether the last one has failed; nothing has changed.
        """
        self._end_pass()
        self.tidy()

    def clear(self) -> None:
        """Release all pages and have no rows."""
        self.edits.copies.clear()
        self.roll_back()
        self._absent = frozenset()
        for table in self.tables:
            table.clear()
        self.columns = Columns()
        self.known_ids = KnownIds()

    def truncate(self, count: int, *, keeps_past: bool = False) -> None:
        """Keep the first `count` columns, and drop what no query will see any more, unless `keeps_past`.

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
        self.known_ids.truncate(count)
        if not keeps_past:
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
        other = Sequences(self.pool)
        other.num_layers = max(states) + 1
        try:
            other.reserve(num_rows, count, mask)
            for layer, pair in states.items():
                keys, values = (pad(tensor, (0, 0, count - tensor.shape[2], 0)) for tensor in pair)
                other.write(layer, keys, values)
            self.exchange(other)
        finally:
            other.clear()
        if released is not None:
            self.columns = self.columns.without(np.flatnonzero(released).tolist(), num_rows)

    def become_fork_of(self, other: "Sequences") -> None:
        """Hold what `other` holds, sharing its pages."""
        other.rest()
        self.clear()
        self.tables = [table.fork() for table in other.tables]
        self.columns = other.columns
        self.known_ids = other.known_ids.fork()
        self._records_past = other._records_past
        self.num_layers, self._absent = other.num_layers, other._absent

    def supersede(self, other: "Sequences") -> None:
        """Write behind the tokens of `other` in the pages that both hold, as `other` won't do any more."""
        for table, superseded in zip(self.tables, other.tables, strict=True):
            table.supersede(superseded)

    def exchange(self, other: "Sequences") -> None:
        """Hold what `other` holds, and let it hold what this does."""
        self.tables, other.tables = other.tables, self.tables
        self.columns, other.columns = other.columns, self.columns
        self._absent, other._absent = other._absent, self._absent
        self.known_ids, other.known_ids = other.known_ids, self.known_ids

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
        if storage is None or self.columns.count == 0 or layer in self._absent:
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
        self.known_ids.select(indices)
