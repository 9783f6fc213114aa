"""Attention over packed tokens on a CPU, row by row.

There the fused kernel is faster than FlexAttention by more than it takes to copy the tokens of one row and layer out
of their pages.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_paged.columns import Counts
from hf_paged.eager import blockwise_attention
from hf_paged.kernel import Attention
from hf_paged.page_table import PageTable
from hf_paged.tiling import check_kept

MAX_QUERIES = 256  # of a segment: the fused kernel computes what a mask hides, too, and most of that lies behind them


@dataclass(frozen=True)
class Segment:
    """Queries of one row, and the tokens that any of them sees.

    Attributes:
        queries: which of the packed queries they are.
        slots: `(num_tokens,)` int64, where these tokens are, in their order.
        mask: `(1, 1, num_queries, num_tokens)` bool, what each query sees of them; None: all up to itself, where the
            tokens are those of the queries, and all where there is a single query.
    """

    queries: slice
    slots: Tensor
    mask: Tensor | None


def segments_of(table: PageTable, rows: Counts, limits: Counts, firsts: Counts | None) -> list[Segment]:
    """Cut packed queries that see the tokens of their row from `firsts` up to, not including, `limits`.

    With 3 queries of a row that they begin, and 2 of one that holds 5 tokens already, one segment reads 3 tokens
    without a mask, the other 7 under one.

    Args:
        table: the rows whose pages are read.
        rows: `(num_tokens,)` row of each query, ascending.
        limits: `(num_tokens,)`, ascending within a row.
        firsts: likewise, but may stay the same; None: from the beginning.

    Raises:
        ValueError: if a token is to be seen that was dropped.
    """
    check_kept(table, table.starts[rows], limits, firsts)
    if firsts is None:
        firsts = np.zeros_like(limits)
    _, own_begins, counts = np.unique(rows, return_index=True, return_counts=True)
    begins = np.flatnonzero((np.arange(len(rows)) - np.repeat(own_begins, counts)) % MAX_QUERIES == 0).tolist()
    return [
        _segment(table, int(rows[begin]), slice(begin, end), limits[begin:end], firsts[begin:end])
        for begin, end in zip(begins, [*begins[1:], len(rows)], strict=False)
    ]


def _segment(table: PageTable, row: int, queries: slice, limits: Counts, firsts: Counts) -> Segment:
    page_size = table.group.page_size
    tokens = np.arange(firsts[0], limits[-1])
    slots = table.block_table[row, tokens // page_size].astype(np.int64) * page_size + tokens % page_size
    mask = None
    if firsts[-1] > firsts[0] or 1 < len(limits) < len(tokens):
        mask = torch.from_numpy((tokens >= firsts[:, None]) & (tokens < limits[:, None]))[None, None]
    return Segment(queries, torch.from_numpy(slots), mask)


def segmented_attention(
    segments: Sequence[Segment], num_queries: int, scale: float, softcap: float | None
) -> Attention:
    """Return the attention of layers over these segments.

    Args:
        segments: in the order of their queries, which leave none out before the last of them.
        num_queries: those behind belong to no row and give 0.
        scale: factor on the scores.
        softcap: bound of the scores; None without.
    """
    num_tokens = segments[-1].queries.stop if segments else 0

    def attend(query: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None) -> Tensor:
        output = query.new_empty(1, num_queries, query.shape[1], values.shape[3])
        output[:, num_tokens:] = 0
        for segment in segments:
            own = query[:, :, segment.queries]
            seen = keys.index_select(2, segment.slots), values.index_select(2, segment.slots)
            output[:, segment.queries] = _attend(own, *seen, segment.mask, scale, softcap, sinks)
        return output

    return attend


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    if softcap is not None or sinks is not None:
        return blockwise_attention(query, keys, values, mask, True, scale, softcap, sinks)
    is_causal = mask is None and query.shape[2] > 1
    # Not by way of Transformers, which repeats keys and values for all query heads where there is a mask.
    attended = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=True
    )
    return attended.transpose(1, 2)
