"""Attention over packed tokens on a CPU, row by row.

There the fused kernel is faster than FlexAttention by more than it takes to copy the tokens of one row and layer out
of their pages.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_paged.attention.backends.base import Attention, AttentionParams
from hf_paged.attention.backends.reference import blockwise_attention
from hf_paged.batch.padding import Counts
from hf_paged.batch.steps.step import KVRanges
from hf_paged.pages.block_table import BlockTable

_BLOCK = 64  # queries at a time: the fused kernel computes what a mask hides, too


@dataclass(frozen=True)
class Block:
    """A few queries of one row.

    Attributes:
        queries: which of the packed queries they are.
        tokens: which of the row's tokens any of them sees.
        kv_start: `(num_queries,)` of these tokens the first that each query sees.
        kv_stop: `(num_queries,)` and the first behind those that it sees.
    """

    queries: slice
    tokens: slice
    kv_start: Counts
    kv_stop: Counts

    @property
    def num_tokens(self) -> int:
        """Tokens that any of the queries sees."""
        return int(self.kv_stop[-1])

    @property
    def is_causal(self) -> bool:
        """Whether the queries are those of the last tokens, and each sees all up to its own."""
        num_queries = len(self.kv_stop)
        return not self.kv_start[-1] and self.kv_stop[0] == self.kv_stop[-1] - num_queries + 1


@dataclass(frozen=True)
class VarlenRow:
    """Queries of one row, and the tokens that any of them sees.

    Attributes:
        slots: `(num_tokens,)` int64, where these tokens are, in their order.
        blocks: the queries.
    """

    slots: Tensor
    blocks: Sequence[Block]


def varlen_rows_of(table: BlockTable, ranges: KVRanges) -> list[VarlenRow]:
    """Cut packed queries by their rows.

    With 3 queries of a row that they begin, and 100 of one that holds 5 tokens already, one of these reads 3 tokens
    for a block of 3 queries. The other reads 105: the first 69 of them for a block of 64 queries, all for one of 36.

    Args:
        table: the rows whose pages are read.
        ranges: of packed queries: `kv_stop` ascends within a row, `kv_start` does or stays the same.
    """
    rows, kv_stop, kv_start = ranges.rows, ranges.kv_stop, ranges.kv_start
    assert rows is not None
    if kv_start is None:
        kv_start = np.zeros_like(kv_stop)
    begins = np.unique(rows, return_index=True)[1].tolist()
    return [
        _varlen_row(table, int(rows[begin]), begin, kv_stop[begin:end], kv_start[begin:end])
        for begin, end in zip(begins, [*begins[1:], len(rows)], strict=False)
    ]


def _varlen_row(table: BlockTable, row: int, begin: int, kv_stop: Counts, kv_start: Counts) -> VarlenRow:
    page_size = table.group.page_size
    tokens = np.arange(kv_start[0], kv_stop[-1])
    slots = table.block_table[row, tokens // page_size].astype(np.int64) * page_size + tokens % page_size
    blocks = []
    for offset in range(0, len(kv_stop), _BLOCK):
        own_kv_start, own_kv_stop = kv_start[offset : offset + _BLOCK], kv_stop[offset : offset + _BLOCK]
        first, limit = int(own_kv_start[0]), int(own_kv_stop[-1])
        queries = slice(begin + offset, begin + offset + len(own_kv_stop))
        seen = slice(first - int(kv_start[0]), limit - int(kv_start[0]))
        blocks.append(Block(queries, seen, own_kv_start - first, own_kv_stop - first))
    return VarlenRow(torch.from_numpy(slots), blocks)


def varlen_attention(
    query: Tensor,
    values: Tensor,
    varlen_rows: Sequence[VarlenRow],
    params: AttentionParams,
) -> Attention:
    """Return the attention of layers with tensors of these shapes and dtype.

    Args:
        query: `(1, num_heads, num_queries, head_dim)`. Those behind the rows' belong to no row and give 0.
        values: `(1, num_kv_heads, num_slots, value_head_dim)`.
        varlen_rows: in the order of their queries, which leave none out before the last of them.
        params: what the layer wants.
    """
    num_queries, num_kv_heads, value_dim = query.shape[2], values.shape[1], values.shape[3]
    gqa_ratio = query.shape[1] // num_kv_heads
    num_tokens = varlen_rows[-1].blocks[-1].queries.stop if varlen_rows else 0
    scale, softcap, has_sinks = params
    is_fused = softcap is None and not has_sinks
    # The query heads of a key/value head are stacked, so that a block has work for every thread.
    masks = _Masks(varlen_rows, gqa_ratio if is_fused else 1, query.dtype)
    work = [
        (varlen_row.slots, [(block, masks.of(block)) for block in varlen_row.blocks]) for varlen_row in varlen_rows
    ]

    def attend(query: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None) -> Tensor:
        output = query.new_empty(1, num_queries, num_kv_heads, gqa_ratio, value_dim)
        output[:, num_tokens:] = 0
        if is_fused:
            query = query.view(1, num_kv_heads, gqa_ratio, num_queries, -1).transpose(2, 3).flatten(2, 3)
        for slots, blocks in work:
            row_keys, row_values = keys.index_select(2, slots), values.index_select(2, slots)
            for block, mask in blocks:
                begin, end = block.queries.start, block.queries.stop
                own_keys, own_values = row_keys[:, :, block.tokens], row_values[:, :, block.tokens]
                if is_fused:
                    own = query[:, :, begin * gqa_ratio : end * gqa_ratio]
                    attended = torch.nn.functional.scaled_dot_product_attention(
                        own, own_keys, own_values, attn_mask=mask, scale=scale
                    )
                    output[:, begin:end] = attended.view(1, num_kv_heads, -1, gqa_ratio, value_dim).transpose(1, 2)
                else:
                    own = query[:, :, begin:end]
                    attended = blockwise_attention(own, own_keys, own_values, mask, True, scale, softcap, sinks)
                    output[:, begin:end] = attended.view(output[:, begin:end].shape)
        return output.flatten(2, 3)

    return attend


class _Masks:
    """What is added to the scores of each block's queries.

    Args:
        varlen_rows: all blocks that will be asked for.
        gqa_ratio: rows of a mask for each query.
        dtype: of the scores.
    """

    def __init__(self, varlen_rows: Sequence[VarlenRow], gqa_ratio: int, dtype: torch.dtype) -> None:
        self._group = gqa_ratio
        self._dtype = dtype
        lengths = [block.num_tokens for varlen_row in varlen_rows for block in varlen_row.blocks if block.is_causal]
        self._num_past = max(lengths, default=0)
        # Causal masks differ in how many tokens lie before those of the queries, and each is a piece of one.
        kv_stop = self._num_past + 1 + np.arange(_BLOCK)
        self._causal = self._hiding(np.zeros_like(kv_stop), kv_stop)

    def of(self, block: Block) -> Tensor | None:
        """`(1, 1, num_queries * gqa_ratio, num_tokens)`; None for a single query, which sees all."""
        num_queries = len(block.kv_stop)
        if num_queries == 1:
            return None
        if not block.is_causal:
            return self._hiding(block.kv_start, block.kv_stop)
        first = self._num_past - (block.num_tokens - num_queries)
        return self._causal[:, :, : num_queries * self._group, first : first + block.num_tokens]

    def _hiding(self, kv_start: Counts, kv_stop: Counts) -> Tensor:
        tokens = np.arange(kv_stop[-1])
        is_hidden = torch.from_numpy((tokens < kv_start[:, None]) | (tokens >= kv_stop[:, None]))
        mask = torch.zeros(is_hidden.shape, dtype=self._dtype).masked_fill_(is_hidden, -math.inf)
        return mask.repeat_interleave(self._group, 0)[None, None]
