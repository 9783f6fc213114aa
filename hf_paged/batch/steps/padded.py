"""A forward pass over the new columns of a padded batch."""

import numpy as np
from torch import Tensor
from typing_extensions import override

from hf_paged.batch.padding import BoolMatrix, Columns, Counts
from hf_paged.batch.steps.duplicates import Originals, confirmed_duplicates, parted_duplicates, possible_duplicates
from hf_paged.batch.steps.step import KVRanges, Placement, Step, View
from hf_paged.errors import OutOfPagesError
from hf_paged.pages.block_table import BlockTable


class PaddedStep(Step):
    """A pass over the new columns of a padded batch.

    Args:
        tables: the rows, in each group of layers.
        columns: the padded view before this step.
        num_new: new columns.
        new: `(num_rows, num_new)` True for tokens; None if there is no padding among them.
        past_is_visible: whether every cached token may be seen.
        reads_pages: whether attention is to read pages, if any are filled.
        keeps_all: whether tokens that have left a window are stored, too.
        next_columns: the padded view after this step; None where the new columns follow those before.
    """

    def __init__(
        self,
        tables: list[BlockTable],
        columns: Columns,
        num_new: int,
        new: BoolMatrix | None,
        past_is_visible: bool,
        reads_pages: bool,
        keeps_all: bool,
        next_columns: Columns | None = None,
    ) -> None:
        num_rows = tables[0].num_rows
        super().__init__(
            View.NEW if columns.count == 0 else View.PAGES if reads_pages else View.DENSE,
            columns,
            next_columns or columns.extended(new, num_rows, num_new),
            (num_rows, num_new),
            past_is_visible,
        )
        self.new = new
        starts = tables[0].lengths[:, None]
        if new is None:
            self.counts = np.full(num_rows, num_new, dtype=np.int64)
            self.kv_stop: Counts = starts + np.arange(1, num_new + 1)
        else:
            self.counts = new.sum(axis=1, dtype=np.int64)
            # Padding sees what is before it, as with Transformers' own caches: at the end of a row generate() goes on
            # from what it gives.
            self.kv_stop = starts + new.cumsum(axis=1)
        self.placements = [Placement(table, None if keeps_all else self._unread(table)) for table in tables]
        self.originals: Originals | None = None
        # With a single one rows are not compared: beams go apart there.
        self._possible_duplicates = None if num_new == 1 else possible_duplicates(tables, new)
        self._is_reserved = False
        if self._possible_duplicates is None:
            self._reserve()

    @property
    @override
    def is_settled(self) -> bool:
        return self._is_reserved and self.originals is None

    @override
    def matches(self, num_rows: int, num_new: int, new: BoolMatrix | None) -> bool:
        same = self.new is new if self.new is None or new is None else np.array_equal(self.new, new)
        return same and (self.num_rows, self.num_new) == (num_rows, num_new)

    @override
    def settle_duplicates(self, keys: Tensor, values: Tensor) -> None:
        if self.is_settled:
            return
        if not self._is_reserved:
            assert self._possible_duplicates is not None
            self.originals = confirmed_duplicates(self._possible_duplicates, keys, values)
            self._reserve()
        else:
            assert self.originals is not None
            for row in parted_duplicates(self.originals, keys, values):
                for placement in self.placements:
                    placement.table.unshare(row)
                self.originals[row] = row

    @override
    def stored(self, placement: Placement) -> tuple[Counts, Counts, Counts | None]:
        stored, starts = self.new, placement.starts
        positions = placement.table.lengths[:, None] + np.arange(self.num_new) if stored is None else self.kv_stop - 1
        if starts is not None:
            is_kept = positions >= starts[:, None]
            stored = is_kept if stored is None else stored & is_kept
        if self.originals is not None:
            leads = np.broadcast_to((self.originals == np.arange(self.num_rows))[:, None], positions.shape)
            stored = leads if stored is None else stored & leads
        if stored is None:
            return np.arange(self.num_rows)[:, None], positions, None
        rows, new_columns = np.nonzero(stored)
        return rows, positions[rows, new_columns], rows * self.num_new + new_columns

    @override
    def kv_ranges(self, window: int | None, queries: slice) -> KVRanges:
        kv_stop = self.kv_stop[:, queries]
        is_whole = queries == slice(None)
        if window is None:
            return KVRanges(kv_stop, is_whole=is_whole)
        # Padding may stand so far behind the tokens of its row that it sees none of them through a window.
        kv_start = self.kv_start(window)[:, queries]
        return KVRanges(np.where(kv_start < kv_stop, kv_stop, 0), kv_start, window, is_whole=is_whole)

    def kv_start(self, window: int) -> Counts:
        """`(num_rows, num_new)` tokens of its row that each query no longer sees through a window."""
        queries = self.columns.count + np.arange(self.num_new)
        return self.next_columns.num_tokens_before(queries + 1 - window, self.num_rows)

    @override
    def by_token(self, mask: Tensor, first_column: int) -> BoolMatrix:
        # It has to be the same for all heads.
        if mask.shape[1] != 1:
            raise ValueError(f"A mask of its own for each of {mask.shape[1]} heads is not supported over pages.")
        self.hides_tokens = True
        by_column = mask[:, 0].cpu().numpy()
        lengths = self.placements[0].table.lengths + self.counts
        by_token = np.zeros((self.num_rows, self.num_new, self._max_tokens), dtype=bool)
        real = self.next_columns.real
        if real is None:
            by_token[:, :, first_column : self.next_columns.count] = by_column
        else:
            kv_start = real[:, :first_column].sum(axis=1)
            for row in range(self.num_rows):
                by_token[row, :, kv_start[row] : lengths[row]] = by_column[row][:, real[row, first_column:]]
        return by_token

    @override
    def columns_of_tokens(self) -> Counts:
        real, max_tokens = self.next_columns.real, self._max_tokens
        if real is None:
            return np.broadcast_to(np.arange(max_tokens), (self.num_rows, max_tokens)).copy()
        first = np.argsort(~real, axis=1, kind="stable")[:, :max_tokens]  # those of tokens before those of padding
        return np.pad(first, ((0, 0), (0, max_tokens - first.shape[1])))

    @property
    def _max_tokens(self) -> int:
        """Tokens of the longest row afterwards, rounded up to whole pages."""
        page_size = self.placements[0].table.group.page_size
        return -(-max(1, int(self.kv_stop[:, -1].max())) // page_size) * page_size

    def _unread(self, table: BlockTable) -> Counts | None:
        """`(num_rows,)` new tokens at the beginning of each row that nobody looks for in pages; None: none."""
        window, count = table.group.window, self.next_columns.count
        if self.view is not View.NEW or window is None or count < window:
            return None
        first = self.next_columns.num_tokens_before(np.array([count + 1 - window]), self.num_rows)[:, 0]
        return table.group.first_kept(first, self.counts)

    def _reserve(self) -> None:
        for done, placement in enumerate(self.placements):
            try:
                placement.table.reserve(self.counts, placement.starts, self.originals)
            except OutOfPagesError:
                for other in self.placements[:done]:
                    other.table.roll_back()
                raise
        self._is_reserved = True
