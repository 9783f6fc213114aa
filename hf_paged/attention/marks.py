"""Marks on new keys and values, by which their attention knows them again in a graph that is being made.

They are attributes of tensors, which dynamo follows and leaves out of the graph. What a model makes of a marked tensor
has no mark.
"""

from typing import Any

import torch
from torch import Tensor

NEW = "_hf_paged_new"
"""The attribute of new keys and values that are not written yet."""


def marked(tokens: Tensor, layer: int, is_key: bool) -> Tensor:
    """Mark new keys or values as those of a layer which are not written yet."""
    tokens = torch.ops.hf_paged.new_tokens(tokens, layer)
    tokens._hf_paged_new = layer, is_key  # type: ignore[attr-defined]
    return tokens


def layer_of(key: Any, value: Any) -> int | None:
    """The layer whose new keys and values these are; None for anything else."""
    layer, is_key = getattr(key, NEW, (None, False))
    return layer if is_key and getattr(value, NEW, None) == (layer, False) else None


def is_marked(tokens: Any) -> bool:
    """Whether these are new keys or values as `marked` returned them."""
    return hasattr(tokens, NEW)


def note_output(key: Tensor, output: Tensor) -> None:
    """Note which attention has written new keys."""
    key._hf_paged_output = output  # type: ignore[attr-defined]


def output_of(key: Tensor) -> Tensor | None:
    """The output of the attention that has written these keys; None if they are not written yet."""
    return getattr(key, "_hf_paged_output", None)
