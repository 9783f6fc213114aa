"""What a cache holds between two forward passes: rows of tokens in pages, and their padded view."""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from torch import Tensor

from hf_paged.batch.known_ids import KnownIds
from hf_paged.batch.padding import BoolMatrix, Columns, Counts, gather_columns
from hf_paged.batch.recurrent.states import States
from hf_paged.batch.swapped import IdleRows, SwappedRows, host_of
from hf_paged.pages.block_table import BlockTable
from hf_paged.pages.pool import PagePool
from hf_paged.pages.stats import MemoryStats
from hf_paged.pages.views.memory_map import MemoryMap


class Rows:
    """Rows in the pages of a pool, and while a step is under way the room that it has reserved behind them.

    Rows that were swapped out, or may be, come back as soon as somebody asks for `tables`, which is the only way to
    their pages.

    Args:
        pool: where the pages are.

    Attributes:
        columns: which columns of the padded view are tokens.
        known_ids: which tokens they are, as far as that is known.
        states: what recurrent layers keep of them. They stay on the device when the pages are swapped out.
        absent: layers that hold none of the tokens, as the model passes over them.
        is_fanned_out: whether the step under way made several rows of one.
        origin: what made all keys and values of the rows, of causal attention and of positions that are their places,
            and nothing else; None if that is not known.
        is_plain: whether `generate()` or `prefill` made them so, whatever by; False if that is not known.
    """

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self._tables = [BlockTable(group) for group in pool.groups]
        self._swapped: SwappedRows | None = None  # while the tables hold nothing
        self._idle: IdleRows | None = None  # while others may touch the tables
        self.columns = Columns()
        self.known_ids = KnownIds()
        self.states = States(pool)
        self.absent: frozenset[int] = frozenset()
        self.is_fanned_out = False
        self.origin: Hashable | None = None
        self.is_plain = False

    @property
    def tables(self) -> list[BlockTable]:
        """Block tables, for each group of layers.

        Raises:
            OutOfPagesError: if the rows were swapped out, and the pool has too few pages; nothing has changed.
        """
        self.swap_in()
        return self._tables

    @property
    def count(self) -> int:
        """How many rows there are."""
        return len(self.lengths)

    @property
    def num_committed(self) -> int:
        """Rows without what a step under way made of them."""
        if self.columns.count == 0:
            return 0
        return 1 if self.is_fanned_out else self.count

    @property
    def lengths(self) -> Counts:
        """`(count,)` tokens of each row, padding excluded."""
        return (self._idle or self._swapped or self._tables[0]).lengths

    @property
    def holding_layers(self) -> list[int]:
        """The layers that hold the tokens."""
        return [layer for layer in sorted(self.pool.group_of_layer) if layer not in self.absent]

    @property
    def are_empty(self) -> bool:
        """Whether there are no tokens, and no padding either."""
        return self.columns.count == 0 and not self.lengths.any()

    def split(self, num_rows: int, num_new: int, mask: BoolMatrix | None) -> tuple[Columns, BoolMatrix | None, bool]:
        """Compare a padded batch with the rows; `Columns.split` says how.

        Args:
            num_rows: rows of the batch, which may be more than the one that is cached.
            num_new: new columns.
            mask: `(num_rows, num_columns)`, True for tokens; None without padding.

        Returns:
            The columns that are cached, as such a batch has them, `(num_rows, num_new)` which of the new ones are
            tokens, None for all, and whether every token that is cached may still be seen.

        Raises:
            ValueError: if they don't fit.
        """
        self.check_shape(num_rows, num_new)
        columns = self.columns_for(num_rows)
        return columns, *columns.split(mask, num_rows, num_new)

    def check_shape(self, num_rows: int, num_new: int) -> None:
        """Raise ValueError if a padded batch of this shape can't be new columns of these rows."""
        if num_new < 1:
            raise ValueError(f"A forward pass needs at least one new token, but was given {num_new}.")
        if self.columns.count and num_rows != self.num_committed and not self._fans_out(num_rows):
            raise ValueError(
                f"This cache holds {self.num_committed} rows, but a batch of {num_rows} was given. Use a new "
                "PagedCache, reset() this one, or batch_repeat_interleave() or batch_select_indices() its rows."
            )

    def _fans_out(self, num_rows: int) -> bool:
        return self.num_committed == 1 and num_rows > 1

    def columns_for(self, num_rows: int) -> Columns:
        """The columns as a batch of `num_rows` has them, which may be more than one cached row, or as many again."""
        columns = self.columns
        if columns.count == 0 or num_rows == self.count:
            return columns
        return columns.selected([0] * num_rows)

    def existing(self, indices: Sequence[int]) -> list[int]:
        """Return indices of rows that count from the beginning; raise ValueError if a row does not exist."""
        num_rows = self.num_committed
        wrong = [index for index in indices if not -num_rows <= index < num_rows]
        if wrong:
            raise ValueError(f"Rows {wrong} were asked for, but this cache holds {num_rows} rows.")
        return [index % num_rows for index in indices]

    def admit(self, num_rows: int) -> None:
        """Have `num_rows` rows, where there are none yet or one, as long as the step under way lasts."""
        if self.columns.count == 0:
            for table in self.tables:
                table.open_rows(num_rows)
        elif self._fans_out(num_rows):
            self.select([0] * num_rows)
            self.is_fanned_out = True

    def commit(self, counts: Counts, columns: Columns, *, is_plain: bool, hides_tokens: bool) -> None:
        """Hold the tokens of a step.

        Args:
            counts: `(count,)` how many each row got.
            columns: the padded view with them.
            is_plain: whether they see all tokens before them, or those in a window, and no others.
            hides_tokens: whether they are known not to.
        """
        if not is_plain:
            self.origin = None
        if hides_tokens:
            self.is_plain = False
        for table in self.tables:
            table.commit(counts)
        self.states.commit()
        self.columns = columns
        self.known_ids.end_pass()
        self.is_fanned_out = False

    def roll_back(self) -> None:
        """Give back the room that a step has reserved, and put back the states before it."""
        self.states.restore()
        self.known_ids.roll_back()
        for table in self.tables:
            table.roll_back()
            if self.columns.count == 0:
                table.clear()
        if self.is_fanned_out:
            self.select([0])
            self.is_fanned_out = False

    def clear(self) -> None:
        """Release all pages and have no rows."""
        self._wake()
        self._swapped = None
        for table in self._tables:
            table.clear()
        self.columns = Columns()
        self.known_ids = KnownIds()
        self.states.clear()
        self.absent = frozenset()
        self.origin = None
        self.is_plain = False

    def select(self, indices: Sequence[int]) -> None:
        """Let row `i` be what row `indices[i]` was."""
        for table in self.tables:
            table.select(indices)
        self.states.select(indices)
        self.columns = self.columns.selected(indices)
        self.known_ids.select(indices)

    def release(self, rows: Sequence[int]) -> None:
        """Give back the pages of rows that are finished, unless they have done so."""
        if not rows or (self.columns.released is not None and self.columns.released[list(rows)].all()):
            return
        for table in self.tables:
            table.release(rows)
        self.columns = self.columns.without(rows, self.count)

    def truncate(self, ends: Counts | int) -> None:
        """Keep the columns before the one of `ends`, `(count,)`, of each row, or of all.

        Raises:
            ValueError: if that takes what has left a window, or what a state can't forget; nothing has changed.
        """
        ends = np.broadcast_to(ends, self.count)
        self.states.check_truncation(self.columns.count, ends)
        kept = self.columns.num_tokens_before(ends[:, None], self.count)[:, 0]
        for table in self.tables:
            if table.group.window is None:
                continue
            first = self.columns.num_tokens_before(ends[:, None] + 1 - table.group.window, self.count)[:, 0]
            if (first < table.starts)[kept > 0].any():
                raise ValueError(
                    f"Taking {int((self.columns.count - ends).max())} tokens back would need tokens that have left "
                    f"the window of {table.group.window} and were dropped. Call cache.activate_past_recording() "
                    "before the passes that may be taken back."
                )
        for table in self.tables:
            table.truncate(kept)
        self.states.truncate(self.columns.count, ends)
        self.columns = self.columns.cut(ends)
        self.known_ids.truncate(self.columns.count)

    def keep(self, lengths: Counts, columns: Columns) -> None:
        """Keep the first tokens of each row, or of as many rows made of the one that there is.

        Args:
            lengths: `(num_rows,)` tokens, of which no window has dropped any that the next query sees.
            columns: where they stand from now on.
        """
        if len(lengths) != self.count:
            self.select([0] * len(lengths))
        for table in self.tables:
            table.truncate(lengths)
        self.columns = columns
        self.known_ids = KnownIds()

    def drop_past(self, ends: Counts | None = None) -> None:
        """Release the pages whose tokens no query will see any more, since they have left a window.

        Args:
            ends: `(count,)` the column of each row's next query; None: that behind the last one.
        """
        queries = np.array([self.columns.count]) if ends is None else ends[:, None]
        for table in self.tables:
            window = table.group.window
            if window is not None and self.columns.count >= window:
                starts = self.columns.num_tokens_before(queries + 1 - window, self.count)[:, 0]
                table.drop(table.group.first_kept(starts, table.lengths))

    @property
    def are_out(self) -> bool:
        """Whether they hold no page, as their content is in memory of the host, or may do so at any time."""
        return self._swapped is not None or self._idle is not None

    def swap_out(self) -> None:
        """Move the content of all pages to memory of the host.

        Raises:
            OutOfPagesError: if there is too little; nothing has changed.
            ValueError: if the pool has none; nothing has changed.
        """
        host = host_of(self.pool)
        self._wake()
        if self.columns.count and self._swapped is None:
            self._swapped = SwappedRows(self._tables, host)

    def set_idle(self) -> None:
        """Let others do so who run short of pages.

        Raises:
            ValueError: if the pool has no memory of the host; nothing has changed.
        """
        host = host_of(self.pool)
        if self.columns.count and not self.are_out:
            self._idle = IdleRows(self._tables, host)

    def swap_in(self) -> None:
        """Move the content back into pages.

        Raises:
            OutOfPagesError: if there are too few; nothing has changed.
        """
        self._wake()
        if self._swapped is not None:
            self._swapped.restore(self._tables)
            self._swapped = None

    def give_back(self) -> None:
        """Release all pages in a finaliser, which may run in the middle of anything."""
        if self._idle is not None:
            self._idle.abandon()
            return
        self._swapped = None
        self.states.clear()
        for table in self._tables:
            table.give_back()

    def stats(self) -> MemoryStats:
        """Account for the pages and bytes that the rows hold, and for those that they have on the host."""
        with self._awake():
            num_bytes = 0 if self._swapped is None else self._swapped.num_bytes
            return self.pool.account([[table] for table in self._tables], [self.states], num_bytes)

    def memory_map(self, width: int) -> MemoryMap:
        """Draw the pages that the rows hold, `width` on a line."""
        with self._awake():
            return MemoryMap.of(self._tables, width)

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """A context in which the tables are left alone."""
        idle = self._idle
        self._wake()
        yield
        if idle is not None and self._swapped is None:
            self._idle = idle
            idle.offer()

    def _wake(self) -> None:
        if self._idle is not None:
            self._swapped, self._idle = self._idle.withdraw(), None

    def fork(self) -> "Rows":
        """Return rows that hold the same, sharing the pages."""
        other = Rows.__new__(Rows)
        other.pool = self.pool
        other._swapped = other._idle = None
        other._tables = [table.fork() for table in self.tables]
        other.columns = self.columns
        other.known_ids = self.known_ids.fork()
        other.states = self.states.fork(self.pool)
        other.absent = self.absent
        other.is_fanned_out = False
        other.origin = self.origin
        other.is_plain = self.is_plain
        return other

    def join(self, parts: Sequence["Rows"]) -> None:
        """Hold the rows of forks, one after another, sharing the pages; the shorter ones are padded on the left.

        Args:
            parts: that hold rows, of this pool; at least one.
        """
        for table, *others in zip(self.tables, *(part.tables for part in parts), strict=True):
            table.open_rows(sum(other.num_rows for other in others))
            row = 0
            for other in others:
                for index in range(other.num_rows):
                    pages = other.row_pages(index)
                    table.group.allocator.retain(pages)
                    table.adopt(row, pages, int(other.starts[index]), int(other.lengths[index]))
                    row += 1
        self.columns = Columns.joined([(part.columns, part.count) for part in parts])
        self.known_ids.join([(part.known_ids, part.columns, part.count) for part in parts])
        self.states.join([part.states for part in parts])
        self.absent = parts[0].absent
        origins = {part.origin for part in parts}
        self.origin = origins.pop() if len(origins) == 1 else None
        self.is_plain = all(part.is_plain for part in parts)

    def drop_padding(self) -> None:
        """Leave out the columns at the beginning in which no row has a token, but keep one column at least."""
        real = self.columns.real
        if real is not None:
            count = int((~np.logical_or.accumulate(real[:, :-1].any(axis=0))).sum())
            self.columns = self.columns.without_first(count)
            self.known_ids.without_first(count)

    def supersede(self, other: "Rows") -> None:
        """Write behind the tokens of `other` in the pages that both hold, as `other` won't do any more."""
        for table, superseded in zip(self.tables, other.tables, strict=True):
            table.supersede(superseded)

    def first_column(self, layer: int) -> int:
        """The first column that the next query of a layer sees."""
        window = self.pool.layers[layer].window
        return 0 if window is None else max(0, self.columns.count + 1 - window)

    def copied(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """Copy a layer into the padded layout; `(None, None)` when empty.

        Returns:
            Keys and values, each `(num_rows, num_kv_heads, num_columns, head_dim)`, 0 where there was padding. Layers
            with a window begin at the first column that the next query sees.
        """
        storage = self.pool.storage(layer)
        if storage is None or self.columns.count == 0 or layer in self.absent:
            return None, None
        table = self.tables[self.pool.group_of_layer[layer]]
        keys, values = gather_columns(storage, table, self.columns, self.first_column(layer))
        return keys[: self.num_committed], values[: self.num_committed]
