"""The block lists that FlexAttention reads, made from block tables.

The queries of a row that share a key/value head are stacked, so that keys and values are read once for all of them,
and cut into tiles of at most `max_tile_rows`. Each tile is one entry of the kernel's batch with its own lists of
pages. With 2 key/value heads, 6 query heads and one new token in each of 4 rows (decode) a tile is 3 stacked queries,
and there are 4 tiles. Pages that every query of a tile sees whole are `full` and read without a mask.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hf_paged.page_table import PageTable

Ints = npt.NDArray[np.int64]


@dataclass
class Tiles:
    """One step's lists of pages on one device.

    Attributes:
        num_full: `(num_tiles, 1, 1)` int32, pages that a tile reads without a mask.
        full: `(num_tiles, 1, 1, width)` int32, their ids.
        num_partial: `(num_tiles, 1, 1)` int32, pages that a tile reads under the mask.
        partial: `(num_tiles, 1, 1, num_pages)` int32, their ids.
        page_index: `(num_pages,)` int32, the place of each page in its row.
        seen: what a query sees of its row in partial pages. `(num_tiles, tile_rows)` int32: the first so many tokens,
            for each stacked query; or `(num_tiles, tile_length, max_tokens)` bool: each token or not.
        tile_length: query tokens of a tile.
        tiles_per_row: tiles of one row.
        group: query heads stacked on one key/value head.
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


class Tiling:
    """Makes the tiles of each step, reusing one set of buffers while decoding.

    Args:
        table: the rows whose pages are read.
    """

    def __init__(self, table: PageTable) -> None:
        self._table = table
        self._decode: _DecodeBuffers | None = None

    def causal(self, limits: Ints, group: int, max_tile_rows: int, device: torch.device) -> Tiles:
        """Tiles for queries that see the first `limits` tokens of their row.

        Args:
            limits: `(num_rows, num_queries)`; 0 for padding, whose output is of no interest.
            group: query heads on one key/value head.
            max_tile_rows: stacked queries that fit into one tile.
            device: where the kernel runs.
        """
        num_rows, num_queries = limits.shape
        if num_queries == 1:
            if self._decode is None or not self._decode.fits(self._table, num_rows, group, device):
                self._decode = _DecodeBuffers(self._table, num_rows, group, device)
            return self._decode.fill(limits[:, 0])
        page_size = self._table.pool.page_size
        tile_length, tiles_per_row = _cut(num_queries, group, max_tile_rows)
        tiled = np.zeros((num_rows, tiles_per_row * tile_length), dtype=np.int64)
        tiled[:, :num_queries] = limits
        tiled = tiled.reshape(num_rows * tiles_per_row, tile_length)
        last = tiled.max(axis=1)
        first = np.where(tiled > 0, tiled, last[:, None]).min(axis=1)  # padding does not make pages partial
        num_full, stop = first // page_size, -(-last // page_size)
        pages = np.repeat(self._table.block_table, tiles_per_row, axis=0)
        num_partial = stop - num_full
        offsets = num_full[:, None] + np.arange(max(1, int(num_partial.max())))
        partial = np.take_along_axis(pages, np.minimum(offsets, pages.shape[1] - 1), axis=1)
        return self._tiles(
            num_full, pages, num_partial, partial, tile_length, tiles_per_row, group, device,
            seen=np.repeat(tiled, group, axis=1).astype(np.int32),
        )  # fmt: skip

    def dense(self, visible: npt.NDArray[np.bool_], group: int, max_tile_rows: int, device: torch.device) -> Tiles:
        """Tiles for queries that see just the tokens that `visible` says.

        Args:
            visible: `(num_rows, num_queries, max_tokens)`, with `max_tokens` a multiple of the page size.
            group: query heads on one key/value head.
            max_tile_rows: stacked queries that fit into one tile.
            device: where the kernel runs.
        """
        page_size = self._table.pool.page_size
        num_rows, num_queries, max_tokens = visible.shape
        tile_length, tiles_per_row = _cut(num_queries, group, max_tile_rows)
        padding = tiles_per_row * tile_length - num_queries
        # The queries that fill up the last tile see what the last query sees: then they make no page partial.
        tiled = np.pad(visible, ((0, 0), (0, padding), (0, 0)), mode="edge")
        tiled = tiled.reshape(num_rows * tiles_per_row, tile_length, max_tokens)
        by_page = tiled.reshape(len(tiled), tile_length, max_tokens // page_size, page_size)
        is_full = by_page.all(axis=(1, 3))
        is_partial = by_page.any(axis=(1, 3)) & ~is_full
        pages = np.repeat(self._table.block_table[:, : is_full.shape[1]], tiles_per_row, axis=0)
        full = np.take_along_axis(pages, np.argsort(~is_full, axis=1, kind="stable"), axis=1)
        partial = np.take_along_axis(pages, np.argsort(~is_partial, axis=1, kind="stable"), axis=1)
        return self._tiles(
            is_full.sum(axis=1), full, is_partial.sum(axis=1), partial, tile_length, tiles_per_row, group, device,
            seen=tiled,
        )  # fmt: skip

    def _tiles(
        self,
        num_full: Ints,
        full: npt.NDArray[np.int32],
        num_partial: Ints,
        partial: npt.NDArray[np.int32],
        tile_length: int,
        tiles_per_row: int,
        group: int,
        device: torch.device,
        seen: npt.NDArray[np.int32] | npt.NDArray[np.bool_],
    ) -> Tiles:
        page_index = self._table.pool.page_index(device)
        num_tiles, width = partial.shape
        ids = _empty_lists(num_tiles, len(page_index))
        ids[:, :width] = torch.from_numpy(partial)
        return Tiles(
            num_full=torch.from_numpy(num_full.astype(np.int32)).view(-1, 1, 1).to(device),
            full=torch.from_numpy(np.ascontiguousarray(full)).view(num_tiles, 1, 1, -1).to(device),
            num_partial=torch.from_numpy(num_partial.astype(np.int32)).view(-1, 1, 1).to(device),
            partial=ids.view(num_tiles, 1, 1, -1).to(device),
            page_index=page_index,
            seen=torch.from_numpy(seen).to(device),
            tile_length=tile_length,
            tiles_per_row=tiles_per_row,
            group=group,
        )


class _DecodeBuffers:
    """Tiles whose tensors stay and whose contents change: one query per row, so one tile per row.

    `full` is the block table itself, and a row's only partial page is its last one.
    """

    def __init__(self, table: PageTable, num_rows: int, group: int, device: torch.device) -> None:
        self._table = table
        self._block_table = table.block_table
        self._page_index = table.pool.page_index(device)
        self._device = device
        self._version = table.version
        num_pages = len(self._page_index)
        with torch.inference_mode(False):  # they outlive the mode that they are made in
            self._allocate(num_rows, num_pages, group, device)

    def _allocate(self, num_rows: int, num_pages: int, group: int, device: torch.device) -> None:
        self._num_full = torch.zeros(num_rows, dtype=torch.int32)
        self._num_partial = torch.zeros(num_rows, dtype=torch.int32)
        self._partial = _empty_lists(num_rows, num_pages)
        self._limits = torch.zeros((num_rows, group), dtype=torch.int32)
        self._host = [self._num_full, self._num_partial, self._partial[:, :1], self._limits]
        # On the CPU `to` returns the same tensors, so filling the host side is all there is to do.
        num_full, num_partial, partial, limits = (
            tensor.to(device) for tensor in (self._num_full, self._num_partial, self._partial, self._limits)
        )
        self._mirror = [num_full, num_partial, partial[:, :1], limits]
        self._full = torch.from_numpy(self._block_table).to(device)
        self._tiles = Tiles(
            num_full=num_full.view(-1, 1, 1),
            full=self._full.view(num_rows, 1, 1, -1),
            num_partial=num_partial.view(-1, 1, 1),
            partial=partial.view(num_rows, 1, 1, -1),
            page_index=self._page_index,
            seen=limits,
            tile_length=1,
            tiles_per_row=1,
            group=group,
        )

    def fits(self, table: PageTable, num_rows: int, group: int, device: torch.device) -> bool:
        """Whether these buffers can describe the step."""
        return (
            self._block_table is table.block_table
            and self._page_index is table.pool.page_index(device)
            and self._limits.shape == (num_rows, group)
            and self._device == device
        )

    def fill(self, lengths: Ints) -> Tiles:
        """Describe rows of `lengths` `(num_rows,)` tokens."""
        page_size = self._table.pool.page_size
        num_full = lengths // page_size
        rows = np.arange(len(lengths))
        width = self._block_table.shape[1]
        self._num_full.numpy()[:] = num_full
        self._num_partial.numpy()[:] = lengths % page_size > 0
        self._partial.numpy()[:, 0] = self._block_table[rows, np.minimum(num_full, width - 1)]
        self._limits.numpy()[:] = lengths[:, None]
        if self._device.type != "cpu":
            for mirror, host in zip(self._mirror, self._host, strict=True):
                mirror.copy_(host)
            if self._version != self._table.version:
                self._full.copy_(torch.from_numpy(self._block_table))
                self._version = self._table.version
        return self._tiles


def _cut(num_queries: int, group: int, max_tile_rows: int) -> tuple[int, int]:
    tile_length = min(num_queries, max(1, max_tile_rows // group))
    return tile_length, -(-num_queries // tile_length)


def _empty_lists(num_tiles: int, num_pages: int) -> Tensor:
    # The CPU kernel wants lists as long as the pool has pages, though it reads only their first entries. The rest is
    # never touched, so it costs no memory.
    return torch.empty((num_tiles, num_pages), dtype=torch.int32)
