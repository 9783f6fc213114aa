"""Queries that share a key/value head, stacked as rows of tiles."""

import torch
from torch import Tensor

from hf_paged.attention.backends.block_lists import Tiles


def stack(query: Tensor, tiles: Tiles) -> Tensor:
    """`(num_rows, num_heads, num_queries, head_dim)` to `(num_tiles, num_kv_heads, tile_rows, head_dim)`."""
    num_rows, num_heads, num_queries, head_dim = query.shape
    group, num_kv_heads = tiles.group, num_heads // tiles.group
    missing = tiles.tiles_per_row * tiles.tile_length - num_queries
    padded = torch.nn.functional.pad(query, (0, 0, 0, missing)) if missing else query
    stacked = (
        padded.reshape(num_rows, num_kv_heads, group, tiles.tiles_per_row, tiles.tile_length, head_dim)
        .permute(0, 3, 1, 4, 2, 5)
        .reshape(num_rows * tiles.tiles_per_row, num_kv_heads, tiles.tile_length * group, head_dim)
        .contiguous()
    )
    return fill_up(stacked, tiles)


def fill_up(stacked: Tensor, tiles: Tiles) -> Tensor:
    """Add what there is no row for, where the kernel is made for more tiles."""
    missing = len(tiles.num_partial) - len(stacked)
    return torch.nn.functional.pad(stacked, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else stacked


def unstack(output: Tensor, tiles: Tiles, num_rows: int, num_queries: int) -> Tensor:
    """`(num_tiles, num_kv_heads, tile_rows, head_dim)` to `(num_rows, num_queries, num_heads, head_dim)`."""
    num_kv_heads, head_dim = output.shape[1], output.shape[3]
    num_heads = num_kv_heads * tiles.group
    return (
        output.view(num_rows, tiles.tiles_per_row, num_kv_heads, tiles.tile_length, tiles.group, head_dim)
        .permute(0, 1, 3, 2, 4, 5)
        .reshape(num_rows, tiles.tiles_per_row * tiles.tile_length, num_heads, head_dim)[:, :num_queries]
        .contiguous()
    )
