"""The block lists that FlexAttention reads, made from block tables.

The queries of a row that share a key/value head are stacked, so that keys and values are read once for all of them,
and cut into tiles of at most `max_tile_rows`. Each tile is one entry of the kernel's batch with its own lists of
pages. With 2 key/value heads, 6 query heads and one new token in each of 4 rows (decode) a tile is 3 stacked queries,
and there are 4 tiles. Pages that every query of a tile sees whole are `full` and read without a mask.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hf_paged.page_table import Counts, PageTable
from hf_paged.seats import Seats

Pages = npt.NDArray[np.int32]

_MIN_WIDTH = 2  # of the list of full pages: a size of 1 would need a kernel of its own


@dataclass
class Tiles:
    """One step's lists of pages on one device.

    Attributes:
        num_full: `(num_tiles, 1, 1)` int32, pages that a tile reads without a mask.
        full: `(num_tiles, 1, 1, width)` int32, their ids.
        num_partial: `(num_tiles, 1, 1)` int32, pages that a tile reads under the mask.
        partial: `(num_tiles, 1, 1, num_pages)` int32, their ids.
        page_index: `(num_pages,)` int32, the place of each page in its row; -1 for the sink page.
        seen: what a query sees of its row in partial pages. `(num_tiles, tile_rows, 2)` int32: the tokens before the
            first number and not before the second; or `(num_tiles, tile_length, max_tokens)` bool: each token or not.
        tile_length: query tokens of a tile.
        tiles_per_row: tiles of one row.
        group: query heads stacked on one key/value head.
        seats: where packed queries are in the tiles; None for those of a padded batch.
    """

    num_full: Tensor
    full: Tensor
    num_partial: Tensor
    partial: Tensor
    page_index: Tensor
    seen: Tensor
    tile_length: int
    tiles_per_row: int
    group: int
    seats: Seats | None = None


@dataclass(frozen=True)
class Layout:
    """What a layer wants its tiles to be like.

    Attributes:
        group: query heads on one key/value head.
        max_tile_rows: stacked queries that fit into one tile.
        device: where the kernel runs.
        sink_page: page that every tile reads beside those of its row; None without attention sinks.
    """

    group: int
    max_tile_rows: int
    device: torch.device
    sink_page: int | None = None


class Tiling:
    """Makes the tiles of each step, reusing one set of buffers while decoding.

    Args:
        table: the rows whose pages are read.
    """

    def __init__(self, table: PageTable) -> None:
        self._table = table
        self._decode: dict[tuple[int | None, Layout], _DecodeBuffers] = {}

    def causal(self, limits: Counts, firsts: Counts | None, window: int | None, layout: Layout) -> Tiles:
        """Tiles for queries that see the tokens of their row from `firsts` up to, not including, `limits`.

        Args:
            limits: `(num_rows, num_queries)`; 0 for padding, whose output is of no interest.
            firsts: like `limits`; None: from the beginning.
            window: tokens that a query sees at most; None where `firsts` is.
            layout: how to stack them.

        Raises:
            ValueError: if a token is to be seen that was dropped.
        """
        num_rows, num_queries = limits.shape
        self._check_kept(self._table.starts[:, None], limits, firsts)
        if num_queries == 1:
            buffers = self._decode.get((window, layout))
            if buffers is None or not buffers.fit(self._table, num_rows):
                buffers = self._decode[window, layout] = _DecodeBuffers(self._table, num_rows, window, layout)
            return buffers.fill(limits[:, 0], None if firsts is None else firsts[:, 0])
        tile_length, tiles_per_row = _cut(num_queries, layout)
        last, first = np.zeros((2, num_rows, tiles_per_row * tile_length), dtype=np.int64)
        last[:, :num_queries] = limits
        first[:, :num_queries] = 0 if firsts is None else firsts
        last, first = (array.reshape(num_rows * tiles_per_row, tile_length) for array in (last, first))
        return self._between(first, last, np.repeat(np.arange(num_rows), tiles_per_row), layout)

    def packed(self, rows: Counts, limits: Counts, firsts: Counts | None, num_queries: int, layout: Layout) -> Tiles:
        """Tiles for queries of several rows that follow one another; those behind `rows` belong to no row.

        Args:
            rows: `(num_tokens,)` row of each query, ascending.
            limits: `(num_tokens,)` as for `causal`.
            firsts: likewise.
            num_queries: not below `num_tokens`.
            layout: how to stack them.

        Raises:
            ValueError: if a token is to be seen that was dropped.
        """
        self._check_kept(self._table.starts[rows], limits, firsts)
        seats, tile_rows = Seats.of(rows, num_queries, layout.group, layout.max_tile_rows, layout.device)
        last, first = np.zeros((2, seats.num_tiles, seats.tile_length), dtype=np.int64)
        last.flat[seats.taken] = limits
        first.flat[seats.taken] = 0 if firsts is None else firsts
        return replace(self._between(first, last, tile_rows, layout), seats=seats, tiles_per_row=1)

    def _check_kept(self, starts: Counts, limits: Counts, firsts: Counts | None) -> None:
        if self._table.group.window is not None and (starts > (0 if firsts is None else firsts))[limits > 0].any():
            raise _dropped(self._table)

    def _between(self, first: Counts, last: Counts, rows: Counts, layout: Layout) -> Tiles:
        """Tiles of the rows `rows`, `(num_tiles,)`, whose queries `(num_tiles, tile_length)` see what is between."""
        page_size = self._table.group.page_size
        is_query = last > 0  # padding does not make pages partial
        limit = last.max(axis=1)
        begin = np.where(is_query, first, limit[:, None]).min(axis=1) // page_size
        begin_full = -(-np.where(is_query, first, 0).max(axis=1) // page_size)
        end_full = np.maximum(np.where(is_query, last, limit[:, None]).min(axis=1) // page_size, begin_full)
        end = -(-limit // page_size)
        num_full = end_full - begin_full
        # Partial pages lie before and behind the full ones, or everywhere if there are none.
        num_before = np.where(num_full > 0, begin_full - begin, end - begin)
        num_partial = np.where(num_full > 0, num_before + end - end_full, num_before)
        pages = self._table.block_table[rows]
        offsets = np.arange(max(1, int(num_partial.max())))
        places = offsets + np.where(offsets < num_before[:, None], begin[:, None], (end_full - num_before)[:, None])
        full = _listed(pages, begin_full[:, None] + np.arange(max(_MIN_WIDTH, int(num_full.max()))))
        seen = np.repeat(np.stack([last, first], axis=2), layout.group, axis=1).astype(np.int32)
        return self._tiles(num_full, full, num_partial, _listed(pages, places), seen, last.shape[1], layout)

    def dense(self, visible: npt.NDArray[np.bool_], layout: Layout) -> Tiles:
        """Tiles for queries that see just the tokens that `visible` says.

        Args:
            visible: `(num_rows, num_queries, max_tokens)`, with `max_tokens` a multiple of the page size.
            layout: how to stack them.

        Raises:
            ValueError: if a token is to be seen that was dropped.
        """
        page_size = self._table.group.page_size
        num_rows, num_queries, max_tokens = visible.shape
        starts = self._table.starts[:, None]
        if starts.any() and (visible.any(axis=1) & (np.arange(max_tokens) < starts)).any():
            raise _dropped(self._table)
        tile_length, tiles_per_row = _cut(num_queries, layout)
        padding = tiles_per_row * tile_length - num_queries
        # The queries that fill up the last tile see what the last query sees: then they make no page partial.
        tiled = np.pad(visible, ((0, 0), (0, padding), (0, 0)), mode="edge")
        tiled = tiled.reshape(num_rows * tiles_per_row, tile_length, max_tokens)
        by_page = tiled.reshape(len(tiled), tile_length, max_tokens // page_size, page_size)
        is_full = by_page.all(axis=(1, 3))
        is_partial = by_page.any(axis=(1, 3)) & ~is_full
        pages = np.repeat(self._table.block_table[:, : is_full.shape[1]], tiles_per_row, axis=0)
        full = np.take_along_axis(pages, np.argsort(~is_full, axis=1, kind="stable"), axis=1)
        full = np.pad(full, ((0, 0), (0, max(0, _MIN_WIDTH - full.shape[1]))))
        partial = np.take_along_axis(pages, np.argsort(~is_partial, axis=1, kind="stable"), axis=1)
        return self._tiles(is_full.sum(axis=1), full, is_partial.sum(axis=1), partial, tiled, tile_length, layout)

    def _tiles(
        self,
        num_full: Counts,
        full: Pages,
        num_partial: Counts,
        partial: Pages,
        seen: npt.NDArray[np.int32] | npt.NDArray[np.bool_],
        tile_length: int,
        layout: Layout,
    ) -> Tiles:
        page_index = self._table.group.page_index(layout.device)
        num_tiles, width = partial.shape
        ids = _empty_lists(num_tiles, len(page_index))
        ids[:, :width] = torch.from_numpy(partial)
        if layout.sink_page is not None:
            ids[np.arange(num_tiles), num_partial] = layout.sink_page
            num_partial = num_partial + 1
        return Tiles(
            num_full=torch.from_numpy(num_full.astype(np.int32)).view(-1, 1, 1).to(layout.device),
            full=torch.from_numpy(np.ascontiguousarray(full)).view(num_tiles, 1, 1, -1).to(layout.device),
            num_partial=torch.from_numpy(num_partial.astype(np.int32)).view(-1, 1, 1).to(layout.device),
            partial=ids.view(num_tiles, 1, 1, -1).to(layout.device),
            page_index=page_index,
            seen=torch.from_numpy(seen).to(layout.device),
            tile_length=tile_length,
            tiles_per_row=num_tiles // self._table.num_rows,
            group=layout.group,
        )


class _DecodeBuffers:
    """Tiles whose tensors stay and whose contents change: one query per row, so one tile per row.

    Without a window `full` is the block table itself, and a row's only partial page is its last one. With a window
    `full` is a list of its own, and the page where the window begins may be partial too.
    """

    def __init__(self, table: PageTable, num_rows: int, window: int | None, layout: Layout) -> None:
        self._table = table
        self._block_table = table.block_table
        self._page_index = table.group.page_index(layout.device)
        self._window = window
        self._layout = layout
        self._version = table.version
        with torch.inference_mode(False):  # they outlive the mode that they are made in
            self._allocate(num_rows, layout)

    def _allocate(self, num_rows: int, layout: Layout) -> None:
        device, page_size = layout.device, self._table.group.page_size
        self._num_full = torch.zeros(num_rows, dtype=torch.int32)
        self._num_partial = torch.zeros(num_rows, dtype=torch.int32)
        self._partial = _empty_lists(num_rows, len(self._page_index))
        self._seen = torch.zeros((num_rows, layout.group, 2), dtype=torch.int32)
        if self._window is None:
            self._full = torch.from_numpy(self._block_table)
        else:
            self._full = torch.zeros((num_rows, max(_MIN_WIDTH, self._window // page_size)), dtype=torch.int32)
        self._host = [self._num_full, self._num_partial, self._partial[:, :3], self._seen]
        self._row_index = np.arange(num_rows)
        # Views of the same memory: to make them takes as long as to fill them.
        self._written = tuple(tensor.numpy() for tensor in (*self._host[:2], self._partial, self._seen, self._full))
        # On the CPU `to` returns the same tensors, so filling the host side is all there is to do.
        num_full, num_partial, partial, seen = (
            tensor.to(device) for tensor in (self._num_full, self._num_partial, self._partial, self._seen)
        )
        self._mirror = [num_full, num_partial, partial[:, :3], seen]
        self._full_on_device = self._full.to(device)
        self._tiles = Tiles(
            num_full=num_full.view(-1, 1, 1),
            full=self._full_on_device.view(num_rows, 1, 1, -1),
            num_partial=num_partial.view(-1, 1, 1),
            partial=partial.view(num_rows, 1, 1, -1),
            page_index=self._page_index,
            seen=seen,
            tile_length=1,
            tiles_per_row=1,
            group=layout.group,
        )

    def fit(self, table: PageTable, num_rows: int) -> bool:
        """Whether these buffers can describe the step."""
        return (
            self._block_table is table.block_table
            and self._page_index is table.group.page_index(self._layout.device)
            and len(self._num_full) == num_rows
        )

    def fill(self, limits: Counts, firsts: Counts | None) -> Tiles:
        """Describe rows that see tokens from `firsts` to `limits`, both `(num_rows,)`."""
        page_size = self._table.group.page_size
        to_num_full, to_num_partial, partial, seen, full = self._written
        last, in_last = np.divmod(limits, page_size)
        num_full, num_partial = last, (in_last > 0).astype(np.int64)
        rows, width = self._row_index, self._block_table.shape[1] - 1
        partial[:, 0] = self._block_table[rows, np.minimum(last, width)]
        if firsts is not None:
            begin = firsts // page_size
            begin_full = -(-firsts // page_size)
            num_full = np.maximum(last - begin_full, 0)
            full[:] = _listed(self._block_table, begin_full[:, None] + np.arange(full.shape[1]))
            # The window begins inside of a page other than the last one, or inside of one that is full otherwise.
            begins_inside = (firsts % page_size > 0) & (begin < last)
            inside = rows[begins_inside]
            partial[inside, num_partial[inside]] = self._block_table[inside, begin[inside]]
            num_partial = num_partial + begins_inside
            seen[:, :, 1] = firsts[:, None]
        if self._layout.sink_page is not None:
            partial[rows, num_partial] = self._layout.sink_page
            num_partial = num_partial + 1
        to_num_full[:] = num_full
        to_num_partial[:] = num_partial
        seen[:, :, 0] = limits[:, None]
        if self._layout.device.type != "cpu":
            for mirror, host in zip(self._mirror, self._host, strict=True):
                mirror.copy_(host)
            if firsts is not None or self._version != self._table.version:
                self._full_on_device.copy_(self._full)
                self._version = self._table.version
        return self._tiles


def _cut(num_queries: int, layout: Layout) -> tuple[int, int]:
    tile_length = min(num_queries, max(1, layout.max_tile_rows // layout.group))
    return tile_length, -(-num_queries // tile_length)


def _listed(pages: Pages, places: Counts) -> Pages:
    """Ids of the pages at `places` of each row; any where the row has none."""
    return np.take_along_axis(pages, np.minimum(places, pages.shape[1] - 1), axis=1)


def _dropped(table: PageTable) -> ValueError:
    return ValueError(
        f"The mask wants tokens to be seen that have left the window of {table.group.window} tokens and were dropped. "
        "Use a model whose configuration names the window of these layers as it is, or a mask within it."
    )


def _empty_lists(num_tiles: int, num_pages: int) -> Tensor:
    # The CPU kernel wants lists as long as the pool has pages, though it reads only their first entries. The rest is
    # never touched, so it costs no memory.
    return torch.empty((num_tiles, num_pages), dtype=torch.int32)
