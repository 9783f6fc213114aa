"""The block lists that FlexAttention reads, made from block tables.

The queries of a row that share a key/value head are stacked, so that keys and values are read once for all of them,
and cut into tiles of at most `max_tile_rows`. Each tile is one entry of the kernel's batch with its own lists of
pages. With 2 key/value heads, 6 query heads and one new token in each of 4 rows (decode) a tile is 3 stacked queries,
and there are 4 tiles.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hf_paged.attention.backends.query_tiles import QueryTiles
from hf_paged.batch.padding import Counts

Pages = npt.NDArray[np.int32]

MIN_WIDTH = 2  # of a list: a size of 1 would need a kernel of its own


@dataclass
class BlockLists:
    """One step's lists of pages on one device.

    Attributes:
        full_kv_num_blocks: `(num_tiles, 1, 1)` int32, pages that a tile reads without a mask, since all of its
            queries see them whole; None where all pages are listed as partial.
        full_kv_indices: `(num_tiles, 1, 1, width)` int32, their ids; None likewise.
        kv_num_blocks: `(num_tiles, 1, 1)` int32, pages that a tile reads under the mask.
        kv_indices: `(num_tiles, 1, 1, width)` int32, their ids.
        physical_to_logical: `(num_pages,)` int32, the place of each page in its row; -1 for the sink page.
        seen: what a query sees of its row in partial pages. `(num_tiles, tile_rows, 2)` int32: the tokens before the
            first number and not before the second; or `(num_tiles, tile_length, max_tokens)` bool: each token or not.
        tile_length: query tokens of a tile.
        tiles_per_row: tiles of one row.
        gqa_ratio: query heads stacked on one key/value head.
        query_tiles: where packed queries are in the tiles; None for those of a padded batch.
    """

    full_kv_num_blocks: Tensor | None
    full_kv_indices: Tensor | None
    kv_num_blocks: Tensor
    kv_indices: Tensor
    physical_to_logical: Tensor
    seen: Tensor
    tile_length: int
    tiles_per_row: int
    gqa_ratio: int
    query_tiles: QueryTiles | None = None


@dataclass(frozen=True)
class Layout:
    """What a layer wants its tiles to be like.

    Attributes:
        gqa_ratio: query heads on one key/value head.
        max_tile_rows: stacked queries that fit into one tile.
        device: where the kernel runs.
        lists_full: whether full pages have a list of their own; only on a CPU.
        sink_page: page that every tile reads beside those of its row; None without attention sinks.
    """

    gqa_ratio: int
    max_tile_rows: int
    device: torch.device
    lists_full: bool
    sink_page: int | None = None

    def empty_lists(self, num_tiles: int, width: int, num_pages: int) -> Tensor:
        """Room for lists of up to `width` pages of a pool of `num_pages`: `(num_tiles, some)` int32, on the CPU."""
        # The CPU kernel wants lists as long as the pool has pages, though it reads only their first entries. The rest
        # is never touched, so it costs no memory.
        width = num_pages if self.device.type == "cpu" else max(MIN_WIDTH, width)
        return torch.empty((num_tiles, width), dtype=torch.int32)


def listed(pages: Pages, places: Counts) -> Pages:
    """Ids of the pages at `places` of each row; any where the row has none."""
    return np.take_along_axis(pages, np.minimum(places, pages.shape[1] - 1), axis=1)


def pages_in_window(page_size: int, window: int) -> int:
    """Pages of a row that the window of one query reaches into at most."""
    return (window - 2) // page_size + 2
