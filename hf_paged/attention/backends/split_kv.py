"""Decoding on a CPU: the pages of all rows, in pieces, shared out among the threads, and put together row by row.

FlexAttention's template for CPUs gives each key/value head of each row to one thread, and goes through the pages once
for every query head. Here any thread may get any piece of a page, and reads it once for all heads that share it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hf_paged._torch.inductor import compiled_kernel
from hf_paged.attention.backends.base import NO_SINKS, Attention, AttentionParams
from hf_paged.attention.backends.kv_splits import KVSplits

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
