"""Where packed queries sit in the tiles of their rows."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class QueryTiles:
    """An order of packed queries in which no tile has queries of two rows.

    With 3 queries of one row, 2 of the next, and tiles of 2, the tiles are `[0, 1] [2, -] [3, 4]`.

    Attributes:
        num_tiles: tiles, at least 2, as a single one would need a kernel of its own.
        tile_length: queries of a tile.
        taken: `(num_tokens,)` the place of each query in the tiles that belongs to a row.
        queries: `(num_tiles * tile_length,)` int64, the query in each place; any where there is none.
        positions: `(num_queries,)` int64, the place of each query in the tiles; any of those that belong to no row.
    """

    num_tiles: int
    tile_length: int
    taken: Indices
    queries: Tensor
    positions: Tensor

    @classmethod
    def of(
        cls, rows: Indices, num_queries: int, gqa_ratio: int, max_tile_rows: int, device: torch.device
    ) -> tuple["QueryTiles", Indices]:
        """Put queries into tiles.

        Args:
            rows: `(num_tokens,)` row of each query, ascending.
            num_queries: not below `num_tokens`; the queries behind belong to no row.
            gqa_ratio: query heads that are stacked for each query.
            max_tile_rows: stacked queries that fit into one tile.
            device: where the queries are.

        Returns:
            The tiles, and `(num_tiles,)` the row of each tile.
        """
        own_rows, begins, counts = np.unique(rows, return_index=True, return_counts=True)
        # Not one stacked query either: it would need a kernel of its own, too.
        tile_length = min(max(2, int(counts.max(initial=0))), max(1, max_tile_rows // gqa_ratio))
        tiles = -(-counts // tile_length)
        first_tiles = tiles.cumsum() - tiles
        taken = np.arange(len(rows)) + np.repeat(first_tiles * tile_length - begins, counts)
        num_tiles = max(2, int(tiles.sum()))
        queries = np.zeros(num_tiles * tile_length, dtype=np.int64)
        queries[taken] = np.arange(len(rows))
        positions = np.zeros(num_queries, dtype=np.int64)
        positions[: len(rows)] = taken
        tile_rows = np.zeros(num_tiles, dtype=np.int64)
        tile_rows[: int(tiles.sum())] = np.repeat(own_rows, tiles)
        on_device = (torch.from_numpy(array).to(device, non_blocking=True) for array in (queries, positions))
        return cls(num_tiles, tile_length, taken, *on_device), tile_rows

    def spread(self, query: Tensor) -> Tensor:
        """`(1, num_heads, num_queries, head_dim)` to `(num_tiles, num_heads, tile_length, head_dim)`."""
        num_heads, head_dim = query.shape[1], query.shape[3]
        tiled = query[0].index_select(1, self.queries)
        return tiled.view(num_heads, self.num_tiles, self.tile_length, head_dim).transpose(0, 1)

    def collect(self, output: Tensor) -> Tensor:
        """`(num_tiles, tile_length, num_heads, head_dim)` to `(1, num_queries, num_heads, head_dim)`."""
        return output.flatten(0, 1).index_select(0, self.positions)[None]
