"""Queries of several rows, packed or padded, attend row by row, and see what they see in a row of its own."""

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, MistralConfig

from hf_paged import PagePool
from hf_paged.attention.backends import flex as kernel
from hf_paged.attention.backends.base import AttentionParams
from hf_paged.attention.backends.block_list_builder import block_lists_of
from hf_paged.attention.backends.block_lists import Layout
from hf_paged.attention.backends.reference import blockwise_attention
from hf_paged.attention.backends.varlen_sdpa import varlen_attention, varlen_rows_of
from hf_paged.batch.padding import BoolMatrix
from hf_paged.batch.steps.step import KVRanges
from hf_paged.pages.block_table import BlockTable

CPU = torch.device("cpu")
CLOSE = {torch.float32: {"atol": 1e-5, "rtol": 1e-5}, torch.bfloat16: {"atol": 4e-2, "rtol": 4e-2}}
HELD = [0, 1, 15, 16, 17, 40, 0, 300]
NEW = [1, 15, 16, 17, 300, 1, 600, 2]


def table_of(lengths: list[int], window: int | None = None) -> BlockTable:
    """Rows of these lengths, whose pages of 16 tokens don't follow one another."""
    config = LlamaConfig() if window is None else MistralConfig(sliding_window=window)
    table = BlockTable(PagePool(config, page_size=16).groups[0])
    table.open_rows(len(lengths))
    while (table.lengths < lengths).any():
        counts = np.minimum(np.array(lengths) - table.lengths, 16)
        table.reserve(counts)
        table.commit(counts)
    return table


def packed(table: BlockTable, new: list[int], window: int | None = None, num_more: int = 0) -> KVRanges:
    """What the last `new[row]` tokens of each row see; behind them as many queries of no row as `num_more`."""
    rows = np.repeat(np.arange(len(new)), new)
    kv_stop = np.concatenate([np.arange(end - count, end) + 1 for count, end in zip(new, table.lengths, strict=True)])
    kv_start = None if window is None else np.maximum(kv_stop - window, 0)
    ranges = KVRanges(kv_stop, kv_start, window, rows, len(rows) + num_more)
    ranges.check_kept(table)
    return ranges


def padded(held: list[int], is_new: BoolMatrix, window: int | None = None) -> KVRanges:
    """What the last columns of each row see, where those that are no new tokens are padding."""
    kv_stop = np.array(held)[:, None] + is_new.cumsum(axis=1)
    if window is None:
        return KVRanges(kv_stop)
    # Tokens before each column, of as many as the row has before these, without padding.
    before = [np.r_[np.arange(count), count, stops] for count, stops in zip(held, kv_stop, strict=True)]
    first = [np.maximum(count + 1 + np.arange(is_new.shape[1]) - window, 0) for count in held]
    kv_start = np.array([tokens[columns] for tokens, columns in zip(before, first, strict=True)])
    return KVRanges(np.where(kv_start < kv_stop, kv_stop, 0), kv_start, window)


def columns_of(kind: str, num_columns: int) -> BoolMatrix:
    """Which of the last columns of 4 rows are tokens."""
    column, lengths = np.arange(num_columns), np.array([num_columns, num_columns - 3, 1, num_columns - 70])
    if kind == "scattered":
        return np.random.default_rng(0).random((4, num_columns)) < 0.2
    return (column >= num_columns - lengths[:, None]) if kind == "left" else column < lengths[:, None]


def storage(table: BlockTable, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """NaN wherever the rows have no token."""
    tensor = torch.full((1, num_kv_heads, table.group.allocator.num_pages * 16, head_dim), torch.nan, dtype=dtype)
    for row in range(table.num_rows):
        slots = slots_of(table, row)
        tensor[:, :, slots] = torch.randn(1, num_kv_heads, len(slots), head_dim).to(dtype)
    return tensor


def slots_of(table: BlockTable, row: int) -> list[int]:
    pages = table.row_pages(row)
    return [pages[token // 16] * 16 + token % 16 for token in range(int(table.lengths[row]))]


def test_the_example_of_the_docstring():
    table = table_of([3, 105])
    fresh, continued = varlen_rows_of(table, packed(table, [3, 100]))
    assert fresh.pages.tolist() == table.row_pages(0)
    assert continued.pages.tolist() == table.row_pages(1)
    (block,) = fresh.blocks
    assert (block.queries, block.tokens) == (slice(0, 3), slice(0, 3))
    assert [(block.queries, block.tokens) for block in continued.blocks] == [
        (slice(3, 67), slice(0, 69)),
        (slice(67, 103), slice(0, 105)),
    ]
    assert all(block.is_causal for block in (block, *continued.blocks))


def test_a_segment_reads_nothing_that_has_left_the_window():
    table = table_of([100], window=10)
    (varlen_row,) = varlen_rows_of(table, packed(table, [5], 10))
    assert varlen_row.pages.tolist() == table.row_pages(0)[86 // 16 :]
    (block,) = varlen_row.blocks
    assert block.tokens == slice(6, 20)
    assert (block.kv_stop - block.kv_start).tolist() == [10] * 5
    assert not block.is_causal
    (single,) = varlen_rows_of(table, packed(table, [1], 10))
    assert single.blocks[0].tokens == slice(10, 20)
    (varlen_row,) = varlen_rows_of(table, packed(table, [80], 10))
    assert [block.tokens for block in varlen_row.blocks] == [slice(11, 84), slice(75, 100)]


def test_a_token_that_was_dropped_can_t_be_seen():
    table = table_of([100], window=10)
    table.drop(np.array([80]))
    varlen_rows_of(table, packed(table, [5], 10))
    with pytest.raises(ValueError, match="have left the window of 10 tokens and were dropped"):
        packed(table, [5], 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 20, 290])
@pytest.mark.parametrize("heads", [(6, 2, 16, 16), (3, 3, 20, 12), (4, 1, 8, 40)], ids=str)
@pytest.mark.parametrize(("softcap", "has_sinks"), [(None, False), (5.0, False), (None, True)])
def test_each_row_is_attended_to_as_if_it_were_alone(dtype, window, heads, softcap, has_sinks):
    torch.manual_seed(0)
    num_heads, num_kv_heads, head_dim, value_dim = heads
    table = table_of([held + new for held, new in zip(HELD, NEW, strict=True)], window)
    ranges = packed(table, NEW, window)
    rows, kv_stop, kv_start = ranges.rows, ranges.kv_stop, ranges.kv_start
    keys, values = (storage(table, num_kv_heads, size, dtype) for size in (head_dim, value_dim))
    num_queries = len(rows) + 9
    query = torch.randn(1, num_heads, num_queries, head_dim).to(dtype)
    sinks = torch.randn(num_heads).to(dtype) if has_sinks else None
    attend = varlen_attention(
        query, values, varlen_rows_of(table, ranges), 16, AttentionParams(0.3, softcap, has_sinks)
    )
    output = attend(query, keys, values, sinks)
    assert output.shape == (1, num_queries, num_heads, value_dim)
    assert output.dtype == dtype
    assert not output[:, len(rows) :].any(), "queries of no row"
    for row in range(len(NEW)):
        mine, slots = np.flatnonzero(rows == row), slots_of(table, row)
        tokens = np.arange(len(slots))
        seen = tokens < kv_stop[mine, None]
        if kv_start is not None:
            seen &= tokens >= kv_start[mine, None]
        expected = blockwise_attention(
            query[:, :, mine].float(),
            keys[:, :, slots].float(),
            values[:, :, slots].float(),
            torch.from_numpy(seen)[None, None],
            True,
            0.3,
            softcap,
            None if sinks is None else sinks.float(),
        )
        torch.testing.assert_close(output[:, mine].float(), expected, **CLOSE[dtype])


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kind", ["left", "right", "scattered"])
@pytest.mark.parametrize(("softcap", "has_sinks"), [(None, False), (5.0, True)])
def test_queries_of_a_padded_batch_see_what_is_before_them_or_give_zeros(window, kind, softcap, has_sinks):
    torch.manual_seed(0)
    held, is_new = [0, 1, 17, 300], columns_of(kind, 80)
    table = table_of([*(np.array(held) + is_new.sum(axis=1))], window)
    ranges = padded(held, is_new, window)
    keys, values = storage(table, 2, 16, torch.float32), storage(table, 2, 12, torch.float32)
    query = torch.randn(80, 4, 6, 16).permute(1, 2, 0, 3)
    sinks = torch.randn(6) if has_sinks else None
    attend = varlen_attention(
        query, values, varlen_rows_of(table, ranges), 16, AttentionParams(0.3, softcap, has_sinks)
    )
    output = attend(query, keys, values, sinks)
    assert output.shape == (4, 80, 6, 12)
    for row in range(4):
        slots, kv_stop = slots_of(table, row), ranges.kv_stop[row]
        kv_start = np.zeros_like(kv_stop) if ranges.kv_start is None else ranges.kv_start[row]
        seen = (np.arange(len(slots)) < kv_stop[:, None]) & (np.arange(len(slots)) >= kv_start[:, None])
        mask = torch.from_numpy(seen)[None, None]
        every = query[row : row + 1], keys[:, :, slots], values[:, :, slots], mask, False, 0.3, softcap, sinks
        expected = blockwise_attention(*every) if slots else torch.zeros(1, 80, 6, 12)
        sees = kv_stop > 0
        torch.testing.assert_close(output[row, sees], expected[0, sees], **CLOSE[torch.float32])
        assert not output[row, ~sees].any()


def test_queries_that_see_nothing_cut_a_row_in_two():
    table = table_of([9])
    ranges = padded([5], np.array([[True, False, False, False, True, True, True]]), window=2)
    assert ranges.kv_stop.tolist() == [[6, 6, 0, 0, 7, 8, 9]]
    first, second = varlen_rows_of(table, ranges)
    assert [row.blocks[0].queries for row in (first, second)] == [slice(0, 2), slice(4, 7)]
    assert [row.blocks[0].tokens for row in (first, second)] == [slice(4, 6), slice(6, 9)]


def test_queries_are_not_causal_because_their_ends_are():
    (row,) = varlen_rows_of(table_of([7]), KVRanges(np.array([[5, 5, 7]])))
    assert not row.blocks[0].is_causal
    assert row.blocks[0].kv_stop.tolist() == [5, 5, 7]


def test_queries_that_leave_some_out_see_what_they_see_among_all():
    torch.manual_seed(0)
    table = table_of([held + new for held, new in zip(HELD, NEW, strict=True)])
    ranges = packed(table, NEW)
    rows = ranges.rows
    keys, values = (storage(table, 2, 16, torch.float32) for _ in range(2))
    query = torch.randn(1, 6, len(rows), 16)
    varlen_rows = varlen_rows_of(table, ranges)
    expected = varlen_attention(query, values, varlen_rows, 16, AttentionParams(0.3))(query, keys, values, None)
    for step in (2, 3, 100):
        some = query[:, :, ::step]
        fewer = KVRanges(ranges.kv_stop[::step], rows=rows[::step])
        attend = varlen_attention(some, values, varlen_rows_of(table, fewer), 16, AttentionParams(0.3))
        torch.testing.assert_close(attend(some, keys, values, None), expected[:, ::step], **CLOSE[torch.float32])


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("is_packed", [True, False])
def test_tiles_of_the_same_queries_give_the_same(window, is_packed):
    torch.manual_seed(0)
    if is_packed:
        table = table_of([held + new for held, new in zip(HELD, NEW, strict=True)], window)
        ranges = packed(table, NEW, window, num_more=9)
        query = torch.randn(1, 6, ranges.num_queries, 16)
    else:
        held, is_new = [0, 1, 17, 300], columns_of("left", 80) & columns_of("right", 80)[::-1]
        table, ranges = table_of([*(np.array(held) + is_new.sum(axis=1))], window), padded(held, is_new, window)
        query = torch.randn(4, 6, 80, 16)
    keys, values = (storage(table, 2, 16, torch.float32).nan_to_num() for _ in range(2))
    attend = varlen_attention(query, values, varlen_rows_of(table, ranges), 16, AttentionParams(0.3))
    layout = Layout(gqa_ratio=3, max_tile_rows=kernel.max_tile_rows(query.dtype, CPU), device=CPU, lists_full=True)
    block_lists = block_lists_of(table, ranges, layout)
    in_tiles = kernel.paged_attention(query, keys, values, block_lists, 16, AttentionParams(0.3))(
        query, keys, values, None
    )
    expected = attend(query, keys, values, None)
    sees = torch.from_numpy(ranges.kv_stop > 0).view(len(query), -1)
    num_tokens = sees.shape[1]  # behind them, packed queries belong to no row
    torch.testing.assert_close(in_tiles[:, :num_tokens], expected[:, :num_tokens], **CLOSE[torch.float32])
    assert not in_tiles[:, :num_tokens][~sees].any()
    assert not expected[:, :num_tokens][~sees].any()


def test_queries_of_no_row_alone_give_zeros():
    table = table_of([3])
    rows = np.zeros(0, dtype=np.int64)
    query, keys = torch.randn(1, 6, 4, 16), storage(table, 2, 16, torch.float32)
    attend = varlen_attention(query, keys, varlen_rows_of(table, KVRanges(rows, rows=rows)), 16, AttentionParams(1.0))
    assert torch.equal(attend(query, keys, keys, None), torch.zeros(1, 4, 6, 16))
