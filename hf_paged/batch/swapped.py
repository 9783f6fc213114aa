"""Rows whose pages are in memory of the host, or may be moved there."""

import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from hf_paged.errors import OutOfPagesError
from hf_paged.pages.block_table import BlockTable, Counts
from hf_paged.pages.pool import PagePool
from hf_paged.pages.storage import LayerStorage
from hf_paged.pages.tiers.host import HostTier
from hf_paged.pages.tiers.transport import page_host_bytes, read_pages, write_pages


def host_of(pool: PagePool) -> HostTier:
    """The memory of the host that a pool has for rows; raise ValueError if there is none."""
    if pool.host is None:
        raise ValueError(
            "A cache was to be swapped out whose pool may keep nothing in memory of the host. Make the pool with "
            "host_bytes, as in PagePool.from_model(model, host_bytes=2**30), and the cache by "
            "PagedCache(pool=pool)."
        )
    return pool.host


class SwappedRows:
    """The rows of some block tables, swapped out: the tables hold no page until `restore`.

    Each page is copied once, however many rows share it; what others hold stays where it is.

    Args:
        tables: the rows, in each group of layers, between two steps. They have no rows afterwards.
        host: where the pages go.

    Raises:
        OutOfPagesError: if the host has too little room; nothing has changed.
    """

    def __init__(self, tables: Sequence[BlockTable], host: HostTier) -> None:
        parts = [_rows_of(table) for table in tables]
        self._set_aside = host.set_aside(
            sum(len(part.distinct_pages) * page_host_bytes(part.storages) for part in parts)
        )
        self._contents = [read_pages(part.storages, part.distinct_pages) for part in parts]
        self._parts = parts
        self.lengths = parts[0].lengths
        """`(num_rows,)` tokens of each row."""
        for table in tables:
            table.clear()

    @property
    def num_bytes(self) -> int:
        """Bytes of the host that they take."""
        return self._set_aside.num_bytes

    def restore(self, tables: Sequence[BlockTable]) -> None:
        """Let the tables have their rows again, in other pages.

        Raises:
            OutOfPagesError: if the pool has too few pages; nothing has changed.
        """
        taken: list[list[int]] = []
        try:
            for part, table in zip(self._parts, tables, strict=True):
                # Not as new rows: what the watermark holds back may be what they had.
                taken.append(table.group.take(len(part.distinct_pages)))
        except OutOfPagesError:
            for table, pages in zip(tables, taken, strict=False):
                table.group.allocator.release(pages)
            raise
        try:
            for part, table, contents, pages in zip(self._parts, tables, self._contents, taken, strict=True):
                moved = dict(zip(part.distinct_pages, pages, strict=True))
                table.restore(part.lengths, part.starts, [[moved[page] for page in row] for row in part.pages])
                write_pages(part.storages, pages, contents)
        except BaseException:
            for table in tables:
                table.clear()
            raise


class IdleRows:
    """Rows that anybody swaps out who runs short of pages, until their owner wants them back.

    That is safe since nobody else reads or writes them meanwhile: who wants the tables withdraws them first, or waits
    while they are being swapped out. They are on a list of the host tier; whoever takes them off the list has them.

    Args:
        tables: the rows, in each group of layers, between two steps. They are left alone until `withdraw`.
        host: where the pages may go.
    """

    def __init__(self, tables: Sequence[BlockTable], host: HostTier) -> None:
        self.lengths = tables[0].lengths.copy()
        """`(num_rows,)` tokens of each row."""
        self._tables = tables
        self._host = host
        self._swapped: SwappedRows | None = None
        self._is_done = threading.Event()  # what has taken them off the list
        self._is_abandoned = False
        self._unclaimed = [True]  # for the one who gives back what was abandoned
        self.turn = next(host.turns)
        self.offer()

    def offer(self) -> None:
        """Put them on the list, also again, at the place where they were."""
        self._host.offer(self)

    def move(self) -> bool:
        """Swap them out, who has just taken them off the list; return whether their pages are free."""
        try:
            # To whoever needs the pages it is all one why there is no room.
            with suppress(MemoryError, RuntimeError):
                self._swapped = SwappedRows(self._tables, self._host)
        finally:
            self._is_done.set()
            if self._is_abandoned and self._claims():
                self._give_back()
        return self._is_abandoned or self._swapped is not None

    def withdraw(self) -> SwappedRows | None:
        """Return what they are on the host; None if the tables hold them as before."""
        if not self._host.withdraw(self):
            self._is_done.wait()
        return self._swapped

    def abandon(self) -> None:
        """Give their pages back, in a finaliser, which may run in the middle of `move`, of this thread or another."""
        self._is_abandoned = True
        if self._host.withdraw(self) or (self._is_done.is_set() and self._claims()):
            self._give_back()

    def _claims(self) -> bool:
        try:
            return self._unclaimed.pop()
        except IndexError:
            return False

    def _give_back(self) -> None:
        self._swapped = None
        for table in self._tables:
            table.give_back()


@dataclass(frozen=True)
class _Rows:
    """What a block table held.

    Attributes:
        lengths: `(num_rows,)` tokens of each row, dropped ones included.
        starts: `(num_rows,)` tokens at the beginning of each row that have been dropped.
        pages: ids of each row's pages.
        storages: of the layers that had one.
    """

    lengths: Counts
    starts: Counts
    pages: list[list[int]]
    storages: list[LayerStorage]

    @property
    def distinct_pages(self) -> list[int]:
        return list(dict.fromkeys(page for row in self.pages for page in row))


def _rows_of(table: BlockTable) -> _Rows:
    pages = [table.row_pages(row) for row in range(table.num_rows)]
    return _Rows(table.lengths.copy(), table.starts.copy(), pages, table.group.storages())
