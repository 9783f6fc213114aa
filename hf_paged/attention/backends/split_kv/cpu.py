"""Decoding on a CPU: the pages of all rows, in pieces, shared out among the threads, and put together row by row.

FlexAttention's template for CPUs gives each key/value head of each row to one thread, and goes through the pages once
for every query head. Here any thread may get any piece of a page, and reads it once for all heads that share it.

A KV split is a piece of a page of one row. Threads get equal shares of the splits, whichever rows these are of, and
what they find in them is put together row by row afterwards. Pieces are small: what is read for one query head
is still at hand for the next one, and of the last page no more is read than is filled, about.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from hf_paged._torch.inductor import compiled_kernel
from hf_paged.attention.backends.base import NO_SINKS, Attention, AttentionParams
from hf_paged.batch.padding import Counts
from hf_paged.batch.steps.step import KVRanges
from hf_paged.pages.block_table import BlockTable

_MAX_SIZE = 32  # tokens: with 64 values each, keys of a split take a quarter of a processor's first cache
_MIN_SPLITS = 2  # a size of 1 would need a kernel of its own


@dataclass
class KVSplits:
    """The pieces of pages that a step reads, on the CPU. A KV split that no row has may be among them.

    Attributes:
        size: tokens per split; a page has as many or a multiple.
        pieces: `(num_splits,)` int64, the slots of the pool in pieces of `size`, in ascending order: the next piece in
            memory is the next one to be read, and one that several rows share is read for all of them.
        rows: `(num_splits,)` int64, whose piece it is.
        kv_start: `(num_splits,)` int32, tokens at the beginning of the piece that are not seen.
        kv_stop: `(num_splits,)` int32, tokens of the piece before the first one behind those that are seen.
        by_row: `(num_places, num_rows)` int64, the splits of each row; any behind its last one.
        counts: `(num_rows,)` int64, splits of each row.
    """

    size: int
    pieces: Tensor
    rows: Tensor
    kv_start: Tensor
    kv_stop: Tensor
    by_row: Tensor
    counts: Tensor


_builders: WeakKeyDictionary[BlockTable, dict[int | None, "_Builder"]] = WeakKeyDictionary()


def kv_splits_of(table: BlockTable, ranges: KVRanges) -> KVSplits:
    """Cut what the only query of each row sees; the next step changes what this returned.

    Args:
        table: the rows whose pages are read.
        ranges: of one query for each row.
    """
    builders = _builders.setdefault(table, {}) if ranges.is_whole else {}
    builder = builders.get(ranges.window)
    if builder is None:
        builder = builders[ranges.window] = _Builder(table.group.page_size)
    return builder.fill(table, ranges.kv_stop[:, 0], None if ranges.kv_start is None else ranges.kv_start[:, 0])


class _Builder:
    """Makes the splits of each step, anew only if a row reads other pieces than in the step before.

    It doesn't hold the rows, which are freed as soon as nobody else does.
    """

    def __init__(self, page_size: int) -> None:
        self._size = min(page_size, _MAX_SIZE)
        self._num_pieces = page_size // self._size
        self._state: tuple[int, bytes] = (-1, b"")

    def fill(self, table: BlockTable, kv_stop: Counts, kv_start: Counts | None) -> KVSplits:
        ends = -(-kv_stop // self._size)
        begins = np.zeros_like(ends) if kv_start is None else np.minimum(kv_start // self._size, ends)
        state = table.version, ends.tobytes() + begins.tobytes()
        if state != self._state:
            self._cut(table, begins, ends)
            self._state = state
        rows = self._read_rows
        self._kv_stop[self._last_splits] = (kv_stop - (ends - 1) * self._size)[rows]
        if kv_start is not None:
            self._kv_start[self._first_splits] = (kv_start - begins * self._size)[rows]
        return self._splits

    def _cut(self, table: BlockTable, begins: Counts, ends: Counts) -> None:
        counts = ends - begins
        num_splits, num_rows = int(counts.sum()), len(counts)
        rows = np.repeat(np.arange(num_rows), counts)
        offsets = np.arange(num_splits) - np.repeat(counts.cumsum() - counts, counts)
        pages, parts = np.divmod(offsets + begins[rows], self._num_pieces)
        pieces = table.block_table[rows, pages] * np.int64(self._num_pieces) + parts
        order = np.argsort(pieces, kind="stable")
        by_row = np.zeros((max(_MIN_SPLITS, int(counts.max(initial=0))), num_rows), dtype=np.int64)
        by_row[offsets[order], rows[order]] = np.arange(num_splits)
        self._read_rows = np.flatnonzero(counts)
        self._first_splits = by_row[0, self._read_rows]
        self._last_splits = by_row[counts[self._read_rows] - 1, self._read_rows]
        size = max(_MIN_SPLITS, num_splits)
        split_pieces, split_rows = np.zeros((2, size), dtype=np.int64)
        split_pieces[:num_splits], split_rows[:num_splits] = pieces[order], rows[order]
        self._kv_start = np.zeros(size, dtype=np.int32)
        self._kv_stop = np.full(size, self._size, dtype=np.int32)
        arrays = split_pieces, split_rows, self._kv_start, self._kv_stop, by_row, counts
        with torch.inference_mode(False):  # they outlive the mode that they are made in
            self._splits = KVSplits(self._size, *map(torch.from_numpy, arrays))


_LANES = 16  # values that the inner loop takes at a time: a vector of 512 bits
_MAX_SUMS = 16  # vectors of running sums, which have to stay in registers


@dataclass(frozen=True)
class _Variant:
    """What a compiled kernel is specialised for, sizes aside; see `hf_paged.attention.backends.flex.Variant`."""

    dtype: torch.dtype
    num_kv_heads: int
    gqa_ratio: int
    head_dims: tuple[int, int]
    split_size: int
    params: AttentionParams
    has_one_row: bool


def split_kv_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    splits: KVSplits,
    params: AttentionParams,
) -> Attention:
    """Return the attention of layers with tensors of these shapes and dtype, on a CPU.

    Args:
        query: `(num_rows, num_heads, 1, head_dim)`.
        keys: `(1, num_kv_heads, num_slots, head_dim)`, the storage of a layer; will be read where `splits` says.
        values: `(1, num_kv_heads, num_slots, value_head_dim)`.
        splits: what to read.
        params: what the layer wants.

    Source:
        Flash-Decoding: Dao et al., 2023. Pages that rows share, read once: Juravsky et al., 2024 (Hydragen).
    """
    num_kv_heads, value_head_dim = values.shape[1], values.shape[3]
    gqa_ratio = query.shape[1] // num_kv_heads
    variant = _Variant(
        dtype=query.dtype,
        num_kv_heads=num_kv_heads,
        gqa_ratio=gqa_ratio,
        head_dims=(query.shape[3], value_head_dim),
        split_size=splits.size,
        params=params,
        has_one_row=query.shape[0] == 1,
    )
    lists = splits.pieces, splits.rows, splits.kv_start, splits.kv_stop, splits.by_row, splits.counts
    scores = query.new_zeros(num_kv_heads, gqa_ratio) if params.has_sinks else NO_SINKS
    arguments = query.contiguous(), keys, values, *lists, scores
    kernel = compiled_kernel(variant, partial(_build, variant), arguments, _dynamic_sizes).bound_to(arguments)

    def attend(query: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None) -> Tensor:
        scores = NO_SINKS if sinks is None else sinks.to(query.dtype).view(num_kv_heads, gqa_ratio)
        # Where queries are a slice of one projection, as in GPT-2, this copies them: a kernel is made for one layout.
        return kernel(query.contiguous(), keys, values, scores)

    return attend


def _dynamic_sizes(name: str) -> tuple[int, ...]:
    match name:
        case "keys" | "values":
            return (2,)
        case "by_row":
            return (0, 1)
        case "sinks":
            return ()
    return (0,)


def _build(variant: _Variant) -> Callable[..., Tensor]:
    scale, softcap, has_sinks = variant.params
    num_sums = variant.gqa_ratio * -(-variant.head_dims[1] // _LANES)
    sum_up = _sum_in_one_go if num_sums <= _MAX_SUMS else _sum_head_by_head
    # With a single row, what counts is to have few buffers; see `_sum_in_one_go`.
    score = _score_head_by_head if variant.has_one_row else _score_in_one_go

    def attend_to_splits(
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        pieces: Tensor,
        rows: Tensor,
        kv_start: Tensor,
        kv_stop: Tensor,
        by_row: Tensor,
        counts: Tensor,
        sinks: Tensor,
    ) -> Tensor:
        by_head = query.view(-1, variant.num_kv_heads, variant.gqa_ratio, variant.head_dims[0])
        queries = by_head[rows].transpose(0, 1).float()  # (num_kv_heads, num_splits, gqa_ratio, head_dim)
        split_keys, split_values = (_cut(tensor, variant.split_size)[:, pieces].float() for tensor in (keys, values))
        token = torch.arange(variant.split_size, dtype=torch.int32)
        is_seen = (token >= kv_start[:, None]) & (token < kv_stop[:, None])
        scores = score(queries, split_keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = torch.where(is_seen[:, None], scores, -math.inf)
        top = scores.amax(-1)  # (num_kv_heads, num_splits, gqa_ratio)
        weights = torch.exp(scores - top[..., None])
        sums = weights.sum(-1)
        part = sum_up(weights, split_values)

        # Places lead and rows follow: then vectors are made of values, which lie side by side, not of places. Heads
        # stay outermost: if they come last, torch 2.11 makes code that writes past a buffer (three, gqa_ratio 1).
        is_held = (torch.arange(by_row.shape[0])[:, None] < counts)[..., None]  # (num_places, num_rows, 1)
        tops = torch.where(is_held, top[:, by_row], -math.inf)
        best = tops.amax(1)  # (num_kv_heads, num_rows, gqa_ratio)
        if has_sinks:
            best = torch.maximum(best, sinks[:, None].float())
        best = torch.where(best == -math.inf, 0.0, best)  # of a row that sees nothing
        share = torch.exp(tops - best[:, None])
        total = torch.where(is_held, share * sums[:, by_row], 0.0).sum(1)
        if has_sinks:
            total = total + torch.exp(sinks[:, None].float() - best)
        # What is not held is another row's, which must not spoil this one even if it is NaN.
        held = torch.where(is_held[..., None], share[..., None] * part[:, by_row], 0.0)
        output = held.sum(1) / torch.where(total > 0, total, 1.0)[..., None]
        by_row_first = output.transpose(0, 1).to(query.dtype).contiguous()
        return by_row_first.view(-1, 1, query.shape[1], variant.head_dims[1])

    return attend_to_splits


def _cut(tensor: Tensor, size: int) -> Tensor:
    """`(1, num_kv_heads, num_slots, head_dim)` to `(num_kv_heads, num_pieces, size, head_dim)`."""
    _, num_kv_heads, _, head_dim = tensor.shape
    return tensor.view(num_kv_heads, -1, size, head_dim)


# Whether heads are taken apart here decides whether inductor makes one loop of all of them, or one for each.


def _score_in_one_go(queries: Tensor, keys: Tensor) -> Tensor:
    """Products of `(.., gqa_ratio, head_dim)` queries and `(.., size, head_dim)` keys, `(.., gqa_ratio, size)`."""
    heads = torch.unbind(queries, -2)
    return torch.stack([(query[..., None, :] * keys).sum(-1) for query in heads], -2)


def _score_head_by_head(queries: Tensor, keys: Tensor) -> Tensor:
    return (queries[..., None, :] * keys[..., None, :, :]).sum(-1)


def _sum_in_one_go(weights: Tensor, values: Tensor) -> Tensor:
    """Sums of `(.., size, head_dim)` values by `(.., gqa_ratio, size)` weights, `(.., gqa_ratio, head_dim)`.

    Side by side in one buffer: inductor makes each buffer by a call into Python.
    """
    lanes = torch.split(values, _LANES, -1)
    sums = [(head[..., None] * part).sum(-2) for head in torch.unbind(weights, -2) for part in lanes]
    return torch.cat(sums, -1).view(*weights.shape[:-1], values.shape[-1])


def _sum_head_by_head(weights: Tensor, values: Tensor) -> Tensor:
    lanes = torch.split(values[..., None, :, :], _LANES, -1)
    return torch.cat([(weights[..., None] * part).sum(-2) for part in lanes], -1)
