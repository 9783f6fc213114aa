"""The rows of a prompt as a prefix index knows them."""

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from torch import Tensor

from hf_paged.batch.padding import Columns, Counts
from hf_paged.batch.prompt.common_prefix import first_run, real_columns
from hf_paged.batch.rows import Rows
from hf_paged.pages.block_table import BlockTable
from hf_paged.pages.pool import PagePool
from hf_paged.pages.prefix_index import TOKEN_BYTES, Prefix
from hf_paged.pages.tiers.arrivals import Arrivals

_WORTH_WAITING = 64  # tokens; a pass of its own for fewer saves nothing


class RowPrefixes:
    """Finds the beginnings of rows in the index of their pool, and lets the rows be found there.

    Args:
        pool: where the rows are; has an index.
        origin: what makes the keys and values.
        ids: `(num_rows, num_columns)` what is in the columns, those before the prompt included.
        columns: which of them are tokens.
        only: the rows that are meant; None for all.

    Attributes:
        arrivals: of pages that are brought back from the tiers of the pool; None without.
        found: what was found, by row.
    """

    def __init__(
        self, pool: PagePool, origin: Hashable, ids: Counts, columns: Columns, only: Iterable[int] | None = None
    ) -> None:
        assert pool.prefix_index is not None
        self._index = index = pool.prefix_index
        self.found: dict[int, Prefix] = {}
        self.arrivals: Arrivals | None = None if index.tiers is None else index.tiers.arrivals()
        # A window is one of columns. Tokens behind padding within a row see fewer others through it than they would
        # without the padding, so that they are neither looked for nor found.
        has_windows = any(group.window is not None for group in pool.groups)
        self._origin = origin
        self._page_bytes = index.page_size * TOKEN_BYTES
        real = real_columns(columns, len(ids))
        chosen = first_run(real) if has_windows else real
        self._rows = {
            row: ids[row][chosen[row]].astype("<i4").tobytes() for row in (range(len(ids)) if only is None else only)
        }
        self._num_indexed = dict.fromkeys(self._rows, 0)  # pages that can be found, or that others have

    def adopt(self, tables: Sequence[BlockTable], rows: Sequence[int]) -> list[int]:
        """Let rows begin with the pages that are found, where these hold more tokens than the rows do.

        A row that would compute the same tokens as one before it waits instead, to find them.

        Args:
            tables: the rows, in each group.
            rows: that are to be computed.

        Returns:
            Those that don't wait.
        """
        least = -(-_WORTH_WAITING // self._index.page_size)
        chosen, beginnings = [], set()
        for row in rows:
            prefix = self._index.match(self._origin, self._rows[row])
            num_held = int(tables[0].lengths[row])
            end = (max(prefix.num_pages, num_held // self._index.page_size) + least) * self._page_bytes
            beginning = self._rows[row][:end]
            if len(beginning) == end and beginning in beginnings:
                _let_go(prefix, tables)
                continue
            beginnings.add(beginning)
            chosen.append(row)
            if num_held:
                if num_held >= prefix.num_pages * self._index.page_size:
                    _let_go(prefix, tables)
                    continue
                for table in tables:
                    table.release([row])
            self._num_indexed[row] = prefix.num_pages
            self.found[row] = prefix
            prefix = self._extended(row, prefix)
            num_tokens = prefix.num_pages * self._index.page_size
            for table, pages, start in zip(tables, prefix.pages, prefix.starts, strict=True):
                table.adopt(row, pages, start, num_tokens)
            self._index.count(len(self._rows[row]) // TOKEN_BYTES, num_tokens)
        return chosen

    def _extended(self, row: int, prefix: Prefix) -> Prefix:
        """Go on in the tiers where a prefix ends on the device."""
        tiers, tokens = self._index.tiers, self._rows[row]
        if tiers is None or self.arrivals is None:
            return prefix
        ahead = self._index.ahead(self._origin, tokens, prefix.num_pages)
        return tiers.extend(self._origin, tokens, prefix, ahead, self.arrivals)

    def add(self, tables: Sequence[BlockTable]) -> None:
        """Let the full pages of the rows be found.

        Args:
            tables: the rows, in each group.
        """
        for row, tokens in self._rows.items():
            num_tokens = min(len(tokens) // TOKEN_BYTES, int(tables[0].lengths[row]))
            num_full = num_tokens // self._index.page_size
            if num_full <= self._num_indexed[row]:
                continue
            pages = [
                {place: page for page, place in table.placed_pages(row) if self._num_indexed[row] <= place < num_full}
                for table in tables
            ]
            self._index.add(self._origin, tokens, pages)
            self._num_indexed[row] = num_full

    def keep(self, row: int, num_tokens: int, states: Any) -> None:
        """Let states of recurrent layers be found, of a row whose pages can be.

        Args:
            row: index of the row.
            num_tokens: that they are behind, in full pages.
            states: what the `Prefix` that ends there will have.
        """
        self._index.keep(self._origin, self._rows[row], num_tokens // self._index.page_size, states)


def is_findable(rows: Rows) -> bool:
    """Whether all tokens of rows are known, and nothing but these has made their keys and values."""
    return rows.origin is not None and rows.known_ids.are_all(rows.columns.count)


def let_be_found(rows: Rows, ids: Tensor, only: Iterable[int] | None = None) -> None:
    """Let the full pages of rows that are findable be found.

    Args:
        rows: that are findable.
        ids: `(num_rows, at least num_columns)`.
        only: the rows that are meant; None for all.
    """
    on_host = ids[:, : rows.columns.count].cpu().numpy()
    RowPrefixes(rows.pool, rows.origin, on_host, rows.columns, only).add(rows.tables)


def let_finished_be_found(rows: Rows, only: Sequence[int]) -> None:
    """Let the full pages of rows be found that are about to be released, where that may be."""
    if rows.pool.prefix_index is None or not rows.columns.count or not is_findable(rows):
        return
    known = rows.known_ids.known
    assert known is not None
    let_be_found(rows, known[0].expand(rows.count, -1), only)


def _let_go(prefix: Prefix, tables: Sequence[BlockTable]) -> None:
    for table, pages in zip(tables, prefix.pages, strict=True):
        table.group.allocator.release(pages)
