"""Rows whose pages are in memory of the host."""

from collections.abc import Sequence
from dataclasses import dataclass

from hf_paged.errors import OutOfPagesError
from hf_paged.pages.block_table import BlockTable, Counts
from hf_paged.pages.storage import LayerStorage
from hf_paged.pages.tiers.host import HostTier
from hf_paged.pages.tiers.transport import page_host_bytes, read_pages, write_pages


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
