"""Attention of several queries on a CPU, row by row.

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
        queries: which of all queries they are, one row's after another's.
        tokens: which of the tokens in the row's pages any of them sees.
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
        return not self.kv_start[-1] and bool((np.diff(self.kv_stop) == 1).all())

    @property
    def sees_all(self) -> bool:
        """Whether each of the queries sees what any of them does."""
        return not self.kv_start[-1] and bool(self.kv_stop[0] == self.kv_stop[-1])


@dataclass(frozen=True)
class VarlenRow:
    """Queries of one row, and the tokens that any of them sees.

    Attributes:
        pages: `(num_pages,)` int64, where these tokens are, in their order.
        blocks: the queries.
    """

    pages: Tensor
    blocks: Sequence[Block]


def varlen_rows_of(table: BlockTable, ranges: KVRanges) -> list[VarlenRow]:
    """Cut queries by their rows.

    With 3 queries of a row that they begin, and 100 of one that holds 5 tokens already, one of these reads 3 tokens
    for a block of 3 queries. The other reads 105: the first 69 of them for a block of 64 queries, all for one of 36.

    Queries of a padded batch are taken for packed ones: those of the row `r` are `r * num_queries` and following.
    Where some of them see nothing, as padding before a row does, they are left out, and cut the row in two.

    Args:
        table: the rows whose pages are read.
        ranges: within a row `kv_stop` ascends or stays the same, where it is not 0, and so does `kv_start`.
    """
    kv_stop, kv_start, rows = ranges.kv_stop.ravel(), ranges.kv_start, ranges.rows
    if rows is None:
        rows = np.repeat(np.arange(len(ranges.kv_stop)), ranges.kv_stop.shape[1])
    kv_start = np.zeros_like(kv_stop) if kv_start is None else kv_start.ravel()
    sees = np.flatnonzero(kv_stop)
    is_begun = (np.diff(sees, prepend=-2) > 1) | (np.diff(rows[sees], prepend=-1) > 0)
    return [
        _varlen_row(table, int(rows[run[0]]), int(run[0]), kv_stop[run], kv_start[run])
        for run in np.split(sees, np.flatnonzero(is_begun)[1:])
        if len(run)
    ]


def _varlen_row(table: BlockTable, row: int, begin: int, kv_stop: Counts, kv_start: Counts) -> VarlenRow:
    page_size = table.group.page_size
    first_page = int(kv_start[0]) // page_size
    pages = table.block_table[row, first_page : -(-int(kv_stop[-1]) // page_size)].astype(np.int64)
    blocks = []
    for offset in range(0, len(kv_stop), _BLOCK):
        own_kv_start, own_kv_stop = kv_start[offset : offset + _BLOCK], kv_stop[offset : offset + _BLOCK]
        first, limit = int(own_kv_start[0]), int(own_kv_stop[-1])
        queries = slice(begin + offset, begin + offset + len(own_kv_stop))
        seen = slice(first - first_page * page_size, limit - first_page * page_size)
        blocks.append(Block(queries, seen, own_kv_start - first, own_kv_stop - first))
    return VarlenRow(torch.from_numpy(pages), blocks)


def varlen_attention(
    query: Tensor,
    values: Tensor,
    varlen_rows: Sequence[VarlenRow],
    page_size: int,
    params: AttentionParams,
) -> Attention:
    """Return the attention of layers with tensors of these shapes and dtype.

    Args:
        query: `(num_rows, num_heads, num_queries, head_dim)`.
        values: `(1, num_kv_heads, num_slots, value_head_dim)`.
        varlen_rows: what to read. Queries that are in none of them give 0.
        page_size: tokens per page.
        params: what the layer wants.
    """
    num_rows, num_heads, num_queries, head_dim = query.shape
    num_kv_heads, value_dim = values.shape[1], values.shape[3]
    gqa_ratio = num_heads // num_kv_heads
    scale, softcap, has_sinks = params
    is_fused = softcap is None and not has_sinks
    # The query heads of a key/value head are stacked, so that a block has work for every thread.
    num_stacked = gqa_ratio if is_fused else 1
    masks = _Masks(varlen_rows, num_stacked, query.dtype)
    work = [
        (varlen_row.pages, [(block, masks.of(block)) for block in varlen_row.blocks]) for varlen_row in varlen_rows
    ]
    num_seeing = sum(len(block.kv_stop) for _, blocks in work for block, _ in blocks)
    new_output = torch.Tensor.new_empty if num_seeing == num_rows * num_queries else torch.Tensor.new_zeros

    def attend(query: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None) -> Tensor:
        output = new_output(query, (1, num_rows * num_queries, num_heads, value_dim))
        by_head = query.view(num_rows, -1, num_stacked, num_queries, head_dim).permute(1, 0, 3, 2, 4)
        stacked = by_head.reshape(1, num_heads // num_stacked, -1, head_dim)
        for pages, blocks in work:
            row_keys, row_values = (_copy_of(tensor, pages, page_size) for tensor in (keys, values))
            for block, mask in blocks:
                begin, end = block.queries.start, block.queries.stop
                own = stacked[:, :, begin * num_stacked : end * num_stacked]
                own_keys, own_values = row_keys[:, :, block.tokens], row_values[:, :, block.tokens]
                if is_fused:
                    attended = torch.nn.functional.scaled_dot_product_attention(
                        own, own_keys, own_values, attn_mask=mask, scale=scale
                    )
                    by_query = attended.view(1, num_kv_heads, -1, gqa_ratio, value_dim).transpose(1, 2)
                    output[:, begin:end].view(by_query.shape).copy_(by_query)
                else:
                    output[:, begin:end] = blockwise_attention(
                        own, own_keys, own_values, mask, False, scale, softcap, sinks
                    )
        return output.view(num_rows, num_queries, num_heads, value_dim)

    return attend


def _copy_of(tensor: Tensor, pages: Tensor, page_size: int) -> Tensor:
    """`(1, num_kv_heads, num_pages * page_size, head_dim)`."""
    _, num_kv_heads, _, head_dim = tensor.shape
    return tensor.view(1, num_kv_heads, -1, page_size, head_dim).index_select(2, pages).flatten(2, 3)


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
        """`(1, 1, num_queries * gqa_ratio, num_tokens)`; None where nothing is hidden."""
        num_queries = len(block.kv_stop)
        if block.sees_all:
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
