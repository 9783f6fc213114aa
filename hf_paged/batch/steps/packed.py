"""Rows whose new tokens come packed: one after another, without padding, in chunks."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor
from typing_extensions import override

from hf_paged.batch.padding import BoolMatrix, Columns, Counts
from hf_paged.batch.steps.step import KVRanges, Placement, Step, View
from hf_paged.errors import NotPackable
from hf_paged.pages.block_table import BlockTable


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
    def kv_ranges(self, window: int | None, queries: slice) -> KVRanges:
        chosen = np.arange(self.num_new)[queries]
        real = chosen[chosen < len(self._chunk.rows)]
        rows, columns = self._chunk.rows[real], self._chunk.columns[real]
        kv_start = None if window is None else self._packing.kv_start(window, rows, columns)
        return KVRanges(self._chunk.places[real] + 1, kv_start, window, rows, len(chosen))

    def by_token(self, mask: Tensor, first_column: int) -> BoolMatrix:
        """Refuse: a mask over the columns of a packed chunk says nothing about its rows."""
        raise NotPackable("it asks for another mask than a causal one or a causal one with a window")

    def columns_of_tokens(self) -> Counts:
        """Refuse, as `by_token`."""
        raise NotPackable("it adds a bias to the scores of columns")
