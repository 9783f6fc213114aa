"""Attention over contiguous keys, for what the fused kernel can't do."""

import torch
from torch import Tensor

_BLOCK = 256  # queries at a time: the scores of all of them at once would take more memory than the cache


def blockwise_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend with bounded scores, attention sinks, or the last of many queries.

    Args:
        query: `(num_rows, num_heads, num_queries, head_dim)`.
        keys: `(num_rows, num_kv_heads, num_columns, head_dim)`.
        values: like `keys`.
        mask: `(num_rows, 1, num_queries, num_columns)`, bool, or added to the scores; None without.
        is_causal: whether, without a mask, the queries belong to the last columns and see none behind their own.
        scale: factor on the scores.
        softcap: bound of the scores, `softcap * tanh(score / softcap)`; None without.
        sinks: `(num_heads,)` score of a token that every query sees and whose value is 0; None without.

    Returns:
        `(num_rows, num_queries, num_heads, value_head_dim)`.
    """
    num_rows, _, num_queries, head_dim = query.shape
    num_kv_heads, num_columns = keys.shape[1:3]
    grouped = query.reshape(num_rows, num_kv_heads, -1, num_queries, head_dim)
    blocks = []
    for start in range(0, num_queries, _BLOCK):
        stop = min(num_queries, start + _BLOCK)
        scores = grouped[..., start:stop, :] @ keys[:, :, None].mT * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.flatten(1, 2)
        if mask is None and is_causal:
            columns = torch.arange(num_columns, device=query.device)
            last = torch.arange(start, stop, device=query.device) + num_columns - num_queries
            scores = scores.masked_fill(columns > last[:, None], -torch.inf)
        elif mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask[:, :, start:stop], torch.finfo(scores.dtype).min)
        elif mask is not None:
            scores = scores + mask[:, :, start:stop]
        if sinks is not None:
            sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(num_rows, -1, stop - start, 1)
            scores = torch.cat([scores, sink], dim=-1)
        exact = torch.promote_types(scores.dtype, torch.float32)
        weights = torch.softmax(scores, dim=-1, dtype=exact).to(query.dtype)[..., :num_columns]
        by_group = weights.view(num_rows, num_kv_heads, -1, stop - start, num_columns)
        blocks.append((by_group @ values[:, :, None]).flatten(1, 2))
    return torch.cat(blocks, dim=2).transpose(1, 2)
