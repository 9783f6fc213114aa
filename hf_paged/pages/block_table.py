"""Rows and the pages they hold."""

import weakref
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from hf_paged.errors import OutOfPagesError
from hf_paged.pages.group import PageGroup

Counts = npt.NDArray[np.int64]

_FIRST_WIDTH = 16  # pages per row that a new table has room for


class _Rows:
    """The arrays of a table, apart from it so that a finaliser can release their pages when the table is gone.

    NumPy, not torch: the finaliser may run in the middle of a compilation, where torch computes with fake tensors.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.block_table = np.zeros((0, _FIRST_WIDTH), dtype=np.int32)
        self.open(0)

    def open(self, count: int) -> None:
        self.count = count
        if count and self.block_table.shape[0] != count:
            self.block_table = np.zeros((count, self.block_table.shape[1]), dtype=np.int32)
        self.num_pages = np.zeros(count, dtype=np.int64)  # the dropped ones at the beginning included
        self.lengths = np.zeros(count, dtype=np.int64)
        self.starts = np.zeros(count, dtype=np.int64)

    def first_page(self, row: int) -> int:
        return int(self.starts[row]) // self.page_size

    def pages(self, row: int) -> list[int]:
        held: list[int] = self.block_table[row, self.first_page(row) : int(self.num_pages[row])].tolist()
        return held

    def all_pages(self) -> list[int]:
        return [page for row in range(self.count) for page in self.pages(row)]


class BlockTable:
    """Block tables: for each row its length and the ids of its pages, in order.

    Tokens enter in two moves. `reserve` makes room, copying a shared page that will be written; `commit` lets the
    lengths grow, or `roll_back` gives the room back. Between them the tokens are written into their slots.

    Args:
        group: where the pages are.
    """

    def __init__(self, group: PageGroup) -> None:
        self.group = group
        self.version = 0
        """Changes whenever the block table changes."""
        self._rows = _Rows(group.page_size)
        # A row's last page may have other holders. Full pages are never written, so they need no look.
        self._tails_may_be_shared = False
        self._superseded: weakref.ref[BlockTable] | None = None
        group.register(self)
        finalizer = weakref.finalize(self, _release_rows, group, self._rows)
        finalizer.atexit = False

    @property
    def num_rows(self) -> int:
        """Rows of the batch."""
        return self._rows.count

    @property
    def lengths(self) -> Counts:
        """`(num_rows,)` tokens of each row, dropped ones included."""
        return self._rows.lengths

    @property
    def starts(self) -> Counts:
        """`(num_rows,)` tokens at the beginning of each row that have been dropped."""
        return self._rows.starts

    @property
    def block_table(self) -> npt.NDArray[np.int32]:
        """`(num_rows, width)`: page ids, valid up to each row's number of pages. Stays in place until it must grow."""
        return self._rows.block_table

    def row_pages(self, row: int) -> list[int]:
        """Page ids of a row, in order."""
        return self._rows.pages(row)

    def placed_pages(self, row: int) -> Iterator[tuple[int, int]]:
        """Each page of a row, and its place in it."""
        first = self._rows.first_page(row)
        return ((page, first + index) for index, page in enumerate(self.row_pages(row)))

    def held_pages(self) -> Iterator[tuple[int, int, int]]:
        """Each page of each row: its id, its place in the row, and how many of its slots the row uses."""
        page_size = self.group.page_size
        for row in range(self.num_rows):
            start, length = int(self.starts[row]), int(self.lengths[row])
            for page, index in self.placed_pages(row):
                used = min(length, (index + 1) * page_size) - max(start, index * page_size)
                yield page, index, max(0, used)

    def open_rows(self, num_rows: int) -> None:
        """Start over with `num_rows` empty rows."""
        self.clear()
        self._rows.open(num_rows)

    def adopt(self, row: int, pages: Sequence[int], start: int, length: int) -> None:
        """Let an empty row begin with pages that the caller holds, who hands them over.

        Args:
            row: index of the row.
            pages: the last ones of its first `length` tokens.
            start: tokens at the beginning that nobody will read; `pages` begin with that of the next one.
            length: tokens of the row from now on.
        """
        rows = self._rows
        first = start // self.group.page_size
        self._widen(first + len(pages))
        rows.block_table[row, first : first + len(pages)] = pages
        rows.num_pages[row] = first + len(pages)
        rows.lengths[row], rows.starts[row] = length, start
        self._tails_may_be_shared |= length % self.group.page_size > 0
        self.version += 1

    def reserve(self, counts: Counts, starts: Counts | None = None, originals: Counts | None = None) -> None:
        """Make room for `counts[row]` more tokens in each row.

        Args:
            counts: `(num_rows,)` tokens.
            starts: `(num_rows,)` tokens at the beginning of empty rows that nobody will read and that get no room.
            originals: `(num_rows,)` for each row itself, or an earlier row with the same pages that shall get the
                same tokens; then they go on sharing all of their pages, the new ones too.

        Raises:
            OutOfPagesError: if the pool has too few pages; nothing has changed then.
        """
        rows, page_size = self._rows, self.group.page_size
        has_room = (rows.lengths + counts <= rows.num_pages * page_size).all()
        if has_room and starts is None and originals is None and not self._tails_may_be_shared:
            return  # as in most steps of decoding
        is_new = not (rows.num_pages > 0).any()
        if starts is not None:
            rows.starts = starts.copy()
            rows.num_pages = starts // page_size
        missing = -(-(rows.lengths + counts) // page_size) - rows.num_pages
        followers: list[int] = []
        if originals is not None:
            followers = np.flatnonzero(originals != np.arange(rows.count)).tolist()
            counts, missing = counts.copy(), missing.copy()
            counts[followers] = missing[followers] = 0
        # Without the followers a page that only duplicates hold counts as the leader's own, and is not copied.
        self.group.allocator.release([page for row in followers for page in rows.pages(row)])
        try:
            shared = self._shared_tails(counts) if self._tails_may_be_shared else []
            needed = int(missing.sum()) + len(shared)
            pages = self.group.take(needed, admit=is_new) if needed else []
            if shared:
                copies, pages = pages[: len(shared)], pages[len(shared) :]
                self._replace_tails(shared, copies)
            self._append(missing, pages)
            if needed:
                self.version += 1
        except OutOfPagesError:
            if starts is not None:
                rows.starts, rows.num_pages = np.zeros_like(starts), np.zeros_like(starts)
            raise
        finally:  # the same pages as before, if there were too few
            for row in followers:
                original = int(originals[row]) if originals is not None else row
                rows.block_table[row] = rows.block_table[original]
                rows.num_pages[row] = rows.num_pages[original]
                self.group.allocator.retain(rows.pages(row))
        if followers:
            self._tails_may_be_shared = True

    def unshare(self, row: int) -> None:
        """Give a row pages of its own for the tokens that are reserved and not yet committed.

        Raises:
            OutOfPagesError: if the pool has too few pages; nothing has changed then.
        """
        rows = self._rows
        first = int(max(rows.lengths[row], rows.starts[row])) // self.group.page_size
        places = range(first, int(rows.num_pages[row]))
        self._replace([row] * len(places), list(places), self.group.take(len(places)))
        self.version += 1

    def replace(self, places: Sequence[int], rows: Sequence[Sequence[int]], copies: list[int]) -> None:
        """Let rows have copies of pages that somebody else holds too.

        Args:
            places: of a page in its row.
            rows: for each of `places` the rows that have one page there, and shall have one copy of it.
            copies: for each of `places` a page with one holder.
        """
        self._replace([sharing[0] for sharing in rows], list(places), copies)
        table, allocator = self._rows.block_table, self.group.allocator
        for place, (_, *others), copy in zip(places, rows, copies, strict=True):
            if others:
                originals = table[others, place].tolist()
                table[others, place] = copy
                allocator.retain([copy], len(others))
                allocator.release(originals)
        self.version += 1

    def commit(self, counts: Counts) -> None:
        """Let `counts[row]` reserved tokens be part of each row."""
        self._rows.lengths += counts

    def roll_back(self) -> None:
        """Give back the pages that no token needs."""
        self._keep_pages(-(-self._rows.lengths // self.group.page_size))

    def truncate(self, lengths: Counts) -> None:
        """Shorten the rows to `lengths`, 0 or not below what was dropped, and release the pages behind them."""
        self._rows.lengths = lengths.copy()
        self._tails_may_be_shared = True
        self.roll_back()

    def drop(self, starts: Counts) -> None:
        """Release the pages before token `starts[row]` of each row, which nobody will read again."""
        rows, page_size = self._rows, self.group.page_size
        starts = np.minimum(np.maximum(starts, rows.starts), rows.lengths)
        first, kept = rows.starts // page_size, np.minimum(starts // page_size, rows.num_pages)
        released: list[int] = []
        for row in np.flatnonzero(kept > first).tolist():
            released.extend(rows.block_table[row, int(first[row]) : int(kept[row])].tolist())
        rows.starts = starts
        if released:
            self.group.allocator.release(released)
            self.version += 1

    def release(self, selected: Sequence[int]) -> None:
        """Release every page of some rows, which are empty from now on."""
        rows = self._rows
        pages = [page for row in selected for page in rows.pages(row)]
        for array in (rows.num_pages, rows.lengths, rows.starts):
            array[list(selected)] = 0
        self.group.allocator.release(pages)
        self.version += 1

    def select(self, indices: Sequence[int]) -> None:
        """Let row `i` be what row `indices[i]` was: reorders, repeats and drops rows without copying tokens."""
        rows = self._rows
        if list(indices) == list(range(rows.count)):
            return
        uses = np.bincount(np.asarray(indices, dtype=np.int64), minlength=rows.count)
        for row in np.flatnonzero(uses > 1).tolist():
            self.group.allocator.retain(rows.pages(row), int(uses[row]) - 1)
            self._tails_may_be_shared = True
        for row in np.flatnonzero(uses == 0).tolist():
            self.group.allocator.release(rows.pages(row))
        chosen = rows.block_table[indices]
        if len(indices) == rows.count:
            rows.block_table[:] = chosen
        else:
            rows.block_table = chosen
        rows.num_pages = rows.num_pages[indices]
        rows.lengths = rows.lengths[indices]
        rows.starts = rows.starts[indices]
        rows.count = len(indices)
        self.version += 1

    def fork(self) -> "BlockTable":
        """Return a table of its own with the same rows, sharing every page."""
        copy = BlockTable(self.group)
        self.group.allocator.retain(self._rows.all_pages())
        rows = copy._rows
        rows.block_table = self._rows.block_table.copy()
        rows.num_pages = self._rows.num_pages.copy()
        rows.lengths = self._rows.lengths.copy()
        rows.starts = self._rows.starts.copy()
        rows.count = self._rows.count
        self._tails_may_be_shared = copy._tails_may_be_shared = True
        return copy

    def restore(self, lengths: Counts, starts: Counts, pages: Sequence[Sequence[int]]) -> None:
        """Have rows again that were given up.

        Args:
            lengths: `(num_rows,)` tokens of each row, dropped ones included.
            starts: `(num_rows,)` tokens at the beginning of each row that have been dropped.
            pages: ids of each row's pages, in order; each has one holder so far, even if several rows share it.
        """
        self.open_rows(len(pages))
        self._rows.starts, self._rows.num_pages = starts.copy(), starts // self.group.page_size
        holders = Counter(page for row in pages for page in row)
        for times in set(holders.values()) - {1}:
            self.group.allocator.retain([page for page, count in holders.items() if count == times], times - 1)
        self._append(np.array([len(row) for row in pages], dtype=np.int64), [page for row in pages for page in row])
        self._rows.lengths = lengths.copy()
        self._tails_may_be_shared = True

    def supersede(self, other: "BlockTable") -> None:
        """Write behind the tokens of `other` in the pages that both hold, as `other` won't do any more."""
        self._superseded = weakref.ref(other)

    def clear(self) -> None:
        """Release every page and have no rows."""
        rows = self._rows
        pages = rows.all_pages()
        rows.open(0)
        self._tails_may_be_shared = False
        self.group.allocator.release(pages)
        self.version += 1

    def give_back(self) -> None:
        """Release every page and have no rows, in a finaliser, which may run in the middle of anything."""
        pages = self._rows.all_pages()
        self._rows.open(0)
        self.version += 1
        self.group.allocator.release_later(pages)

    def _shared_tails(self, counts: Counts) -> list[int]:
        """Rows that will write into a last page which somebody else holds too."""
        rows, allocator = self._rows, self.group.allocator
        holders: dict[int, int] = {}
        silent = self._superseded_tails()
        shared = []
        partial = rows.lengths % self.group.page_size > 0
        for row in np.flatnonzero((counts > 0) & partial).tolist():
            page = int(rows.block_table[row, int(rows.num_pages[row]) - 1])
            left = holders.get(page, allocator.ref_count(page) - silent[page])
            if left > 1:
                shared.append(row)
            holders[page] = left - 1
        if not shared and counts[partial].all():
            self._tails_may_be_shared = False
        return shared

    def _superseded_tails(self) -> Counter[int]:
        """How often the table that this one takes the place of holds each of its last pages."""
        other = None if self._superseded is None else self._superseded()
        if other is None:
            return Counter()
        return Counter(pages[-1] for row in range(other.num_rows) if (pages := other.row_pages(row)))

    def _replace_tails(self, shared: list[int], copies: list[int]) -> None:
        self._replace(shared, (self._rows.num_pages[shared] - 1).tolist(), copies)

    def _replace(self, rows: list[int], places: list[int], copies: list[int]) -> None:
        """Let pages of rows be copies of what they were."""
        table = self._rows.block_table
        originals = table[rows, places].tolist()
        self.group.copy_pages(originals, copies)
        self.group.place(copies, places)
        table[rows, places] = copies
        self.group.allocator.release(originals)

    def _append(self, missing: Counts, pages: list[int]) -> None:
        rows = self._rows
        if not pages:
            return
        self._widen(int((rows.num_pages + missing).max(initial=0)))
        indices: list[int] = []
        tails: list[int] = []
        done = 0
        for row in np.flatnonzero(missing).tolist():
            first, count = int(rows.num_pages[row]), int(missing[row])
            rows.block_table[row, first : first + count] = pages[done : done + count]
            indices.extend(range(first, first + count))
            done += count
            tails.append(pages[done - 1])
            if first * self.group.page_size < rows.starts[row]:
                tails.append(pages[done - count])
        self.group.place(pages, indices)
        self.group.clear_values(tails)
        rows.num_pages += missing

    def _widen(self, width: int) -> None:
        rows = self._rows
        if width > rows.block_table.shape[1]:
            wider = np.zeros((rows.count, max(width, 2 * rows.block_table.shape[1])), dtype=np.int32)
            wider[:, : rows.block_table.shape[1]] = rows.block_table
            rows.block_table = wider

    def _keep_pages(self, num_pages: Counts) -> None:
        rows = self._rows
        released: list[int] = []
        for row in np.flatnonzero(rows.num_pages > num_pages).tolist():
            first = max(int(num_pages[row]), rows.first_page(row))
            released.extend(rows.block_table[row, first : int(rows.num_pages[row])].tolist())
        rows.num_pages = num_pages
        rows.starts = np.minimum(rows.starts, rows.lengths)
        self.group.allocator.release(released)
        self.version += 1


def _release_rows(group: PageGroup, rows: _Rows) -> None:
    group.allocator.release_later(rows.all_pages())
