"""From rows and what their queries see to tiles."""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hf_paged.attention.backends.block_lists import MIN_WIDTH, Layout, Pages, Tiles, listed
from hf_paged.attention.backends.decoding import DecodeTiles
from hf_paged.attention.backends.kv_splits import DecodeUnits, Units
from hf_paged.attention.backends.query_tiles import Seats
from hf_paged.batch.columns import Counts
from hf_paged.pages.block_table import PageTable


class Tiling:
    """Makes the tiles of each step, reusing one set of buffers while decoding.

    Args:
        table: the rows whose pages are read.
    """

    def __init__(self, table: PageTable) -> None:
        self._table = table
        self._decode: dict[tuple[int | None, Layout], DecodeTiles] = {}
        self._units: dict[int | None, DecodeUnits] = {}

    def causal(self, limits: Counts, firsts: Counts | None, window: int | None, layout: Layout) -> Tiles:
        """Tiles for queries that see the tokens of their row from `firsts` up to, not including, `limits`.

        Args:
            limits: `(num_rows, num_queries)`; 0 for queries that see nothing.
            firsts: like `limits`; None: from the beginning.
            window: tokens that a query sees at most; None where `firsts` is.
            layout: how to stack them.

        Raises:
            ValueError: if a token is to be seen that was dropped.
        """
        num_rows, num_queries = limits.shape
        check_kept(self._table, self._table.starts[:, None], limits, firsts)
        if num_queries == 1:
            decode = self._decode.get((window, layout))
            if decode is None or not decode.fit(self._table, num_rows):
                decode = self._decode[window, layout] = DecodeTiles(self._table, num_rows, window, layout)
            decode.fill(limits[:, 0], None if firsts is None else firsts[:, 0])
            return decode.tiles
        tile_length, tiles_per_row = _cut(num_queries, layout)
        last, first = np.zeros((2, num_rows, tiles_per_row * tile_length), dtype=np.int64)
        last[:, :num_queries] = limits
        first[:, :num_queries] = 0 if firsts is None else firsts
        last, first = (array.reshape(num_rows * tiles_per_row, tile_length) for array in (last, first))
        return self._between(first, last, np.repeat(np.arange(num_rows), tiles_per_row), layout)

    def units(self, limits: Counts, firsts: Counts | None, window: int | None) -> Units:
        """Units for one query of each row, on a CPU.

        Args:
            limits: `(num_rows,)` as for `causal`.
            firsts: likewise.
            window: likewise.

        Raises:
            ValueError: if a token is to be seen that was dropped.
        """
        check_kept(self._table, self._table.starts, limits, firsts)
        return self._units.setdefault(window, DecodeUnits(self._table)).fill(limits, firsts)

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
        check_kept(self._table, self._table.starts[rows], limits, firsts)
        seats, tile_rows = Seats.of(rows, num_queries, layout.group, layout.max_tile_rows, layout.device)
        last, first = np.zeros((2, seats.num_tiles, seats.tile_length), dtype=np.int64)
        last.flat[seats.taken] = limits
        first.flat[seats.taken] = 0 if firsts is None else firsts
        return replace(self._between(first, last, tile_rows, layout), seats=seats, tiles_per_row=1)

    def _between(self, first: Counts, last: Counts, rows: Counts, layout: Layout) -> Tiles:
        """Tiles of the rows `rows`, `(num_tiles,)`, whose queries `(num_tiles, tile_length)` see what is between."""
        page_size = self._table.group.page_size
        is_query = last > 0  # those that see nothing make no page partial
        limit = last.max(axis=1)
        begin = np.where(is_query, first, limit[:, None]).min(axis=1) // page_size
        end = -(-limit // page_size)
        pages = self._table.block_table[rows]
        seen = np.repeat(np.stack([last, first], axis=2), layout.group, axis=1).astype(np.int32)
        if not layout.lists_full:
            places = begin[:, None] + np.arange(max(1, int((end - begin).max())))
            return self._tiles(None, end - begin, listed(pages, places), seen, last.shape[1], layout)
        begin_full = -(-np.where(is_query, first, 0).max(axis=1) // page_size)
        end_full = np.maximum(np.where(is_query, last, limit[:, None]).min(axis=1) // page_size, begin_full)
        num_full = end_full - begin_full
        # Partial pages lie before and behind the full ones, or everywhere if there are none.
        num_before = np.where(num_full > 0, begin_full - begin, end - begin)
        num_partial = np.where(num_full > 0, num_before + end - end_full, num_before)
        offsets = np.arange(max(1, int(num_partial.max())))
        places = offsets + np.where(offsets < num_before[:, None], begin[:, None], (end_full - num_before)[:, None])
        full = listed(pages, begin_full[:, None] + np.arange(max(MIN_WIDTH, int(num_full.max()))))
        return self._tiles((num_full, full), num_partial, listed(pages, places), seen, last.shape[1], layout)

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
        is_partial = by_page.any(axis=(1, 3))
        pages = np.repeat(self._table.block_table[:, : by_page.shape[2]], tiles_per_row, axis=0)
        full = None
        if layout.lists_full:
            is_full = by_page.all(axis=(1, 3))
            is_partial = is_partial & ~is_full
            missing = max(0, MIN_WIDTH - pages.shape[1])
            full = is_full.sum(axis=1), np.pad(_first(pages, is_full), ((0, 0), (0, missing)))
        return self._tiles(full, is_partial.sum(axis=1), _first(pages, is_partial), tiled, tile_length, layout)

    def _tiles(
        self,
        full: tuple[Counts, Pages] | None,
        num_partial: Counts,
        partial: Pages,
        seen: npt.NDArray[np.int32] | npt.NDArray[np.bool_],
        tile_length: int,
        layout: Layout,
    ) -> Tiles:
        page_index = self._table.group.page_index(layout.device)
        num_tiles, width = partial.shape
        ids = layout.empty_lists(num_tiles, width if layout.sink_page is None else width + 1, len(page_index))
        ids[:, :width] = torch.from_numpy(partial)
        if layout.sink_page is not None:
            ids[np.arange(num_tiles), num_partial] = layout.sink_page
            num_partial = num_partial + 1

        def sent(array: npt.NDArray[np.integer[Any]]) -> Tensor:
            int32 = np.ascontiguousarray(array, dtype=np.int32)
            return torch.from_numpy(int32).view(num_tiles, 1, 1, *int32.shape[1:]).to(layout.device)

        return Tiles(
            num_full=None if full is None else sent(full[0]),
            full=None if full is None else sent(full[1]),
            num_partial=sent(num_partial),
            partial=ids.view(num_tiles, 1, 1, -1).to(layout.device),
            page_index=page_index,
            seen=torch.from_numpy(seen).to(layout.device),
            tile_length=tile_length,
            tiles_per_row=num_tiles // self._table.num_rows,
            group=layout.group,
        )


def _first(pages: Pages, chosen: npt.ArrayLike) -> Pages:
    """The chosen pages of each row before the others."""
    return np.take_along_axis(pages, np.argsort(np.logical_not(chosen), axis=1, kind="stable"), axis=1)


def _cut(num_queries: int, layout: Layout) -> tuple[int, int]:
    tile_length = min(num_queries, max(1, layout.max_tile_rows // layout.group))
    return tile_length, -(-num_queries // tile_length)


def check_kept(table: PageTable, starts: Counts, limits: Counts, firsts: Counts | None) -> None:
    """Raise if a query is to see tokens between `firsts` and `limits` that were dropped, those before `starts`."""
    if table.group.window is not None and (starts > (0 if firsts is None else firsts))[limits > 0].any():
        raise _dropped(table)


def _dropped(table: PageTable) -> ValueError:
    return ValueError(
        f"The mask wants tokens to be seen that have left the window of {table.group.window} tokens and were dropped. "
        "Use a model whose configuration names the window of these layers as it is, or a mask within it."
    )
