"""From rows and what their queries see to block lists."""

from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hf_paged.attention.backends.block_lists import MIN_WIDTH, BlockLists, Layout, Pages, listed, pages_in_window
from hf_paged.attention.backends.query_tiles import QueryTiles
from hf_paged.batch.padding import BoolMatrix, Counts
from hf_paged.batch.steps.step import KVRanges
from hf_paged.pages.block_table import BlockTable

_decode_lists: WeakKeyDictionary[BlockTable, dict[tuple[int | None, Layout], "_DecodeLists"]] = WeakKeyDictionary()


def block_lists_of(table: BlockTable, ranges: KVRanges, layout: Layout) -> BlockLists:
    """Make the lists for queries that see one range of the tokens of their row.

    With one query for each row the tensors are those of the step before, with other contents.

    Args:
        table: the rows whose pages are read.
        ranges: what the queries see.
        layout: how to stack them.
    """
    kv_stop, kv_start, rows = ranges.kv_stop, ranges.kv_start, ranges.rows
    if rows is not None:
        query_tiles, tile_rows = QueryTiles.of(
            rows, ranges.num_queries, layout.gqa_ratio, layout.max_tile_rows, layout.device
        )
        last, first = np.zeros((2, query_tiles.num_tiles, query_tiles.tile_length), dtype=np.int64)
        last.flat[query_tiles.taken] = kv_stop
        first.flat[query_tiles.taken] = 0 if kv_start is None else kv_start
        return replace(_between(table, first, last, tile_rows, layout), query_tiles=query_tiles, tiles_per_row=1)
    num_rows, num_queries = kv_stop.shape
    if num_queries == 1:
        lists = _decode_lists.setdefault(table, {}) if ranges.is_whole else {}
        decode = lists.get((ranges.window, layout))
        if decode is None or not decode.fits(table):
            decode = lists[ranges.window, layout] = _DecodeLists(table, ranges.window, layout)
        decode.fill(table, kv_stop[:, 0], None if kv_start is None else kv_start[:, 0])
        return decode.block_lists
    tile_length, tiles_per_row = _cut(num_queries, layout)
    last, first = np.zeros((2, num_rows, tiles_per_row * tile_length), dtype=np.int64)
    last[:, :num_queries] = kv_stop
    first[:, :num_queries] = 0 if kv_start is None else kv_start
    last, first = (array.reshape(num_rows * tiles_per_row, tile_length) for array in (last, first))
    return _between(table, first, last, np.repeat(np.arange(num_rows), tiles_per_row), layout)


def block_lists_of_tokens(table: BlockTable, visible: BoolMatrix, layout: Layout) -> BlockLists:
    """Make the lists for queries that see just the tokens that `visible` says.

    Args:
        table: the rows whose pages are read.
        visible: `(num_rows, num_queries, max_tokens)`, with `max_tokens` a multiple of the page size.
        layout: how to stack them.
    """
    page_size = table.group.page_size
    num_rows, num_queries, max_tokens = visible.shape
    tile_length, tiles_per_row = _cut(num_queries, layout)
    padding = tiles_per_row * tile_length - num_queries
    # The queries that fill up the last tile see what the last query sees: then they make no page partial.
    tiled = np.pad(visible, ((0, 0), (0, padding), (0, 0)), mode="edge")
    tiled = tiled.reshape(num_rows * tiles_per_row, tile_length, max_tokens)
    by_page = tiled.reshape(len(tiled), tile_length, max_tokens // page_size, page_size)
    is_partial = by_page.any(axis=(1, 3))
    pages = np.repeat(table.block_table[:, : by_page.shape[2]], tiles_per_row, axis=0)
    full = None
    if layout.lists_full:
        is_full = by_page.all(axis=(1, 3))
        is_partial = is_partial & ~is_full
        missing = max(0, MIN_WIDTH - pages.shape[1])
        full = is_full.sum(axis=1), np.pad(_first(pages, is_full), ((0, 0), (0, missing)))
    return _lists_of(table, full, is_partial.sum(axis=1), _first(pages, is_partial), tiled, tile_length, layout)


def _between(table: BlockTable, first: Counts, last: Counts, rows: Counts, layout: Layout) -> BlockLists:
    """Tiles of the rows `rows`, `(num_tiles,)`, whose queries `(num_tiles, tile_length)` see what is between."""
    page_size = table.group.page_size
    is_query = last > 0  # those that see nothing make no page partial
    limit = last.max(axis=1)
    begin = np.where(is_query, first, limit[:, None]).min(axis=1) // page_size
    end = -(-limit // page_size)
    pages = table.block_table[rows]
    seen = np.repeat(np.stack([last, first], axis=2), layout.gqa_ratio, axis=1).astype(np.int32)
    if not layout.lists_full:
        places = begin[:, None] + np.arange(max(1, int((end - begin).max())))
        return _lists_of(table, None, end - begin, listed(pages, places), seen, last.shape[1], layout)
    begin_full = -(-np.where(is_query, first, 0).max(axis=1) // page_size)
    end_full = np.maximum(np.where(is_query, last, limit[:, None]).min(axis=1) // page_size, begin_full)
    num_full = end_full - begin_full
    # Partial pages lie before and behind the full ones, or everywhere if there are none.
    num_before = np.where(num_full > 0, begin_full - begin, end - begin)
    num_partial = np.where(num_full > 0, num_before + end - end_full, num_before)
    offsets = np.arange(max(1, int(num_partial.max())))
    places = offsets + np.where(offsets < num_before[:, None], begin[:, None], (end_full - num_before)[:, None])
    full = listed(pages, begin_full[:, None] + np.arange(max(MIN_WIDTH, int(num_full.max()))))
    return _lists_of(table, (num_full, full), num_partial, listed(pages, places), seen, last.shape[1], layout)


def _lists_of(
    table: BlockTable,
    full: tuple[Counts, Pages] | None,
    num_partial: Counts,
    partial: Pages,
    seen: npt.NDArray[np.int32] | npt.NDArray[np.bool_],
    tile_length: int,
    layout: Layout,
) -> BlockLists:
    physical_to_logical = table.group.physical_to_logical(layout.device)
    num_tiles, width = partial.shape
    ids = layout.empty_lists(num_tiles, width if layout.sink_page is None else width + 1, len(physical_to_logical))
    ids[:, :width] = torch.from_numpy(partial)
    if layout.sink_page is not None:
        ids[np.arange(num_tiles), num_partial] = layout.sink_page
        num_partial = num_partial + 1

    def sent(array: npt.NDArray[np.integer[Any]]) -> Tensor:
        int32 = np.ascontiguousarray(array, dtype=np.int32)
        return torch.from_numpy(int32).view(num_tiles, 1, 1, *int32.shape[1:]).to(layout.device, non_blocking=True)

    return BlockLists(
        full_kv_num_blocks=None if full is None else sent(full[0]),
        full_kv_indices=None if full is None else sent(full[1]),
        kv_num_blocks=sent(num_partial),
        kv_indices=ids.view(num_tiles, 1, 1, -1).to(layout.device, non_blocking=True),
        physical_to_logical=physical_to_logical,
        seen=torch.from_numpy(seen).to(layout.device, non_blocking=True),
        tile_length=tile_length,
        tiles_per_row=num_tiles // table.num_rows,
        gqa_ratio=layout.gqa_ratio,
    )


def _first(pages: Pages, chosen: npt.ArrayLike) -> Pages:
    """The chosen pages of each row before the others."""
    return np.take_along_axis(pages, np.argsort(np.logical_not(chosen), axis=1, kind="stable"), axis=1)


def _cut(num_queries: int, layout: Layout) -> tuple[int, int]:
    tile_length = min(num_queries, max(1, layout.max_tile_rows // layout.gqa_ratio))
    return tile_length, -(-num_queries // tile_length)


class _DecodeLists:
    """The tensors for one number of rows, and how to fill them.

    All pages are partial, the sink page the first of them. The kernel is made for a number of tiles, so there are as
    many as the next power of two; those beyond the rows read nothing.

    Args:
        table: the rows, which are not held: they are freed as soon as nobody else holds them.
        window: tokens that a query sees at most; None without a bound.
        layout: what the tiles are to be like.
    """

    def __init__(self, table: BlockTable, window: int | None, layout: Layout) -> None:
        self._num_rows = table.num_rows
        self._page_size = table.group.page_size
        self._block_table = table.block_table
        self._physical_to_logical = table.group.physical_to_logical(layout.device)
        self._layout = layout
        width = self._block_table.shape[1]
        if window is not None:
            width = min(width, pages_in_window(self._page_size, window))
        with torch.inference_mode(False):  # they outlive the mode that they are made in
            self.block_lists = self._allocate(width)

    def fits(self, table: BlockTable) -> bool:
        """Whether these can describe the step."""
        return (
            self._block_table is table.block_table
            and self._physical_to_logical is table.group.physical_to_logical(self._layout.device)
            and self._num_rows == table.num_rows
        )

    def _allocate(self, width: int) -> BlockLists:
        layout, num_tiles = self._layout, 1 << (self._num_rows - 1).bit_length()
        self._num_sinks = 0 if layout.sink_page is None else 1
        lists = layout.empty_lists(num_tiles, self._num_sinks + width, len(self._physical_to_logical))
        lists.fill_(layout.sink_page or 0)
        # What changes with every step lies together, to be sent together.
        small = torch.zeros(num_tiles * (1 + 2 * layout.gqa_ratio), dtype=torch.int32)
        self._num_pages = small.numpy()[: self._num_rows]
        self._seen = small.numpy()[num_tiles:].reshape(num_tiles, layout.gqa_ratio, 2)
        self._lists = lists.numpy()[: self._num_rows, self._num_sinks : self._num_sinks + width]
        self._version = -1
        small_there, lists_there = (
            small.to(layout.device, non_blocking=True),
            lists.to(layout.device, non_blocking=True),
        )
        self._small, self._lists_whole = (small_there, small), (lists_there, lists)
        return BlockLists(
            full_kv_num_blocks=None,
            full_kv_indices=None,
            kv_num_blocks=small_there[:num_tiles].view(-1, 1, 1),
            kv_indices=lists_there.view(num_tiles, 1, 1, -1),
            physical_to_logical=self._physical_to_logical,
            seen=small_there[num_tiles:].view(num_tiles, layout.gqa_ratio, 2),
            tile_length=1,
            tiles_per_row=1,
            gqa_ratio=layout.gqa_ratio,
        )

    def fill(self, table: BlockTable, kv_stop: Counts, kv_start: Counts | None) -> None:
        """Describe rows that see tokens from `kv_start` to `kv_stop`, both `(num_rows,)`; None: from the beginning."""
        page_size, rows = self._page_size, slice(self._num_rows)
        begin = np.zeros_like(kv_stop) if kv_start is None else kv_start // page_size
        self._num_pages[:] = np.maximum(-(-kv_stop // page_size) - begin, 0) + self._num_sinks
        self._seen[rows, :, 0] = kv_stop[:, None]
        changed = [self._small]
        if kv_start is not None:
            self._seen[rows, :, 1] = kv_start[:, None]
            self._lists[:] = listed(self._block_table, begin[:, None] + np.arange(self._lists.shape[1]))
            changed.append(self._lists_whole)
        elif self._version != table.version:
            self._lists[:] = self._block_table[:, : self._lists.shape[1]]
            self._version = table.version
            changed.append(self._lists_whole)
        for there, here in changed:
            if there is not here:
                # The memory here is not pinned, so it may be filled again as soon as this returns.
                there.copy_(here, non_blocking=True)
