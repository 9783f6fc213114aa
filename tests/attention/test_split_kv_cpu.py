"""Decoding on a CPU: which pages are read, and that they give what softmax over the tokens of each row gives."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_paged._torch import inductor
from hf_paged.attention.backends.base import AttentionParams
from hf_paged.attention.backends.split_kv.cpu import kv_splits_of, split_kv_attention
from hf_paged.batch.steps.step import KVRanges

PAGE = 16


class Table:
    """As much of a block table as splits are made from."""

    def __init__(self, block_table, page_size=PAGE):
        self.group = SimpleNamespace(page_size=page_size)
        self.block_table = np.array(block_table, dtype=np.int32)
        self.version = 0


def filled(table, kv_stop, kv_start=None):
    kv_start = None if kv_start is None else np.array(kv_start)[:, None]
    return kv_splits_of(table, KVRanges(np.array(kv_stop)[:, None], kv_start))


def expected_output(query, keys, values, table, kv_stop, kv_start, scale, softcap=None, sinks=None):
    """Token by token."""
    group = query.shape[1] // keys.shape[1]
    outputs = []
    for row, (first, limit) in enumerate(zip(kv_start, kv_stop, strict=True)):
        tokens = np.arange(first, limit)
        page_size = table.group.page_size
        pages = table.block_table[row, tokens // page_size].astype(np.int64)
        slots = torch.from_numpy(pages * page_size + tokens % page_size)
        row_keys, row_values = (tensor[0, :, slots].repeat_interleave(group, 0) for tensor in (keys, values))
        scores = (query[row].float() @ row_keys.float().transpose(1, 2)) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if sinks is not None:
            scores = torch.cat([scores, sinks.view(-1, 1, 1).float()], -1)
        weights = torch.softmax(scores, -1)[..., : len(tokens)]
        outputs.append((weights @ row_values.float()).transpose(0, 1))
    return torch.stack(outputs)


def attention_of(
    table, kv_stop, kv_start=None, heads=(2, 3), dims=(16, 16), dtype=torch.float32, num_pages=12, **options
):
    """Output of the kernel, and what it should be."""
    num_kv_heads, group = heads
    query = torch.randn(len(kv_stop), num_kv_heads * group, 1, dims[0]).to(dtype)
    num_slots = num_pages * table.group.page_size
    keys = torch.randn(1, num_kv_heads, num_slots, dims[0]).to(dtype)
    values = torch.randn(1, num_kv_heads, num_slots, dims[1]).to(dtype)
    sinks = torch.randn(num_kv_heads * group) if options.pop("has_sinks", False) else None
    softcap = options.pop("softcap", None)
    splits = filled(table, kv_stop, kv_start)
    attend = split_kv_attention(query, keys, values, splits, AttentionParams(0.3, softcap, sinks is not None))
    output = attend(query, keys, values, sinks)
    kv_start = [0] * len(kv_stop) if kv_start is None else kv_start
    return output, expected_output(query, keys, values, table, kv_stop, kv_start, 0.3, softcap, sinks)


THREE_ROWS = [[7, 1, 2, 0], [1, 9, 0, 0], [3, 4, 5, 6]]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_splits_are_in_the_order_of_memory():
    splits = filled(Table(THREE_ROWS), [33, 20, 64])
    assert splits.pieces.tolist() == [1, 1, 2, 3, 4, 5, 6, 7, 9]
    assert splits.counts.tolist() == [3, 2, 4]
    for row, count in enumerate(splits.counts.tolist()):
        own = splits.by_row[:count, row]
        assert splits.rows[own].tolist() == [row] * count
        assert splits.pieces[own].tolist() == THREE_ROWS[row][:count]
        assert splits.kv_stop[own].tolist()[:-1] == [PAGE] * (count - 1)
    assert [int(splits.kv_stop[splits.by_row[count - 1, row]]) for row, count in enumerate([3, 2, 4])] == [1, 4, 16]


def test_splits_are_made_anew_only_for_other_pieces():
    table = Table(THREE_ROWS)
    first = filled(table, [33, 20, 50])
    assert filled(table, [34, 21, 51]) is first
    assert int(first.kv_stop[first.by_row[2, 0]]) == 2
    assert filled(table, [34, 33, 51]) is not first
    table.block_table[1] = [3, 4, 5, 0]
    table.version += 1
    assert filled(table, [34, 33, 51]).pieces.tolist() == [1, 2, 3, 3, 4, 4, 5, 5, 6, 7]


def test_of_a_large_page_the_pieces_that_are_filled_are_read():
    splits = filled(Table([[5, 2], [3, 0]], page_size=128), [130, 65], [40, 0])
    assert splits.size == 32
    assert splits.pieces.tolist() == [8, 12, 13, 14, 21, 22, 23]
    assert splits.rows.tolist() == [0, 1, 1, 1, 0, 0, 0]
    assert splits.kv_start.tolist() == [0, 0, 0, 0, 8, 0, 0]
    assert splits.kv_stop.tolist() == [2, 32, 32, 1, 32, 32, 32]
    assert splits.counts.tolist() == [4, 3]


@pytest.mark.parametrize("page_size", [32, 256])
@pytest.mark.parametrize("window", [None, 40])
def test_pages_of_any_size(page_size, window):
    kv_stop = [3 * page_size - 5, 1, 2 * page_size]
    kv_start = None if window is None else [max(0, limit - window) for limit in kv_stop]
    output, expected = attention_of(Table(THREE_ROWS, page_size), kv_stop, kv_start)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kv_stop", [[1, 1, 1], [16, 17, 15], [33, 20, 64], [64, 1, 32]])
@pytest.mark.parametrize("window", [None, 1, 5, 16, 18, 40])
def test_page_edges_and_windows(kv_stop, window):
    kv_start = None if window is None else [max(0, limit - window) for limit in kv_stop]
    output, expected = attention_of(Table(THREE_ROWS), kv_stop, kv_start)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("limit", [1, 16, 17, 64])
def test_one_row(limit):
    output, expected = attention_of(Table(THREE_ROWS[:1]), [limit])
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("heads", "dims"), [((3, 1), (24, 80)), ((1, 8), (64, 40))])
def test_any_heads_and_head_sizes(heads, dims):
    output, expected = attention_of(Table(THREE_ROWS), [33, 20, 64], heads=heads, dims=dims)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_16_bits_are_computed_in_32():
    output, expected = attention_of(Table(THREE_ROWS), [33, 20, 64], dtype=torch.bfloat16)
    assert output.dtype is torch.bfloat16
    torch.testing.assert_close(output, expected.to(torch.bfloat16), atol=1e-5, rtol=2**-7)  # one rounding


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "has_sinks": True}], ids=str)
def test_a_row_that_sees_nothing_gives_0_and_softcap_and_sinks_are_those_of_the_others(options):
    output, expected = attention_of(Table(THREE_ROWS), [33, 0, 64], **options)
    assert (output[1] == 0).all()
    torch.testing.assert_close(output[[0, 2]], expected[[0, 2]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spoilt", [7, 3])
def test_what_is_not_a_number_stays_in_its_row(spoilt):
    table = Table(THREE_ROWS)
    query, keys, values = torch.randn(3, 6, 1, 16), torch.randn(1, 2, 160, 16), torch.randn(1, 2, 160, 16)
    values[:, :, spoilt * PAGE : (spoilt + 1) * PAGE] = torch.nan
    keys[:, :, spoilt * PAGE : (spoilt + 1) * PAGE] = torch.inf
    splits = filled(table, [33, 20, 64])
    output = split_kv_attention(query, keys, values, splits, AttentionParams(0.3))(query, keys, values, None)
    assert [bool(row.isfinite().all()) for row in output] == [spoilt not in row for row in THREE_ROWS]


def test_extreme_scores():
    table = Table(THREE_ROWS)
    query, keys, values = torch.randn(3, 6, 1, 16), torch.randn(1, 2, 160, 16), torch.randn(1, 2, 160, 16)
    keys *= 1e4
    kv_stop = [33, 20, 64]
    output = split_kv_attention(query, keys, values, filled(table, kv_stop), AttentionParams(0.3))(
        query, keys, values, None
    )
    expected = expected_output(query, keys, values, table, kv_stop, [0] * 3, 0.3)
    torch.testing.assert_close(output, expected, atol=1e-3, rtol=1e-3)


def test_lengths_rows_and_pools_of_other_sizes_need_no_other_kernel():
    attention_of(Table(THREE_ROWS), [33, 20, 64])
    compiled = inductor.num_specializations()
    for num_rows in (2, 5, 40):
        for limit in (1, 16, 50, 64):
            table = Table(np.arange(num_rows * 4).reshape(num_rows, 4))
            output, expected = attention_of(table, [limit] * num_rows, num_pages=4 * num_rows + 1)
            torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    assert inductor.num_specializations() == compiled
