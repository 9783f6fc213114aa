"""Rows whose new tokens come packed: one after another, without padding, in chunks."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor
from typing_extensions import override

from hf_paged.batch.duplicates import equal_rows
from hf_paged.batch.padding import BoolMatrix, Columns, Counts
from hf_paged.batch.sequences import Sequences
from hf_paged.batch.step import KVRanges, Placement, Step, View
from hf_paged.pages.block_table import BlockTable

_OWN_WAY = "it makes a pass of its own while it is given a packed one"


class NotPackable(ValueError):
    """Raised where a prompt can't be computed packed; it says why, as the end of a sentence."""


@dataclass(frozen=True)
class Chunk:
    """Some of the new tokens of all rows.

    Attributes:
        ids: `(num_tokens,)` the tokens.
        rows: `(num_tokens,)` the row of each, ascending.
        columns: `(num_tokens,)` its column.
        places: `(num_tokens,)` its place in its row, which is its position.
    """

    ids: Counts
    rows: Counts
    columns: Counts
    places: Counts


class Packing:
    """The new tokens of a padded batch, row after row.

    Args:
        columns: the padded view before them.
        next_columns: and after them.
        lengths: `(num_rows,)` tokens of each row before them.
        ids: `(num_rows, num_new)` what is in the new columns.
        is_new: like `ids`, True for tokens.
    """

    def __init__(
        self, columns: Columns, next_columns: Columns, lengths: Counts, ids: Counts, is_new: BoolMatrix
    ) -> None:
        self.next_columns = next_columns
        self._lengths = lengths
        rows, new_columns = np.nonzero(is_new)
        counts = is_new.sum(axis=1)
        self._ends = counts.cumsum()
        self._begins = self._ends - counts
        places = self._place(rows, np.arange(len(rows)))
        self._tokens = Chunk(ids[rows, new_columns], rows, columns.count + new_columns, places)
        self._kv_start: dict[int, Counts] = {}

    @property
    def num_tokens(self) -> int:
        """New tokens of all rows."""
        return len(self._tokens.rows)

    def chunk(self, begin: int, end: int) -> Chunk:
        """The tokens from `begin` to, not including, `end`."""
        tokens, chosen = self._tokens, slice(begin, end)
        return Chunk(tokens.ids[chosen], tokens.rows[chosen], tokens.columns[chosen], tokens.places[chosen])

    def lengths(self, done: int) -> Counts:
        """`(num_rows,)` tokens of each row when `done` tokens are."""
        return self._place(np.arange(len(self._ends)), np.clip(done, self._begins, self._ends))

    def starts(self, window: int, done: int) -> Counts:
        """`(num_rows,)` tokens that no query will see through a window any more when `done` tokens are."""
        num_rows = len(self._ends)
        upcoming = np.clip(done, self._begins, self._ends)
        columns = np.full(num_rows, self.next_columns.count)
        is_under_way = upcoming < self._ends
        columns[is_under_way] = self._tokens.columns[upcoming[is_under_way]]
        return self.kv_start(window, np.arange(num_rows), columns)

    def kv_start(self, window: int, rows: Counts, columns: Counts) -> Counts:
        """Tokens of each of `rows` that a query in each of `columns` no longer sees through a window."""
        if window not in self._kv_start:
            every = np.arange(self.next_columns.count + 1)
            self._kv_start[window] = self.next_columns.num_tokens_before(every + 1 - window, len(self._ends))
        return np.asarray(self._kv_start[window][rows, columns])

    def _place(self, rows: Counts, tokens: Counts) -> Counts:
        return np.asarray(self._lengths[rows] + tokens - self._begins[rows])


class PackedStep(Step):
    """A pass over one chunk: one row as Transformers sees it, with tokens of several.

    Args:
        tables: the rows, in each group of layers, with room for the tokens.
        columns: the padded view, which only the last chunk changes.
        packing: all new tokens.
        chunk: those of this pass.
        num_queries: tokens that the model is given; those behind the chunk's belong to no row and are not stored.
    """

    def __init__(
        self, tables: list[BlockTable], columns: Columns, packing: Packing, chunk: Chunk, num_queries: int
    ) -> None:
        super().__init__(View.PAGES, columns, columns, (1, num_queries), True)
        self.counts = np.bincount(chunk.rows, minlength=tables[0].num_rows)
        self.placements = [Placement(table, None) for table in tables]
        self._packing = packing
        self._chunk = chunk

    @override
    def matches(self, num_rows: int, num_new: int, new: BoolMatrix | None) -> bool:
        return (self.num_rows, self.num_new) == (num_rows, num_new) and new is None

    @override
    def settle_duplicates(self, keys: Tensor, values: Tensor) -> None:
        """Do nothing: duplicates were found by their tokens and are not among the rows."""

    @override
    def stored(self, placement: Placement) -> tuple[Counts, Counts, Counts | None]:
        chunk = self._chunk
        num_tokens = len(chunk.rows)
        return chunk.rows, chunk.places, None if num_tokens == self.num_new else np.arange(num_tokens)

    @override
    def _seen(self, window: int | None, queries: slice) -> KVRanges:
        chosen = np.arange(self.num_new)[queries]
        real = chosen[chosen < len(self._chunk.rows)]
        rows, columns = self._chunk.rows[real], self._chunk.columns[real]
        kv_start = None if window is None else self._packing.kv_start(window, rows, columns)
        return KVRanges(self._chunk.places[real] + 1, kv_start, window, rows, len(chosen))

    def by_token(self, mask: Tensor, first_column: int) -> BoolMatrix:
        """Refuse: a mask over the columns of a packed chunk says nothing about its rows."""
        raise NotPackable("it asks for another mask than a causal one or a causal one with a window")


class PackedSequences(Sequences):
    """The rows of a cache, while new tokens of theirs are computed packed.

    They are a fork, so that the cache is as it was if that fails. A row stands for all rows that get the same tokens.

    Args:
        sequences: of the cache, which must not write as long as this does.
    """

    def __init__(self, sequences: Sequences) -> None:
        super().__init__(sequences.pool)
        self.become_fork_of(sequences)
        self.supersede(sequences)
        self._packing: Packing
        self._next_columns: Columns
        self._followed: Counts  # for each row of the cache, which row here stands for it

    def pack(self, ids: Tensor, attention_mask: Tensor | None, max_tokens: int) -> None:
        """Plan the new columns of a padded batch, and reserve their pages.

        Of layers that drop pages on the way, as many as will be held at once are known to be free instead.

        Args:
            ids: `(num_rows, num_new)` what is in them.
            attention_mask: `(num_rows, num_columns)`, 0 for padding; None without padding.
            max_tokens: tokens of a chunk.

        Raises:
            NotPackable: if the mask hides tokens that are cached.
            OutOfPagesError: if the pool has too few pages.
            ValueError: if rows or mask don't fit what is cached.
        """
        num_rows, num_new = ids.shape
        self._check_rows(num_rows, num_new)
        mask = None if attention_mask is None else attention_mask.bool().cpu().numpy()
        columns = self._columns_for(num_rows)
        new, past_is_visible = columns.split(mask, num_rows, num_new)
        if not past_is_visible:
            raise NotPackable("attention_mask hides tokens that are cached")
        if self.columns.count == 0:
            for table in self.tables:
                table.open_rows(num_rows)
        elif self._fans_out(num_rows):
            self._select([0] * num_rows)
        self._next_columns = columns.extended(new, num_rows, num_new)
        is_new = np.ones((num_rows, num_new), dtype=bool) if new is None else new
        tokens = np.where(is_new, ids.cpu().numpy(), 0)
        originals, self._followed = np.unique(equal_rows(self.tables, tokens, new), return_inverse=True)
        for table in self.tables:
            table.select(originals.tolist())
        self.columns = columns.selected(originals.tolist())
        self._packing = Packing(
            columns,
            self._next_columns.selected(originals.tolist()),
            self.tables[0].lengths.copy(),
            tokens[originals],
            is_new[originals],
        )
        self._reserve(max_tokens)

    @property
    def longest(self) -> int:
        """Tokens of the longest row, the new ones included."""
        return int(self._packing.lengths(self._packing.num_tokens).max())

    @property
    def num_tokens(self) -> int:
        """New tokens of all rows."""
        return self._packing.num_tokens

    def begin(self, first: int, num_queries: int) -> Chunk:
        """Begin the pass over the next tokens.

        Args:
            first: tokens that are done.
            num_queries: tokens that the model will be given. If fewer are left, the last ones belong to no row.

        Raises:
            OutOfPagesError: if other holders took the pages meanwhile that layers with a window need.
        """
        chunk = self._packing.chunk(first, first + num_queries)
        step = PackedStep(self.tables, self.columns, self._packing, chunk, num_queries)
        for table in filter(self._drops, self.tables):
            assert table.group.window is not None
            table.drop(self._packing.starts(table.group.window, first))
            table.reserve(step.counts)
        self.step = step
        self._await_layers(None)
        return chunk

    def end(self) -> None:
        """End a pass.

        Raises:
            NotPackable: if it did not go through all layers.
        """
        self.settle()
        if self.step is not None:
            raise NotPackable(f"it passed over layers {sorted(self._missing)}, which its configuration has")

    def unpack(self) -> None:
        """Let the rows be all rows, with the new columns."""
        for table in self.tables:
            table.select(self._followed.tolist())
        self.columns = self._next_columns
        self.tidy()

    def reserve(
        self,
        num_rows: int,
        num_new: int,
        attention_mask: Tensor | None,
        *,
        num_layers: int | None = None,
        reads_pages: bool = True,
    ) -> Step:
        """Return the pass that has begun.

        Raises:
            ValueError: if the mask is for something else.
        """
        self.settle()
        step = self.step
        is_masked = attention_mask is not None and not attention_mask.all()
        if step is None or is_masked or not step.matches(num_rows, num_new, None):
            raise NotPackable(_OWN_WAY)
        self._is_planned = True
        return step

    def _begin(
        self,
        num_rows: int,
        num_new: int,
        new: BoolMatrix | None,
        past_is_visible: bool,
        reads_pages: bool,
        num_layers: int | None,
    ) -> Step:
        raise NotPackable(_OWN_WAY)

    def _drops(self, table: BlockTable) -> bool:
        return table.group.window is not None and not self._records_past

    def _reserve(self, max_tokens: int) -> None:
        for table in filter(self._drops, self.tables):
            num_pages = self._peak(table, max_tokens)
            table.group.allocator.release(table.group.take(num_pages, admit=not table.lengths.any()))
        counts = self._packing.lengths(self._packing.num_tokens) - self.tables[0].lengths
        for table in self.tables:
            if not self._drops(table):
                held = [len(table.row_pages(row)) for row in range(table.num_rows)]
                table.reserve(counts)
                # Any of them may be the last of its row for a while.
                table.group.clear_values(
                    [page for row, num_held in enumerate(held) for page in table.row_pages(row)[num_held:]]
                )

    def _peak(self, table: BlockTable, max_tokens: int) -> int:
        """Pages that a table will hold at once, beside those that it holds now."""
        packing, page_size, window = self._packing, self.pool.page_size, table.group.window
        assert window is not None
        held = -(-table.lengths // page_size)
        peak = 0
        for done in range(0, packing.num_tokens, max_tokens):
            first = np.maximum(packing.starts(window, done) // page_size, held)
            end = -(-packing.lengths(done + max_tokens) // page_size)
            peak = max(peak, int(np.maximum(end - first, 0).sum()))
        return peak
