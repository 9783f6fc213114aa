"""Packed queries attend row by row, and see what they see in a row of its own."""

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
    assert fresh.slots.tolist() == slots_of(table, 0)
    assert continued.slots.tolist() == slots_of(table, 1)
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
    assert varlen_row.slots.tolist() == slots_of(table, 0)[86:]
    (block,) = varlen_row.blocks
    assert (block.kv_stop - block.kv_start).tolist() == [10] * 5
    assert not block.is_causal
    (single,) = varlen_rows_of(table, packed(table, [1], 10))
    assert single.slots.tolist() == slots_of(table, 0)[90:]
    (varlen_row,) = varlen_rows_of(table, packed(table, [80], 10))
    assert [block.tokens for block in varlen_row.blocks] == [slice(0, 73), slice(64, 89)]


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
    attend = varlen_attention(query, values, varlen_rows_of(table, ranges), AttentionParams(0.3, softcap, has_sinks))
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


def test_queries_that_leave_some_out_see_what_they_see_among_all():
    torch.manual_seed(0)
    table = table_of([held + new for held, new in zip(HELD, NEW, strict=True)])
    ranges = packed(table, NEW)
    rows = ranges.rows
    keys, values = (storage(table, 2, 16, torch.float32) for _ in range(2))
    query = torch.randn(1, 6, len(rows), 16)
    varlen_rows = varlen_rows_of(table, ranges)
    expected = varlen_attention(query, values, varlen_rows, AttentionParams(0.3))(query, keys, values, None)
    for step in (2, 3, 100):
        some = query[:, :, ::step]
        fewer = KVRanges(ranges.kv_stop[::step], rows=rows[::step])
        attend = varlen_attention(some, values, varlen_rows_of(table, fewer), AttentionParams(0.3))
        torch.testing.assert_close(attend(some, keys, values, None), expected[:, ::step], **CLOSE[torch.float32])


@pytest.mark.parametrize("window", [None, 20])
def test_tiles_of_the_same_queries_give_the_same(window):
    torch.manual_seed(0)
    table = table_of([held + new for held, new in zip(HELD, NEW, strict=True)], window)
    ranges = packed(table, NEW, window, num_more=9)
    rows = ranges.rows
    keys, values = (storage(table, 2, 16, torch.float32).nan_to_num() for _ in range(2))
    query = torch.randn(1, 6, len(rows) + 9, 16)
    attend = varlen_attention(query, values, varlen_rows_of(table, ranges), AttentionParams(0.3))
    layout = Layout(gqa_ratio=3, max_tile_rows=kernel.max_tile_rows(query.dtype, CPU), device=CPU, lists_full=True)
    block_lists = block_lists_of(table, ranges, layout)
    in_tiles = kernel.paged_attention(query, keys, values, block_lists, 16, AttentionParams(0.3))(
        query, keys, values, None
    )
    expected = attend(query, keys, values, None)
    torch.testing.assert_close(in_tiles[:, : len(rows)], expected[:, : len(rows)], **CLOSE[torch.float32])


def test_queries_of_no_row_alone_give_zeros():
    table = table_of([3])
    rows = np.zeros(0, dtype=np.int64)
    query, keys = torch.randn(1, 6, 4, 16), storage(table, 2, 16, torch.float32)
    attend = varlen_attention(query, keys, varlen_rows_of(table, KVRanges(rows, rows=rows)), AttentionParams(1.0))
    assert torch.equal(attend(query, keys, keys, None), torch.zeros(1, 4, 6, 16))
