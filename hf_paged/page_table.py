"""Rows and the pages they hold."""

import weakref
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from hf_paged.pool import PagePool

Counts = npt.NDArray[np.int64]

_FIRST_WIDTH = 16  # pages per row that a new table has room for


class _Rows:
    """The arrays of a table, apart from it so that a finaliser can release their pages when the table is gone.

    NumPy, not torch: the finaliser may run in the middle of a compilation, where torch computes with fake tensors.
    """

    def __init__(self) -> None:
        self.count = 0
        self.block_table = np.zeros((0, _FIRST_WIDTH), dtype=np.int32)
        self.num_pages = np.zeros(0, dtype=np.int64)
        self.lengths = np.zeros(0, dtype=np.int64)

    def pages(self, row: int) -> list[int]:
        held: list[int] = self.block_table[row, : int(self.num_pages[row])].tolist()
        return held

    def all_pages(self) -> list[int]:
        return [page for row in range(self.count) for page in self.pages(row)]


class PageTable:
    """Block tables: for each row its length and the ids of its pages, in order.

    Tokens enter in two moves. `reserve` makes room, copying a shared page that will be written; `commit` lets the
    lengths grow, or `rollback` gives the room back. Between them the tokens are written into their slots.

    Args:
        pool: where the pages are.
    """

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.version = 0
        """Changes whenever the block table changes."""
        self._rows = _Rows()
        # A row's last page may have other holders. Full pages are never written, so they need no look.
        self._tails_may_be_shared = False
        pool.register(self)
        finalizer = weakref.finalize(self, _release_rows, pool, self._rows)
        finalizer.atexit = False

    @property
    def num_rows(self) -> int:
        """Rows of the batch."""
        return self._rows.count

    @property
    def lengths(self) -> Counts:
        """`(num_rows,)` tokens of each row."""
        return self._rows.lengths

    @property
    def block_table(self) -> npt.NDArray[np.int32]:
        """`(num_rows, width)`: page ids, valid up to each row's number of pages. Stays in place until it must grow."""
        return self._rows.block_table

    def row_pages(self, row: int) -> list[int]:
        """Page ids of a row, in order."""
        return self._rows.pages(row)

    def pages_with_tokens(self) -> Iterator[tuple[int, int]]:
        """Each page of each row, with the number of its slots that the row uses."""
        page_size = self.pool.page_size
        for row in range(self.num_rows):
            length = int(self.lengths[row])
            for index, page in enumerate(self.row_pages(row)):
                yield page, max(0, min(page_size, length - index * page_size))

    def open_rows(self, count: int) -> None:
        """Start over with `count` empty rows."""
        self.clear()
        rows = self._rows
        rows.count = count
        rows.num_pages = np.zeros(count, dtype=np.int64)
        rows.lengths = np.zeros(count, dtype=np.int64)
        if rows.block_table.shape[0] != count:
            rows.block_table = np.zeros((count, rows.block_table.shape[1]), dtype=np.int32)
        self.version += 1

    def reserve(self, counts: Counts) -> None:
        """Make room for `counts[row]` more tokens in each row.

        Raises:
            OutOfPagesError: if the pool has too few pages; nothing has changed then.
        """
        rows, page_size = self._rows, self.pool.page_size
        missing = -(-(rows.lengths + counts) // page_size) - rows.num_pages
        shared = self._shared_tails(counts) if self._tails_may_be_shared else []
        needed = int(missing.sum()) + len(shared)
        if needed == 0:
            return
        pages = self.pool.take(needed, admit=not rows.num_pages.any())
        if shared:
            copies, pages = pages[: len(shared)], pages[len(shared) :]
            self._replace_tails(shared, copies)
        self._append(missing, pages)
        self.version += 1

    def commit(self, counts: Counts) -> None:
        """Let `counts[row]` reserved tokens be part of each row."""
        self._rows.lengths += counts
        if counts.all():
            self._tails_may_be_shared = False

    def rollback(self) -> None:
        """Give back the pages that no token needs."""
        self._keep_pages(-(-self._rows.lengths // self.pool.page_size))

    def truncate(self, lengths: Counts) -> None:
        """Shorten the rows to `lengths` and release the pages behind them."""
        self._rows.lengths = lengths.copy()
        self._tails_may_be_shared = True
        self.rollback()

    def select(self, indices: Sequence[int]) -> None:
        """Let row `i` be what row `indices[i]` was: reorders, repeats and drops rows without copying tokens."""
        rows = self._rows
        if list(indices) == list(range(rows.count)):
            return
        uses = np.bincount(np.asarray(indices, dtype=np.int64), minlength=rows.count)
        for row in np.flatnonzero(uses > 1).tolist():
            self.pool.allocator.retain(rows.pages(row), int(uses[row]) - 1)
            self._tails_may_be_shared = True
        for row in np.flatnonzero(uses == 0).tolist():
            self.pool.allocator.release(rows.pages(row))
        chosen = rows.block_table[indices]
        if len(indices) == rows.count:
            rows.block_table[:] = chosen
        else:
            rows.block_table = chosen
        rows.num_pages = rows.num_pages[indices]
        rows.lengths = rows.lengths[indices]
        rows.count = len(indices)
        self.version += 1

    def fork(self) -> "PageTable":
        """Return a table of its own with the same rows, sharing every page."""
        copy = PageTable(self.pool)
        self.pool.allocator.retain(self._rows.all_pages())
        rows = copy._rows
        rows.block_table = self._rows.block_table.copy()
        rows.num_pages = self._rows.num_pages.copy()
        rows.lengths = self._rows.lengths.copy()
        rows.count = self._rows.count
        self._tails_may_be_shared = copy._tails_may_be_shared = True
        return copy

    def clear(self) -> None:
        """Release every page and have no rows."""
        rows = self._rows
        pages, rows.count = rows.all_pages(), 0
        rows.num_pages = rows.num_pages[:0]
        rows.lengths = rows.lengths[:0]
        self.pool.allocator.release(pages)
        self.version += 1

    def _shared_tails(self, counts: Counts) -> list[int]:
        """Rows that will write into a last page which somebody else holds too."""
        rows, allocator = self._rows, self.pool.allocator
        holders: dict[int, int] = {}
        shared = []
        for row in np.flatnonzero((counts > 0) & (rows.lengths % self.pool.page_size > 0)).tolist():
            page = int(rows.block_table[row, int(rows.num_pages[row]) - 1])
            left = holders.get(page, allocator.ref_count(page))
            if left > 1:
                shared.append(row)
            holders[page] = left - 1
        return shared

    def _replace_tails(self, shared: list[int], copies: list[int]) -> None:
        rows = self._rows
        last = rows.num_pages[shared] - 1
        originals = rows.block_table[shared, last].tolist()
        self.pool.copy_pages(originals, copies)
        self.pool.place(copies, last.tolist())
        rows.block_table[shared, last] = copies
        self.pool.allocator.release(originals)

    def _append(self, missing: Counts, pages: list[int]) -> None:
        rows = self._rows
        if not pages:
            return
        width = int((rows.num_pages + missing).max(initial=0))
        if width > rows.block_table.shape[1]:
            wider = np.zeros((rows.count, max(width, 2 * rows.block_table.shape[1])), dtype=np.int32)
            wider[:, : rows.block_table.shape[1]] = rows.block_table
            rows.block_table = wider
        indices: list[int] = []
        tails: list[int] = []
        done = 0
        for row in np.flatnonzero(missing).tolist():
            first, count = int(rows.num_pages[row]), int(missing[row])
            rows.block_table[row, first : first + count] = pages[done : done + count]
            indices.extend(range(first, first + count))
            done += count
            tails.append(pages[done - 1])
        self.pool.place(pages, indices)
        self.pool.clear_values(tails)
        rows.num_pages += missing

    def _keep_pages(self, num_pages: Counts) -> None:
        rows = self._rows
        released: list[int] = []
        for row in np.flatnonzero(rows.num_pages > num_pages).tolist():
            released.extend(rows.pages(row)[int(num_pages[row]) :])
        rows.num_pages = num_pages
        self.pool.allocator.release(released)
        self.version += 1


def _release_rows(pool: PagePool, rows: _Rows) -> None:
    pool.allocator.release_later(rows.all_pages())
