"""What all backends have in common."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class AttentionParams(NamedTuple):
    """What a layer wants of its attention, sizes aside; part of the key of each compiled kernel.

    Attributes:
        scale: factor on the scores.
        softcap: bound of the scores, `softcap * tanh(score / softcap)`; None without.
        has_sinks: whether there are attention sinks.
    """

    scale: float
    softcap: float | None = None
    has_sinks: bool = False


Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Attends to the pages of each row.

Args:
    query: `(num_rows, num_heads, num_queries, head_dim)`.
    keys: `(1, num_kv_heads, num_slots, head_dim)`, the storage of a layer.
    values: `(1, num_kv_heads, num_slots, value_head_dim)`.
    sinks: `(num_heads,)` score of a token that every query sees and whose value is 0; None without.

Returns:
    `(num_rows, num_queries, num_heads, value_head_dim)`. Queries that see nothing give 0.
"""

NO_SINKS = torch.zeros(1, 1)
