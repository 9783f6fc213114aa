"""Decoding on a GPU: how rows are cut, and that it gives what softmax over the tokens of each row gives.

Without a GPU, Triton's interpreter runs the kernels, where Triton is installed; `conftest.py` sets it.
"""

import importlib.util
from importlib.metadata import version

import numpy as np
import pytest
import torch
from packaging.version import Version

from hf_paged.attention.backends.base import AttentionParams
from hf_paged.attention.backends.split_kv.gpu import SplitLayout, device_splits_of, split_kv_attention
from hf_paged.batch.steps.step import KVRanges
from tests.attention.test_split_kv_cpu import THREE_ROWS, Table

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BF16 = pytest.param(
    torch.bfloat16, marks=pytest.mark.skipif(DEVICE.type == "cpu", reason="integers to the interpreter")
)
HAS_TRITON = importlib.util.find_spec("triton") is not None
# Before, the interpreter fails at NumPy 2.4.
IS_OLD = HAS_TRITON and DEVICE.type == "cpu" and Version(version("triton")) < Version("3.9")
needs_triton = pytest.mark.skipif(not HAS_TRITON or IS_OLD, reason="needs Triton; without a GPU, 3.9")


def ranges_of(kv_stop, kv_start=None, window=None):
    kv_stop, kv_start = (None if values is None else np.array(values) for values in (kv_stop, kv_start))
    if kv_stop.ndim == 1:
        kv_stop, kv_start = kv_stop[:, None], None if kv_start is None else kv_start[:, None]
    return KVRanges(kv_stop, kv_start, window)


def splits_of(table, *ranges, num_kv_heads=2, **options):
    return device_splits_of(table, ranges_of(*ranges, **options), SplitLayout(num_kv_heads, DEVICE))


def expected_output(query, keys, values, table, ranges, scale, softcap, sinks):
    """Token by token, in float64."""
    num_rows, num_heads, num_queries, _ = query.shape
    gqa_ratio, page_size = num_heads // keys.shape[1], table.group.page_size
    output = torch.zeros(num_rows, num_queries, num_heads, values.shape[3], dtype=torch.float64)
    for row in range(num_rows):
        for asked in range(num_queries):
            first = 0 if ranges.kv_start is None else ranges.kv_start[row, asked]
            tokens = np.arange(first, ranges.kv_stop[row, asked])
            pages = table.block_table[row, tokens // page_size].astype(np.int64)
            slots = torch.from_numpy(pages * page_size + tokens % page_size)
            own_keys, own_values = (
                tensor[0, :, slots].double().repeat_interleave(gqa_ratio, 0) for tensor in (keys, values)
            )
            scores = (query[row, :, asked, None].double() * own_keys).sum(-1) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat([scores, sinks[:, None].double()], -1)
            weights = torch.softmax(scores, -1)[:, : len(tokens)]
            output[row, asked] = (weights[..., None] * own_values).sum(1)
    return output


def check(
    table, ranges, heads=(2, 3), dims=(32, 32), dtype=torch.float32, softcap=None, has_sinks=False, num_pages=12
):
    """Compare the kernels' output."""
    generator = torch.Generator().manual_seed(0)
    num_kv_heads, gqa_ratio = heads
    num_rows, num_queries = ranges.kv_stop.shape
    num_slots = num_pages * table.group.page_size

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    query = random(num_rows, num_queries, num_kv_heads * gqa_ratio, dims[0]).transpose(1, 2)  # as models give them
    keys, values = (random(1, num_kv_heads, num_slots, dim) for dim in dims)
    sinks = random(num_kv_heads * gqa_ratio) if has_sinks else None
    params = AttentionParams(0.3, softcap, has_sinks)
    splits = device_splits_of(table, ranges, SplitLayout(num_kv_heads, DEVICE))
    there = [None if tensor is None else tensor.to(DEVICE) for tensor in (query, keys, values, sinks)]
    attend = split_kv_attention(*there[:3], splits, table.group.page_size, params)
    expected = expected_output(query, keys, values, table, ranges, 0.3, softcap, sinks)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(attend(*there).double().cpu(), expected, atol=tolerance, rtol=tolerance)


def test_splits_are_equal_whatever_the_lengths_of_the_rows():
    table = Table([np.arange(300)] * 3, page_size=128)
    splits = splits_of(table, [31000, 20, 0], num_kv_heads=8).splits
    lengths = (splits[:, 2] - splits[:, 1]).tolist()
    assert splits.shape == (64, 3)
    assert sum(lengths) == 31020
    assert splits[splits[:, 0] == 1].tolist() == [[1, 0, 20]]
    assert max(lengths) == 512


def test_short_rows_are_cut_so_that_all_programs_have_something_to_read():
    splits = splits_of(Table([np.arange(5)], page_size=128), [512], num_kv_heads=8)
    assert splits.first_split.tolist() == [0, 8]


def test_where_rows_grow_the_tensors_stay_those_of_the_step_before():
    table = Table([np.arange(40), np.arange(40, 80)], page_size=16)
    first = splits_of(table, [1, 130])
    for length in range(2, 500):
        assert splits_of(table, [length, 130]) is first
        own = first.splits[first.splits[:, 0] == 0]
        assert first.kv_stop.flatten().tolist() == [length, 130]
        assert int(first.splits[first.first_split[1] - 1, 2]) == length or own.shape[0] > 1
    assert torch.equal(first.block_table.cpu(), torch.from_numpy(table.block_table))


def test_there_is_room_for_four_times_as_many_splits_where_they_would_be_too_long():
    table = Table([np.arange(1000)], page_size=128)
    assert len(splits_of(table, [32000], num_kv_heads=8).splits) == 64
    longer = splits_of(table, [33000], num_kv_heads=8)
    assert len(longer.splits) == 256
    assert splits_of(table, [20], num_kv_heads=8) is longer


def test_other_pages_are_read_where_the_table_has_changed():
    table = Table(THREE_ROWS)
    before = splits_of(table, [33, 20, 64])
    table.block_table[1] = [3, 4, 5, 0]
    table.version += 1
    after = splits_of(table, [33, 20, 64])
    assert after is before
    assert after.block_table[1].tolist() == [3, 4, 5, 0]


@needs_triton
@pytest.mark.parametrize("page_size", [16, 32, 64, 256])
@pytest.mark.parametrize("window", [None, 40])
def test_pages_of_any_size(page_size, window):
    kv_stop = [3 * page_size - 5, 1, 2 * page_size]
    kv_start = None if window is None else [max(0, limit - window) for limit in kv_stop]
    check(Table(THREE_ROWS, page_size), ranges_of(kv_stop, kv_start, window))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize("dims", [(16, 16), (64, 128), (80, 48), (192, 128)], ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (4, 1), (2, 7)], ids=str)
def test_heads_and_dtypes_of_any_kind(heads, dims, dtype):
    check(Table(THREE_ROWS, 64), ranges_of([130, 3, 256]), heads, dims, dtype)


@needs_triton
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("has_sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("kv_stop", [[33, 20, 64], [1, 0, 16]], ids=str)
def test_softcap_and_sinks(softcap, has_sinks, kv_stop):
    check(Table(THREE_ROWS), ranges_of(kv_stop), softcap=softcap, has_sinks=has_sinks)


@needs_triton
def test_several_queries_of_a_row_see_what_is_before_each():
    kv_stop = np.array([[30, 31, 32, 33], [1, 2, 2, 3], [0, 0, 61, 62]])
    check(Table(THREE_ROWS), ranges_of(kv_stop))
    check(Table(THREE_ROWS), ranges_of(kv_stop, np.maximum(kv_stop - 9, 0), window=9), has_sinks=True)


@needs_triton
def test_what_other_rows_hold_does_not_spoil_a_row():
    table = Table([[0, 1], [2, 3]])
    keys, values = torch.randn(2, 1, 1, 64, 16).to(DEVICE)
    for tensor in (keys, values):
        tensor[:, :, 2 * 16 :] = float("nan")
        tensor[:, :, 20:32] = float("inf")  # behind the end of the row
    query = torch.randn(2, 2, 1, 16).to(DEVICE)
    splits = splits_of(table, [20, 0], num_kv_heads=1)
    output = split_kv_attention(query, keys, values, splits, 16, AttentionParams(0.3))(query, keys, values, None)
    assert output.isfinite().all()
    assert not output[1].any()


@needs_triton
def test_long_rows_are_put_together_of_many_parts():
    table = Table([np.arange(24), np.arange(24, 48)], page_size=128)
    check(table, ranges_of([3000, 700]), num_pages=48)
