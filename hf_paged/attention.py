"""The attention implementation `"paged_flex"`: mask function, attention function, registration."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_causal_mask_function

from hf_paged import kernel
from hf_paged.columns import BoolMatrix
from hf_paged.eager import blockwise_attention
from hf_paged.lengths import PlannedLength
from hf_paged.page_table import PageTable
from hf_paged.step import Step, View
from hf_paged.tiles import Layout, Tiles, Tiling

NAME = "paged_flex"


class PagedMask(BlockMask):
    """The mask of one step over pages, which Transformers hands from the mask function to every layer.

    A `BlockMask`, since Transformers passes these through untouched, made when the attention function says how many
    query heads share a key/value head.

    Args:
        step: the forward pass.
        tilings: make the block lists of the step's rows, for each group of layers.
        window: tokens that a query sees, itself included; None: all before it.
        visible: `(num_rows, num_new, max_tokens)` bool, what each query sees of its row instead; None: as above.
    """

    def __init__(
        self, step: Step, tilings: dict[PageTable, Tiling], window: int | None, visible: BoolMatrix | None
    ) -> None:
        self.step = step
        self._tilings = tilings
        self._window = window
        self._visible = visible
        self._tiles: dict[tuple[PageTable, int, Layout, int], Tiles] = {}

    @property
    def shape(self) -> tuple[int, ...]:
        """`(num_rows, 1, num_new, num_columns)`, the mask as Transformers would see it."""
        return self.step.num_rows, 1, self.step.num_new, self.step.next_columns.count

    def tiles(self, table: PageTable, layout: Layout, num_slots: int) -> Tiles:
        """Block lists over the pages of `table`, made once for all layers of its group.

        They are made anew when rows turn out to be no twins, and when another thread lets the pool grow between two
        layers, to `num_slots` slots.

        Raises:
            ValueError: if a token is to be seen that was dropped.
        """
        if self.step.is_cancelled:
            raise RuntimeError("This mask belongs to a forward pass that was given up. Make a new one for each pass.")
        key = (table, table.version, layout, num_slots)
        if key not in self._tiles:
            tiling = self._tilings[table]
            if self._visible is not None:
                self._tiles[key] = tiling.dense(self._visible, layout)
            else:
                firsts = None if self._window is None else self.step.firsts(self._window)
                self._tiles[key] = tiling.causal(self.step.limits, firsts, self._window, layout)
        return self._tiles[key]

    def contiguous(self) -> "PagedMask":
        """Return itself: `generate()` calls this on every mask that it prepares."""
        return self

    def to(self, device: torch.device | str) -> "PagedMask":
        """Return itself: block lists are made on the device of the layer that reads them."""
        return self

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
    """Plan the step and make its mask; called by Transformers once per forward pass and mask type.

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
        A `PagedMask`; for an empty or another kind of cache what `sdpa_mask` returns.

    Raises:
        OutOfPagesError: if the step does not fit into the pool.
        ValueError: if the mask does not fit the cache.
    """

    def dense(**changes: Any) -> Tensor | None:
        arguments = {"q_offset": q_offset, "kv_offset": kv_offset, "mask_function": mask_function, **kwargs, **changes}
        mask: Tensor | None = sdpa_mask(
            batch_size, q_length, int(kv_length), attention_mask=attention_mask, config=config, **arguments
        )
        return mask

    if not isinstance(kv_length, PlannedLength):
        return dense()
    batch = kv_length.batch
    step: Step = batch.plan(batch_size, q_length, attention_mask)
    if step.view is View.NEW:
        # The new keys and values are all there is, and contiguous: SDPA reads them faster than any paged kernel.
        return dense()
    if step.past_is_visible:
        if mask_function is causal_mask_function:
            return PagedMask(step, batch.tilings, None, None)
        window = _window_of(mask_function)
        if window is not None:
            return PagedMask(step, batch.tilings, window, None)
    mask = dense(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    assert mask is not None  # both ways to skip it are closed
    return PagedMask(step, batch.tilings, None, step.by_token(mask, kv_offset))


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


def paged_flex_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | PagedMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over pages; without a `PagedMask`, scaled dot-product attention.

    Args:
        module: the attention layer.
        query: `(num_rows, num_heads, num_queries, head_dim)`.
        key: with a `PagedMask` the storage of the layer, `(1, num_kv_heads, num_slots, head_dim)`; otherwise
            `(num_rows, num_kv_heads, num_columns, head_dim)`.
        value: like `key`.
        attention_mask: what the mask function returned.
        scaling: factor on the scores; None for `head_dim ** -0.5`.
        dropout: must be 0.
        softcap: bound of the scores; None without.
        s_aux: `(num_heads,)` attention sinks: the score of a token that every query sees and whose value is 0.
        position_bias: additive bias; not supported over pages.
        **kwargs: passed on to SDPA.

    Returns:
        `(num_rows, num_queries, num_heads, head_dim)` and no weights.

    Raises:
        ValueError: for what the kernel can't do.
    """
    if dropout > 0:
        raise ValueError(
            f"Attention dropout is {dropout}, but {NAME!r} is for inference only. Call model.eval() before generating."
        )
    if position_bias is not None:
        raise ValueError(
            f"{NAME!r} can't compute attention with a position_bias. Load the model with "
            'attn_implementation="eager"; PagedCache works with it.'
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not isinstance(attention_mask, PagedMask):
        if softcap is None and s_aux is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scale, **kwargs)
        return blockwise_attention(query, key, value, attention_mask, scale, softcap, s_aux), None
    step = attention_mask.step
    if query.shape[0] != step.num_rows or query.shape[2] != step.num_new or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"Queries of shape {tuple(query.shape)} don't fit a step of {step.num_rows} rows and {step.num_new} new "
            f"tokens over {key.shape[1]} key/value heads."
        )
    if query.dtype != key.dtype:
        raise ValueError(
            f"Queries in {query.dtype} were given for keys in {key.dtype}, but FlexAttention wants one dtype. Load "
            "the model in one dtype, and run it without autocast."
        )
    table = step.table_of(key)
    layout = Layout(
        group=query.shape[1] // key.shape[1],
        max_tile_rows=kernel.max_tile_rows(query.dtype, query.device),
        device=query.device,
        sink_page=None if s_aux is None else table.group.sink_page(),
    )
    tiles = attention_mask.tiles(table, layout, key.shape[2])
    return kernel.paged_attention(query, key, value, tiles, table.group.page_size, scale, softcap, s_aux), None


def register() -> None:
    """Make `attn_implementation="paged_flex"` known to Transformers."""
    AttentionInterface.register(NAME, paged_flex_attention)
    # Without a mask function of the same name Transformers would pass no mask at all, silently.
    AttentionMaskInterface.register(NAME, paged_flex_mask)
