"""A forward pass over new tokens of rows that are not equally far."""

from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
from typing_extensions import override

from hf_paged._torch.surroundings import check_surroundings
from hf_paged.batch.padding import BoolMatrix, Columns, Counts
from hf_paged.batch.steps.padded import PaddedStep
from hf_paged.errors import UnclearPassError
from hf_paged.pages.block_table import BlockTable

if TYPE_CHECKING:
    from hf_paged.batch.sequences import Sequences


class RaggedStep(PaddedStep):
    """A pass in which each row goes on from a column of its own.

    Of two rows that end in columns 7 and 4 and get 1 and 3 tokens, the second one's queries stand in columns 4, 5 and
    6, and the first one's last two are padding.

    Args:
        tables: the rows, in each group of layers.
        columns: the padded view before this step.
        ends: `(num_rows,)` the column of each row's first new token.
        counts: `(num_rows,)` new tokens of each row, at most `num_new`.
        num_new: tokens of each row that the model is given; those behind `counts` are padding.
        reads_pages: whether attention is to read pages.
    """

    has_own_mask = True

    def __init__(
        self, tables: list[BlockTable], columns: Columns, ends: Counts, counts: Counts, num_new: int, reads_pages: bool
    ) -> None:
        self._queries = ends[:, None] + np.arange(num_new)
        new = None if (counts == num_new).all() else np.arange(num_new) < counts[:, None]
        following = columns.extended_from(ends, counts)
        super().__init__(tables, columns, num_new, new, True, reads_pages, True, following)

    @override
    def kv_start(self, window: int) -> Counts:
        columns = np.minimum(self._queries + 1 - window, self.next_columns.count)
        return self.next_columns.num_tokens_before(columns, self.num_rows)

    @override
    def first_column(self, window: int | None) -> int:
        return 0 if window is None else max(0, int(self._queries[:, 0].min()) + 1 - window)

    def by_column(self, window: int | None) -> BoolMatrix:
        """`(num_rows, 1, num_new, num_columns)` which columns each query sees, from the first one that any does."""
        column = np.arange(self.first_column(window), self.next_columns.count)
        queries = self._queries[:, :, None]
        is_seen = column <= queries
        if window is not None:
            is_seen &= column > queries - window
        if self.next_columns.real is not None:
            is_seen &= self.next_columns.real[:, None, column]
        return is_seen[:, None]


class RaggedRows:
    """Rows of a cache that a loop lets go on at different speeds.

    A context, within which windows keep what each row sees from its own end. The padded view has the shorter rows
    padded on the right.

    Args:
        sequences: of the cache, between two steps.

    Attributes:
        ends: `(num_rows,)` the column behind the last token of each row.
    """

    def __init__(self, sequences: "Sequences") -> None:
        self._sequences = sequences
        self.ends: Counts = np.full(sequences.rows.count, sequences.rows.columns.count)
        self._settled = self.ends  # behind these, tokens may be taken back

    def __enter__(self) -> "RaggedRows":
        # All rows are taken to end in the last column where windows are left without being told.
        self._recorded_before = self._sequences.records_past
        self._sequences.records_past = True
        return self

    def __exit__(self, *error: object) -> None:
        self._sequences.records_past = self._recorded_before

    def begin(self, counts: Counts, num_new: int, *, reads_pages: bool) -> RaggedStep:
        """Reserve and begin a step; arguments as for `RaggedStep`.

        Raises:
            OutOfPagesError: if it does not fit into the pool; nothing has changed.
            UnclearPassError: if the pass before may have failed; nothing has changed.
        """
        check_surroundings()
        sequences = self._sequences
        sequences.begin_pass(0, num_new)
        sequences.end_step()
        sequences.progress.announce(sequences.rows.columns.count)
        rows = sequences.rows
        if not self._recorded_before:
            sequences.handed_on.unshare()
            rows.drop_past(self._settled)
        try:
            step = RaggedStep(rows.tables, rows.columns, self.ends, counts, num_new, reads_pages)
        except BaseException:
            rows.roll_back()
            raise
        sequences.begin(step)
        return step

    def end(self, counts: Counts) -> None:
        """Take note that a step is over which gave each row so many tokens."""
        self.ends = self.ends + counts

    def cut(self, ends: Counts) -> None:
        """Take tokens back: let the rows end before these columns. What is kept is not taken back later."""
        if (ends < self.ends).any():
            cut(self._sequences, ends)
            self.ends = ends.copy()
        self._settled = self.ends

    def give_up(self, ends: Counts) -> None:
        """Take tokens back after a failure, wherever it was: of a step that is over, or of none.

        A step that stopped in the middle is left to whoever rolls it back, to what there was before it.
        """
        with suppress(UnclearPassError):
            self._sequences.end_step()
            rows = self._sequences.rows
            cut(self._sequences, np.minimum(ends, rows.columns.ends_of(rows.lengths)))


def cut(sequences: "Sequences", ends: Counts) -> None:
    """Keep the columns before the one of `ends`, `(num_rows,)`, of each row of a cache.

    Raises:
        ValueError: if that takes tokens which have left a window; nothing has changed.
    """
    sequences.end_step()
    sequences.rows.truncate(ends)
    sequences.edits.copies.clear()  # they are out of date
