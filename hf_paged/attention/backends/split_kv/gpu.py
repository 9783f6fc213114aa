"""Decoding on a GPU: equal pieces of the rows, whatever their lengths, by two Triton kernels.

One program reads one KV split for all query heads that share its key/value head; a second kernel puts the parts of
each row together. FlexAttention's kernel shares out each row among the same number of programs, and waits for the
longest. A step that is captured as a CUDA graph can't change its sizes, so there is room for a number of splits that
doesn't depend on the lengths: where rows grow, so do their splits.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from hf_paged.attention.backends.base import Attention, AttentionParams
from hf_paged.batch.padding import Counts
from hf_paged.batch.steps.step import KVRanges
from hf_paged.pages.block_table import BlockTable

_BLOCK = 64  # tokens that a program reads at a time; splits begin at multiples of it
_SHORTEST, _LONGEST = 64, 512  # tokens of a split: more of them where rows are short would leave programs without one
_NUM_PROGRAMS = 512  # that there should be, about: four for each of a large GPU's processors
_MAX_STACKED = 64  # queries of one program, times the heads that share a key/value head
_MAX_BLOCKS = 2  # that are on their way from memory at once
_NUM_WARPS = 4
_MERGED_AT_ONCE = 16


@dataclass(frozen=True)
class SplitLayout:
    """What the splits of a layer depend on, beside its rows.

    Attributes:
        num_kv_heads: key/value heads, each of which takes a program for each split.
        device: where the kernels run.
    """

    num_kv_heads: int
    device: torch.device


@dataclass
class DeviceSplits:
    """The pieces of rows that a step reads, on its device.

    Attributes:
        block_table: `(num_rows, width)` int32, ids of the pages of each row.
        splits: `(max_splits, 3)` int32: a row, and the tokens of it from which and up to which a split goes. Those of
            a row follow one another; those behind the last are empty.
        first_split: `(num_rows + 1,)` int32, where the splits of each row begin.
        kv_stop: `(num_rows, num_queries)` int32.
        kv_start: `(num_rows, num_queries)` int32.
        has_start: whether `kv_start` is to be looked at.
    """

    block_table: Tensor
    splits: Tensor
    first_split: Tensor
    kv_stop: Tensor
    kv_start: Tensor
    has_start: bool


def takes(query: Tensor, keys: Tensor) -> bool:
    """Whether the kernels attend with these `(num_rows, num_heads, num_queries, head_dim)` queries."""
    stacked = query.shape[2] * (query.shape[1] // keys.shape[1])
    return stacked <= _MAX_STACKED and query.dtype in (torch.float32, torch.bfloat16, torch.float16)


_Key = tuple[int | None, SplitLayout, int]
_builders: WeakKeyDictionary[BlockTable, dict[_Key, "_Builder"]] = WeakKeyDictionary()


def device_splits_of(table: BlockTable, ranges: KVRanges, layout: SplitLayout) -> DeviceSplits:
    """Cut what the queries of each row see.

    The tensors are those of the step before, with other contents, unless rows have become too many or too long.

    Args:
        table: the rows whose pages are read.
        ranges: of the same number of queries for each row.
        layout: what the layer wants.
    """
    builders = _builders.setdefault(table, {}) if ranges.is_whole else {}
    key = ranges.window, layout, ranges.kv_stop.shape[1]
    builder = builders.get(key)
    if builder is None or not builder.fits(table, ranges):
        builder = builders[key] = _Builder(table, ranges, layout)
    return builder.fill(table, ranges)


class _Builder:
    """The tensors for one number of rows and queries, and how to fill them.

    It doesn't hold the rows, which are freed as soon as nobody else does.
    """

    def __init__(self, table: BlockTable, ranges: KVRanges, layout: SplitLayout) -> None:
        num_rows, num_queries = ranges.kv_stop.shape
        self._num_kv_heads = layout.num_kv_heads
        self._num_rows = num_rows
        self._block_table = table.block_table
        self._max_splits = self._room_for(_spans(ranges))
        # All that changes with a step lies together, to be sent together.
        sizes = [3 * self._max_splits, num_rows + 1, num_rows * num_queries, num_rows * num_queries]
        small = torch.zeros(sum(sizes), dtype=torch.int32)
        here = np.split(small.numpy(), np.cumsum(sizes)[:-1])
        self._splits, self._first_split = here[0].reshape(-1, 3), here[1]
        self._kv_stop, self._kv_start = (array.reshape(num_rows, num_queries) for array in here[2:])
        with torch.inference_mode(False):  # they outlive the mode that they are made in
            there = small.to(layout.device, non_blocking=True)
            self._small = there, small
            self._table_there = torch.from_numpy(self._block_table).to(layout.device, non_blocking=True, copy=True)
            splits, first_split, kv_stop, kv_start = torch.split(there, sizes)
        self._version = table.version
        self._state: tuple[int, bytes] | None = None
        self._device_splits = DeviceSplits(
            self._table_there,
            splits.view(-1, 3),
            first_split,
            kv_stop.view(num_rows, num_queries),
            kv_start.view(num_rows, num_queries),
            ranges.kv_start is not None,
        )

    def fits(self, table: BlockTable, ranges: KVRanges) -> bool:
        """Whether these can describe the step."""
        return (
            self._block_table is table.block_table
            and self._num_rows == len(ranges.kv_stop)
            and self._room_for(_spans(ranges)) <= self._max_splits
        )

    def fill(self, table: BlockTable, ranges: KVRanges) -> DeviceSplits:
        begins, ends = _spans(ranges)
        size = self._size(begins, ends)
        state = size, begins.tobytes() + (-(-(ends - begins) // size)).tobytes()
        if state != self._state:
            self._cut(begins, ends, size)
            self._state = state
        self._splits[self._last_splits, 2] = ends[self._read_rows]
        self._kv_stop[:] = ranges.kv_stop
        if ranges.kv_start is not None:
            self._kv_start[:] = ranges.kv_start
        # The memory here is not pinned, so it may be filled again as soon as this returns.
        there, here = self._small
        there.copy_(here, non_blocking=True)
        if self._version != table.version:
            self._table_there.copy_(torch.from_numpy(self._block_table), non_blocking=True)
            self._version = table.version
        return self._device_splits

    def _cut(self, begins: Counts, ends: Counts, size: int) -> None:
        counts = -(-(ends - begins) // size)
        self._first_split[0] = 0
        self._first_split[1:] = counts.cumsum()
        num_splits = int(counts.sum())
        rows = np.repeat(np.arange(len(counts)), counts)
        starts = begins[rows] + (np.arange(num_splits) - self._first_split[rows]) * size
        self._splits[:num_splits] = np.stack([rows, starts, starts + size], axis=1)
        self._splits[num_splits:] = 0
        self._read_rows = np.flatnonzero(counts)
        self._last_splits = self._first_split[1:][self._read_rows] - 1

    def _size(self, begins: Counts, ends: Counts) -> int:
        """Tokens of a split, so that there are enough programs, and no more splits than there is room for."""
        num_tokens = int((ends - begins).sum())
        wanted = min(max(num_tokens * self._num_kv_heads // _NUM_PROGRAMS, _SHORTEST), _LONGEST)
        needed = -(-num_tokens // (self._max_splits - self._num_rows))
        size: int = -(-max(wanted, needed) // _BLOCK) * _BLOCK
        return size

    def _room_for(self, spans: tuple[Counts, Counts]) -> int:
        """Splits that there is room for: so many that they are not much longer than `_LONGEST`, in few steps."""
        begins, ends = spans
        num_rows = len(begins)
        room = max(1 << num_rows.bit_length(), _NUM_PROGRAMS // self._num_kv_heads)
        return room if int((ends - begins).sum()) <= _LONGEST * (room - num_rows) else 4 * room


def _spans(ranges: KVRanges) -> tuple[Counts, Counts]:
    """`(num_rows,)` tokens of each row from which, in whole blocks, and up to which any query sees some."""
    ends = ranges.kv_stop.max(axis=1)
    if ranges.kv_start is None:
        return np.zeros_like(ends), ends
    begins = np.where(ranges.kv_stop > 0, ranges.kv_start, ends[:, None]).min(axis=1) // _BLOCK * _BLOCK
    return begins, ends


def split_kv_attention(
    query: Tensor, keys: Tensor, values: Tensor, splits: DeviceSplits, page_size: int, params: AttentionParams
) -> Attention:
    """Return the attention of layers with tensors of these shapes, dtype and device, a GPU.

    Args:
        query: `(num_rows, num_heads, num_queries, head_dim)`.
        keys: `(1, num_kv_heads, num_slots, head_dim)`, the storage of a layer; will be read where `splits` says.
        values: `(1, num_kv_heads, num_slots, value_head_dim)`.
        splits: what to read.
        page_size: tokens per page.
        params: what the layer wants.

    Source:
        Equal pieces and their log-sum-exp: Flash-Decoding (Dao et al., 2023), FlashInfer (Ye et al., 2025).
    """
    from hf_paged.attention.backends.split_kv.kernels import attend_to_split, merge_splits

    num_rows, num_heads, num_queries, key_dim = query.shape
    _, num_kv_heads, num_slots, value_dim = values.shape
    gqa_ratio = num_heads // num_kv_heads
    max_splits = len(splits.splits)
    parts_shape = max_splits, num_kv_heads, num_queries * gqa_ratio, value_dim
    block, num_stages = _tile(query.device, (_power_of_two(key_dim) + _power_of_two(value_dim)) * query.itemsize)
    sizes = {
        "PAGE_SIZE": page_size,
        "BLOCK": block,
        "GQA_RATIO": gqa_ratio,
        "STACKED": max(16, _power_of_two(num_queries * gqa_ratio)),
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "PADDED_KEY_DIM": max(16, _power_of_two(key_dim)),
        "PADDED_VALUE_DIM": max(16, _power_of_two(value_dim)),
        "HAS_SOFTCAP": params.softcap is not None,
        "HAS_START": splits.has_start,
        "num_stages": num_stages,
        "num_warps": _NUM_WARPS,
    }
    merge_sizes = {
        "NUM_KV_HEADS": num_kv_heads,
        "GQA_RATIO": gqa_ratio,
        "VALUE_DIM": value_dim,
        "PADDED_VALUE_DIM": _power_of_two(value_dim),
        "AT_ONCE": _MERGED_AT_ONCE,
        "HAS_SINKS": params.has_sinks,
        "num_warps": _NUM_WARPS,
    }
    attend_to_all: Any = attend_to_split[num_kv_heads, max_splits]
    merge: Any = merge_splits[num_rows, num_heads, num_queries]
    softcap = 1.0 if params.softcap is None else params.softcap
    lists = splits.block_table, splits.splits, splits.kv_stop, splits.kv_start
    table_width = splits.block_table.shape[1]

    def attend(query: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None) -> Tensor:
        if query.stride(3) != 1:
            query = query.contiguous()
        parts = query.new_empty(parts_shape, dtype=torch.float32)
        lse = query.new_empty(parts_shape[:3], dtype=torch.float32)
        attend_to_all(
            query,
            keys,
            values,
            parts,
            lse,
            *lists,
            params.scale,
            softcap,
            *query.stride()[:3],
            num_slots,
            num_queries,
            table_width,
            **sizes,
        )
        output = query.new_empty(num_rows, num_queries, num_heads, value_dim)
        merge(parts, lse, splits.first_split, sinks if sinks is not None else lse, output, num_queries, **merge_sizes)
        return output

    return attend


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _tile(device: torch.device, token_bytes: int) -> tuple[int, int]:
    """Tokens of a block, and the stages of Triton's pipeline, so that blocks fit into a processor's memory.

    Where pages are has to be read before what is in them, so that a block takes two stages.
    """
    room = _shared_memory(device)
    block = _BLOCK
    while block > 16 and block * token_bytes > room:
        block //= 2
    return block, 1 + 2 * min(_MAX_BLOCKS, max(1, room // (block * token_bytes)))


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a program may use beside its registers, less some for what is none of the blocks."""
    if device.type != "cuda":
        return 2**16  # interpreted
    room: int = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 2**16)
    return room * 7 // 8
