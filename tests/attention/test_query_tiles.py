"""Packed queries take seats in tiles of their own row, and come back in their order."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_paged.attention.backends.query_tiles import Seats

CPU = torch.device("cpu")


def test_the_example_of_the_docstring():
    seats, tile_rows = Seats.of(np.array([4, 4, 4, 7, 7]), 5, group=1, max_tile_rows=2, device=CPU)
    assert (seats.num_tiles, seats.tile_length) == (3, 2)
    assert seats.taken.tolist() == [0, 1, 2, 4, 5]
    assert tile_rows.tolist() == [4, 4, 7]


@pytest.mark.parametrize(("num_tokens", "group"), [(0, 1), (1, 1), (1, 3), (5, 1)])
def test_no_tile_is_alone_and_none_has_a_single_stacked_query(num_tokens, group):
    seats, tile_rows = Seats.of(np.zeros(num_tokens, dtype=np.int64), 8, group, 127, CPU)
    assert seats.num_tiles == len(tile_rows) == 2
    assert seats.tile_length * group >= 2


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=5),
    num_more=st.integers(0, 5),
    group=st.integers(1, 9),
    max_tile_rows=st.integers(1, 30),
)
def test_every_query_sits_in_a_tile_of_its_row_and_comes_back(counts, num_more, group, max_tile_rows):
    rows = np.repeat(np.arange(len(counts)), counts)
    num_queries = max(1, len(rows) + num_more)
    seats, tile_rows = Seats.of(rows, num_queries, group, max_tile_rows, CPU)
    assert seats.tile_length * group <= max(max_tile_rows, group, 2)
    assert len(set(seats.taken.tolist())) == len(rows)
    assert (tile_rows[seats.taken // seats.tile_length] == rows).all()
    query = torch.randn(1, 2, num_queries, 3, generator=torch.Generator().manual_seed(0))
    tiles = seats.spread(query)
    assert tiles.shape == (seats.num_tiles, 2, seats.tile_length, 3)
    back = seats.collect(tiles.transpose(1, 2))
    assert back.shape == (1, num_queries, 2, 3)
    assert torch.equal(back[:, : len(rows)], query.transpose(1, 2)[:, : len(rows)])
