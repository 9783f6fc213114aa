"""Packed queries take their places in tiles of their own row, and come back in their order."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_paged.attention.backends.query_tiles import QueryTiles

CPU = torch.device("cpu")


def test_the_example_of_the_docstring():
    tiles, tile_rows = QueryTiles.of(np.array([4, 4, 4, 7, 7]), 5, gqa_ratio=1, max_tile_rows=2, device=CPU)
    assert (tiles.num_tiles, tiles.tile_length) == (3, 2)
    assert tiles.taken.tolist() == [0, 1, 2, 4, 5]
    assert tile_rows.tolist() == [4, 4, 7]


@pytest.mark.parametrize(("num_tokens", "gqa_ratio"), [(0, 1), (1, 1), (1, 3), (5, 1)])
def test_no_tile_is_alone_and_none_has_a_single_stacked_query(num_tokens, gqa_ratio):
    tiles, tile_rows = QueryTiles.of(np.zeros(num_tokens, dtype=np.int64), 8, gqa_ratio, 127, CPU)
    assert tiles.num_tiles == len(tile_rows) == 2
    assert tiles.tile_length * gqa_ratio >= 2


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=5),
    num_more=st.integers(0, 5),
    gqa_ratio=st.integers(1, 9),
    max_tile_rows=st.integers(1, 30),
)
def test_every_query_sits_in_a_tile_of_its_row_and_comes_back(counts, num_more, gqa_ratio, max_tile_rows):
    rows = np.repeat(np.arange(len(counts)), counts)
    num_queries = max(1, len(rows) + num_more)
    tiles, tile_rows = QueryTiles.of(rows, num_queries, gqa_ratio, max_tile_rows, CPU)
    assert tiles.tile_length * gqa_ratio <= max(max_tile_rows, gqa_ratio, 2)
    assert len(set(tiles.taken.tolist())) == len(rows)
    assert (tile_rows[tiles.taken // tiles.tile_length] == rows).all()
    query = torch.randn(1, 2, num_queries, 3, generator=torch.Generator().manual_seed(0))
    spread = tiles.spread(query)
    assert spread.shape == (tiles.num_tiles, 2, tiles.tile_length, 3)
    back = tiles.collect(spread.transpose(1, 2))
    assert back.shape == (1, num_queries, 2, 3)
    assert torch.equal(back[:, : len(rows)], query.transpose(1, 2)[:, : len(rows)])
