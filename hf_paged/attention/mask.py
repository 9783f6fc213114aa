"""The mask function of `"paged_flex"`, which reserves each step, and what it returns."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedConfig
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from hf_paged._torch.dynamo import outside_of_graphs
from hf_paged._transformers import num_decoder_layers
from hf_paged.attention.dispatch import reads_pages
from hf_paged.attention.metadata import AttentionMetadata
from hf_paged.batch.sequences import Sequences
from hf_paged.batch.steps.ragged import RaggedStep
from hf_paged.batch.steps.step import View

NAME = "paged_flex"

ALLOWED = "_hf_paged_allowed"
"""The attribute of a mask that may be added to scores: the bool mask that it was made of.

They differ for a query that may see nothing: SDPA gives 0 there, and scores that are all the least number are alike.
"""


# Transformers passes the length of a cache on as an `int`; neither the mask function nor the slicing of the prompt
# ever sees the cache itself. An `int` with a memory is the way to reach it that patches nothing.


class PlannedLength(int):
    """What `get_mask_sizes` returns as key/value length: it carries the rows to the mask function."""

    sequences: Sequences

    def __new__(cls, value: int, sequences: Sequences) -> "PlannedLength":
        """Make `value` carry `sequences`."""
        length = super().__new__(cls, value)
        length.sequences = sequences
        return length


class PastLength(int):
    """What `get_seq_length` returns: it notices when `generate()` is given fewer tokens than are cached.

    `generate()` keeps the part of the prompt that is not cached with `input_ids[:, -(num_ids - past_length):]`, which
    silently takes the wrong tokens when `num_ids <= past_length`.
    """

    def __rsub__(self, other: int) -> "_Remainder":
        """Subtract from a length, remembering both."""
        remainder = _Remainder(int(other) - int(self))
        remainder.num_ids, remainder.num_cached = int(other), int(self)
        return remainder


class _Remainder(int):
    num_ids: int
    num_cached: int

    def __neg__(self) -> int:
        if self <= 0:
            raise ValueError(
                f"The cache holds {self.num_cached} tokens, but input_ids has {self.num_ids}, so no token is left to "
                "compute. Pass the whole conversation so far plus at least one new token, or call cache.resume(model, "
                "input_ids) to keep what both have in common, or cache.reset() to start over."
            )
        return -int(self)


class PagedMask(BlockMask):
    """The mask of one step over pages, which Transformers hands from the mask function to every layer.

    A `BlockMask`, since Transformers passes these through untouched; its block lists are made when the attention
    function says how many query heads share a key/value head.

    Args:
        metadata: of the forward pass.
    """

    ndim = 4

    def __init__(self, metadata: AttentionMetadata) -> None:
        self.metadata = metadata
        self._shape = metadata.shape

    @property
    def shape(self) -> tuple[int, ...]:
        """`(num_rows, 1, num_queries, num_columns)`, the mask as Transformers would see it."""
        return self._shape

    def dim(self) -> int:
        """Number of dimensions, as of a tensor."""
        return self.ndim

    def __getitem__(self, index: object) -> "PagedMask":
        """The mask of some of the queries, `mask[:, :, queries]`, for layers that leave the others out."""
        whole = slice(None)
        match index:
            case (rows, heads, slice() as queries, *columns) if all(
                other == whole for other in (rows, heads, *columns)
            ):
                return PagedMask(self.metadata.of(queries))
        raise ValueError(
            f"A mask of attn_implementation={NAME!r} was indexed with {index}, but only some of the queries can be "
            "taken out of it, as in mask[:, :, -1:]."
        )

    def contiguous(self) -> "PagedMask":
        """Return itself: `generate()` calls this on every mask that it prepares."""
        return self

    def to(self, device: Any) -> "PagedMask":
        """Return itself: block lists are made on the device of the layer that reads them."""
        return self

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"A mask of attn_implementation={NAME!r} was asked for its {name!r}, but it is no tensor: it lists the "
            "pages that each query sees. Code that looks into masks, as PEFT's prompt tuning and p-tuning do, needs "
            'the model loaded with attn_implementation="sdpa" or "eager".'
        )

    def __repr__(self) -> str:
        return f"PagedMask(shape={self.shape})"

    __str__ = __repr__

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse to be used as a tensor."""
        # Not a TypeError: an operator would take it for "not implemented" and say less.
        raise ValueError(
            f"{getattr(func, '__name__', func)} was called with a mask of attn_implementation={NAME!r}: this model "
            "computes attention by itself instead of through Transformers' attention interface. Load it with "
            'attn_implementation="eager" or "sdpa"; PagedCache works with both.'
        )


def paged_flex_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    config: PreTrainedConfig | None = None,
    **kwargs: Any,
) -> Tensor | PagedMask | None:
    """Reserve the step and make its mask; called by Transformers once per forward pass and mask type.

    Args:
        batch_size: rows.
        q_length: new columns.
        kv_length: columns afterwards, from `kv_offset` on; of type `PlannedLength` if the cache is a `PagedCache`.
        q_offset: columns before.
        kv_offset: first column that the layers of this mask hold.
        mask_function: as in Transformers, over columns.
        attention_mask: `(batch_size, kv_length)`, 0 for padding; None without padding.
        config: of the decoder.
        **kwargs: passed on to Transformers' `sdpa_mask`.

    Returns:
        A `PagedMask`; for another kind of cache what `sdpa_mask` returns.

    Raises:
        OutOfPagesError: if the step does not fit into the pool.
        ValueError: if the mask does not fit the cache.
    """
    make: Any = _reserved if isinstance(kv_length, PlannedLength) else _dense  # this one may be in a graph
    mask: Tensor | PagedMask | None = make(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, config, **kwargs
    )
    if mask is None or isinstance(mask, PagedMask) or mask_function is not bidirectional_mask_function:
        return mask
    # An encoder may compute attention by itself, and add the mask to its scores.
    dtype = kwargs.get("dtype", torch.float32)
    added = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    setattr(added, ALLOWED, mask)
    return added


def _dense(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int,
    kv_offset: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None,
    config: PreTrainedConfig | None,
    **kwargs: Any,
) -> Tensor | None:
    if q_length != int(kv_length):
        # Transformers leaves the mask of a static cache out where the queries are the first columns; it is told by
        # nothing then from one where they are the last.
        kwargs["allow_is_causal_skip"] = False
    mask: Tensor | None = sdpa_mask(
        batch_size,
        q_length,
        int(kv_length),
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        config=config,
        **kwargs,
    )
    return mask


@outside_of_graphs
def _reserved(
    batch_size: int,
    q_length: int,
    kv_length: PlannedLength,
    q_offset: int,
    kv_offset: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None,
    config: PreTrainedConfig | None,
    **kwargs: Any,
) -> PagedMask:
    dense = partial(
        _dense, batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, config
    )
    sequences = kv_length.sequences
    step = sequences.reserve(
        batch_size,
        q_length,
        attention_mask,
        num_layers=None if config is None else num_decoder_layers(config),
        reads_pages=reads_pages(sequences.pool, q_length),
    )
    window = _window_of(mask_function)
    is_by_range = step.past_is_visible and (mask_function is causal_mask_function or window is not None)
    if step.view is not View.PAGES:
        # Contiguous keys and values, those that are new if they are all there is: SDPA reads them faster.
        by_column = dense(**kwargs | {"allow_is_bidirectional_skip": False})
        return PagedMask(
            AttentionMetadata(sequences, step, by_column=by_column, window=window, is_by_range=is_by_range)
        )
    if is_by_range:
        return PagedMask(AttentionMetadata(sequences, step, window=window))
    mask = dense(**kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    assert mask is not None  # both ways to skip it are closed
    visible = step.by_token(mask, kv_offset)
    return PagedMask(AttentionMetadata(sequences, step, visible=visible, is_by_range=False))


def next_mask(mask: PagedMask, attention_mask: Tensor | None) -> PagedMask | None:
    """Reserve a pass over one new column, and make its mask as the mask function would, without its arguments.

    Args:
        mask: of the pass before.
        attention_mask: `(num_rows, num_columns)`, 0 for padding; None without padding.

    Returns:
        The mask; None where more has to be known than that the mask before was causal, or a window.

    Raises:
        OutOfPagesError: if the step does not fit into the pool.
        ValueError: if the attention mask does not fit the cache.
    """
    metadata, sequences = mask.metadata, mask.metadata.sequences
    if metadata.ranges is None:
        return None
    step = sequences.reserve(
        metadata.step.num_rows, 1, attention_mask, reads_pages=reads_pages(sequences.pool, num_new=1)
    )
    if step.view is not View.PAGES or not step.past_is_visible:
        return None
    return PagedMask(AttentionMetadata(sequences, step, window=metadata.window))


def ragged_mask(mask: PagedMask, step: RaggedStep) -> PagedMask | None:
    """Make the mask of a pass in which each row goes on from a column of its own.

    Args:
        mask: of a pass of the same layers over one new column of all rows.
        step: of the pass, which is under way.

    Returns:
        The mask; None where more has to be known than that the mask before was causal, or a window.
    """
    metadata = mask.metadata
    if not metadata.is_by_range:
        return None
    by_column = None
    if step.view is not View.PAGES:
        storage = metadata.sequences.pool.any_storage()
        by_column = torch.from_numpy(step.by_column(metadata.window))
        by_column = by_column if storage is None else by_column.to(storage.device)
    return PagedMask(AttentionMetadata(metadata.sequences, step, by_column=by_column, window=metadata.window))


def _window_of(mask_function: Callable[..., Any]) -> int | None:
    """The window of a mask function that Transformers made for causal sliding-window attention; None for any other."""
    if getattr(mask_function, "__code__", None) is not _SLIDING.__code__:
        return None
    parts = _captured(mask_function)["mask_functions"]
    if len(parts) != 2 or parts[0].__code__ is not _OVERLAY.__code__ or parts[1] is not causal_mask_function:
        return None
    window: int = _captured(parts[0])["sliding_window"]
    return window


def _captured(function: Callable[..., Any]) -> dict[str, Any]:
    return dict(inspect.getclosurevars(function).nonlocals)


_SLIDING = sliding_window_causal_mask_function(1)
_OVERLAY = _captured(_SLIDING)["mask_functions"][0]
