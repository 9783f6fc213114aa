"""FlexAttention over a pool of pages, compiled."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from hf_paged._torch.inductor import Kernel, compiled_kernel
from hf_paged.attention.backends.base import NO_SINKS, Attention, AttentionParams
from hf_paged.attention.backends.block_lists import BlockLists, Layout

_QUERY_BLOCK = 128
# FlexAttention's decoding kernel on GPU takes fewer than 128 rows; with fewer always, no size decides on the kernel.
_TILE_ROWS = 127
_TILE_ROWS_WITHOUT_REPACKING = 63


@dataclass(frozen=True)
class Variant:
    """What a compiled kernel is specialised for, sizes aside.

    Attributes:
        device: where it runs.
        dtype: of queries, keys and values.
        num_kv_heads: key/value heads.
        gqa_ratio: query heads on one key/value head.
        head_dims: head size of the keys and of the values.
        page_size: tokens per page.
        params: what the layer wants.
        has_bias: whether a position bias is added to the scores.
        is_dense: whether the mask is given token by token.
        lists_full: whether full pages have a list of their own.
        num_tiles: tiles, where the kernel is made for one number of them; None for any.
    """

    device: torch.device
    dtype: torch.dtype
    num_kv_heads: int
    gqa_ratio: int
    head_dims: tuple[int, int]
    page_size: int
    params: AttentionParams
    has_bias: bool
    is_dense: bool
    lists_full: bool
    num_tiles: int | None


def takes(dtype: torch.dtype) -> bool:
    """Whether FlexAttention computes in this dtype: in float64 it does not, and flash decoding would in float32."""
    return dtype in (torch.float32, torch.bfloat16, torch.float16)


def repacks_storage(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether tiles of 64 rows or more would let the kernel repack the whole storage of a layer, used or not."""
    return device.type == "cpu" and dtype.itemsize == 2


def max_tile_rows(dtype: torch.dtype, device: torch.device) -> int:
    """Stacked queries that one tile may have."""
    return _TILE_ROWS_WITHOUT_REPACKING if repacks_storage(dtype, device) else _TILE_ROWS


def layout_for(query: Tensor, keys: Tensor, sink_page: int | None) -> Layout:
    """Say what the kernel wants its block lists to be like, for tensors of these shapes, dtype and device."""
    return Layout(
        gqa_ratio=query.shape[1] // keys.shape[1],
        max_tile_rows=max_tile_rows(query.dtype, query.device),
        device=query.device,
        lists_full=lists_full_pages(query.device),
        sink_page=sink_page,
    )


def lists_full_pages(device: torch.device) -> bool:
    """Whether pages that a tile sees whole get a list of their own, and are read without a mask.

    On a GPU the kernel for few queries looks for that list at the strides of the other one (seen in torch 2.11, 2.13
    and 2.14), and with two lists it shares out the whole storage among its programs instead of the pages of each tile.
    """
    return device.type == "cpu"


class _Arguments(NamedTuple):
    """What a compiled kernel is called with, in this order."""

    query: Tensor
    keys: Tensor
    values: Tensor
    full_kv_num_blocks: Tensor | None
    full_kv_indices: Tensor | None
    kv_num_blocks: Tensor
    kv_indices: Tensor
    physical_to_logical: Tensor
    seen: Tensor
    bias: Tensor | None
    bias_strides: Tensor | None
    sinks: Tensor


def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_lists: BlockLists,
    page_size: int,
    params: AttentionParams,
    bias: Tensor | None = None,
) -> Attention:
    """Return the attention of layers with tensors of these shapes, dtype and device.

    Args:
        query: `(num_rows, num_heads, num_queries, head_dim)`.
        keys: `(1, num_kv_heads, num_slots, head_dim)`, the storage of a layer; will be read where `block_lists` says.
        values: `(1, num_kv_heads, num_slots, value_head_dim)`.
        block_lists: the pages to read, for `num_queries` queries and `num_heads // num_kv_heads` as gqa_ratio.
        page_size: tokens per page.
        params: what the layer wants. The sink page of `block_lists` is the token of its sinks.
        bias: `(num_rows, num_heads, num_queries, max_tokens)`, added to the score of each token of a row, with
            `max_tokens` in whole pages; None without.

    Raises:
        ValueError: for a dtype that FlexAttention does not take.

    Source:
        FlexAttention: Dong et al., 2024. Paged through its block mask: Joshi et al., 2025.
    """
    if not takes(query.dtype):
        raise ValueError(
            f"Packed queries in {query.dtype} were given on {query.device.type}, where FlexAttention is to compute "
            "them, but it takes float32, bfloat16 and float16. Let generate() compute the prompt by itself."
        )
    query_tiles = block_lists.query_tiles
    if query_tiles is not None:
        query = query_tiles.spread(query)
    variant = Variant(
        device=query.device,
        dtype=query.dtype,
        num_kv_heads=keys.shape[1],
        gqa_ratio=block_lists.gqa_ratio,
        head_dims=(keys.shape[3], values.shape[3]),
        page_size=page_size,
        params=params,
        has_bias=bias is not None,
        is_dense=block_lists.seen.dtype == torch.bool,
        lists_full=block_lists.full_kv_indices is not None,
        num_tiles=_fixed_num_tiles(query.shape[2], block_lists),
    )
    lists = (
        block_lists.full_kv_num_blocks,
        block_lists.full_kv_indices,
        block_lists.kv_num_blocks,
        block_lists.kv_indices,
        block_lists.physical_to_logical,
        block_lists.seen,
    )
    num_rows, num_heads, num_queries, _ = query.shape
    by_kv_head = (keys.shape[1], block_lists.gqa_ratio)
    scores = query.new_zeros(by_kv_head) if params.has_sinks else NO_SINKS
    flat_bias, strides = (None, None) if bias is None else _in_tiles(bias.to(query.dtype), block_lists)
    arguments = _Arguments(pack_gqa(query, block_lists), keys, values, *lists, flat_bias, strides, scores)
    kernel = _kernel(variant, arguments).bound_to(arguments)
    num_missing = len(block_lists.kv_num_blocks) - len(query) if num_queries == 1 else 0
    one_query, one_output = (num_rows, *by_kv_head, query.shape[3]), (num_rows, 1, num_heads, values.shape[3])

    def attend(query: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None) -> Tensor:
        scores = NO_SINKS if sinks is None else sinks.to(query.dtype).view(by_kv_head)
        return unpack_gqa(
            kernel(pack_gqa(query, block_lists), keys, values, scores), block_lists, num_rows, num_queries
        )

    def attend_with_one_query(query: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None) -> Tensor:
        # Where queries are a slice of one projection, as in GPT-2, this copies them: a kernel is made for one layout.
        stacked = query.reshape(one_query).contiguous()
        scores = NO_SINKS if sinks is None else sinks.to(query.dtype).view(by_kv_head)
        if num_missing:
            return kernel(fill_up(stacked, block_lists), keys, values, scores)[:num_rows].view(one_output)
        return kernel(stacked, keys, values, scores).view(one_output)

    def attend_in_query_tiles(query: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None) -> Tensor:
        assert query_tiles is not None
        return query_tiles.collect(attend(query_tiles.spread(query), keys, values, sinks))

    if query_tiles is not None:
        return attend_in_query_tiles
    return attend_with_one_query if num_queries == 1 else attend


def _fixed_num_tiles(num_queries: int, block_lists: BlockLists) -> int | None:
    """Where tiles are few queries each and no page is listed as full, the number that the kernel is made for.

    On a GPU only a kernel for a fixed number of tiles has several programs read the pages of one tile.
    """
    is_dense = block_lists.seen.dtype == torch.bool
    return (
        len(block_lists.kv_num_blocks)
        if block_lists.full_kv_indices is None and num_queries == 1 and not is_dense
        else None
    )


def _kernel(variant: Variant, arguments: _Arguments) -> Kernel:
    # What a kernel does not adapt to beside the variant: a size of 1, which broadcasts, and storage that 32-bit
    # indices can't address.
    num_tiles, _, tile_rows, _ = arguments.query.shape
    ones = num_tiles == 1, tile_rows == 1, len(arguments.physical_to_logical) == 1, arguments.seen.shape[1] == 1
    is_large = arguments.keys.numel() >= 2**31 or arguments.values.numel() >= 2**31
    sizes = partial(_dynamic_sizes, variant)
    return compiled_kernel((variant, ones, is_large), partial(_build, variant), arguments, sizes)


def _dynamic_sizes(variant: Variant, name: str) -> tuple[int, ...]:
    """Sizes of an argument of the kernel that change without a recompilation: tiles, their rows, slots, pages."""
    has_any_tiles = variant.num_tiles is None
    match name:
        case "paged_sinks":
            return ()
        case "paged_keys" | "paged_values":
            return (2,)
        case "paged_page_index":
            return (0,)
        case "paged_partial":
            return (0, 3) if has_any_tiles else (3,)
        case "paged_bias_strides":
            return ()
        case "paged_position_bias":
            return (0,)
        case _ if not has_any_tiles:
            return ()
        case "paged_query":
            return (0, 2)
        case "paged_full_pages":
            return (0, 3)
        case "paged_seen":
            return (0, 1, 2) if variant.is_dense else (0, 1)
    return (0,)


def _build(variant: Variant) -> Callable[..., Tensor]:
    page_size, gqa_ratio = variant.page_size, variant.gqa_ratio
    scale, softcap, has_sinks = variant.params
    # A tile is one query block, however many rows it has.
    query_block = -(-gqa_ratio // _QUERY_BLOCK) * _QUERY_BLOCK
    kernel_options = _kernel_options(variant)

    # The names matter. The CPU template of FlexAttention (seen in torch 2.13 and 2.14) substitutes the symbols of its
    # tile sizes, ks0 to ks5, as text, and so breaks the symbols of other sizes whose number begins with that digit.
    # Dynamo derives the number from the argument's name; these give numbers that begin with 6 to 9.
    def attend(
        paged_query: Tensor,
        paged_keys: Tensor,
        paged_values: Tensor,
        paged_num_full: Tensor | None,
        paged_full_pages: Tensor | None,
        tile_num_partial: Tensor,
        paged_partial: Tensor,
        paged_page_index: Tensor,
        paged_seen: Tensor,
        paged_position_bias: Tensor | None,
        paged_bias_strides: Tensor | None,
        paged_sinks: Tensor,
    ) -> Tensor:
        def token_at(slot: Tensor) -> Tensor:
            return paged_page_index[slot // page_size] * page_size + slot % page_size

        def mask_mod(tile: Tensor, head: Tensor, row: Tensor, slot: Tensor) -> Tensor:
            token = token_at(slot)
            if variant.is_dense and variant.has_bias:
                is_seen = token >= 0  # what is hidden has a bias of -inf
            elif variant.is_dense:
                is_seen = paged_seen[tile, row // gqa_ratio, token.clamp(min=0) if has_sinks else token]
            else:
                is_seen = (token < paged_seen[tile, row, 0]) & (token >= paged_seen[tile, row, 1])
            if has_sinks:
                # The sink page is at place -1; its first slot is the sink, and nothing else in it is seen.
                is_seen = torch.where(token < 0, token == -page_size, is_seen)
            return is_seen

        def score_mod(score: Tensor, tile: Tensor, head: Tensor, row: Tensor, slot: Tensor) -> Tensor:
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            if paged_position_bias is not None and paged_bias_strides is not None:
                query_head, query = head * gqa_ratio + row % gqa_ratio, row // gqa_ratio
                place = tile * paged_bias_strides[0] + query_head * paged_bias_strides[1]
                place = place + query * paged_bias_strides[2] + token_at(slot)
                score = score + paged_position_bias[place.clamp(min=0) if has_sinks else place]
            if has_sinks:
                score = torch.where(token_at(slot) < 0, paged_sinks[head, row % gqa_ratio], score)
            return score

        block_mask = BlockMask(
            (paged_query.shape[2], paged_keys.shape[2]),
            tile_num_partial,
            paged_partial,
            paged_num_full,
            paged_full_pages,
            None,
            None,
            None,
            None,
            BLOCK_SIZE=(query_block, page_size),
            mask_mod=mask_mod,
        )
        output: Tensor = flex_attention(
            paged_query,
            paged_keys,
            paged_values,
            score_mod=score_mod if softcap is not None or has_sinks or variant.has_bias else None,
            block_mask=block_mask,
            scale=scale,
            kernel_options=kernel_options,
        )
        return output

    return attend


def _kernel_options(variant: Variant) -> Any:
    if variant.device.type == "cpu":
        # The flash-decoding template splits the pool, not the row, into partitions: it would walk over every page.
        return {"PARTITION_SIZE": 1}
    # A kernel tile must not span two pages.
    return {"BLOCK_N": min(variant.page_size, 64)}


def pack_gqa(query: Tensor, block_lists: BlockLists) -> Tensor:
    """`(num_rows, num_heads, num_queries, head_dim)` to `(num_tiles, num_kv_heads, tile_rows, head_dim)`."""
    num_rows, num_heads, num_queries, head_dim = query.shape
    gqa_ratio, num_kv_heads = block_lists.gqa_ratio, num_heads // block_lists.gqa_ratio
    missing = block_lists.tiles_per_row * block_lists.tile_length - num_queries
    padded = torch.nn.functional.pad(query, (0, 0, 0, missing)) if missing else query
    stacked = (
        padded.reshape(num_rows, num_kv_heads, gqa_ratio, block_lists.tiles_per_row, block_lists.tile_length, head_dim)
        .permute(0, 3, 1, 4, 2, 5)
        .reshape(num_rows * block_lists.tiles_per_row, num_kv_heads, block_lists.tile_length * gqa_ratio, head_dim)
        .contiguous()
    )
    return fill_up(stacked, block_lists)


def _in_tiles(bias: Tensor, block_lists: BlockLists) -> tuple[Tensor, Tensor]:
    """Lay out a bias as the kernel reads it, with -inf for what `block_lists` hides token by token.

    Flat, with strides in a tensor: of the sizes of four dimensions the CPU template would have more symbols than it
    can tell apart.

    Args:
        bias: `(num_rows, num_heads, num_queries, max_tokens)`.
        block_lists: what the queries see.

    Returns:
        `(num_tiles * num_heads * tile_length * max_tokens,)`, and the strides of the first three of these, int64.
    """
    num_rows, num_heads, num_queries, max_tokens = bias.shape
    tiles_per_row, tile_length = block_lists.tiles_per_row, block_lists.tile_length
    padded = torch.nn.functional.pad(bias, (0, 0, 0, tiles_per_row * tile_length - num_queries))
    tiled = padded.view(num_rows, num_heads, tiles_per_row, tile_length, max_tokens).transpose(1, 2).flatten(0, 1)
    if block_lists.seen.dtype == torch.bool:
        tiled = tiled.masked_fill(~block_lists.seen[:, None], -torch.inf)
    filled = fill_up(tiled, block_lists).contiguous()
    return filled.flatten(), torch.tensor(filled.stride()[:3], device=bias.device)


def fill_up(stacked: Tensor, block_lists: BlockLists) -> Tensor:
    """Add what there is no row for, where the kernel is made for more tiles."""
    missing = len(block_lists.kv_num_blocks) - len(stacked)
    return torch.nn.functional.pad(stacked, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else stacked


def unpack_gqa(output: Tensor, block_lists: BlockLists, num_rows: int, num_queries: int) -> Tensor:
    """`(num_tiles, num_kv_heads, tile_rows, head_dim)` to `(num_rows, num_queries, num_heads, head_dim)`."""
    num_kv_heads, head_dim = output.shape[1], output.shape[3]
    num_heads = num_kv_heads * block_lists.gqa_ratio
    return (
        output.view(
            num_rows, block_lists.tiles_per_row, num_kv_heads, block_lists.tile_length, block_lists.gqa_ratio, head_dim
        )
        .permute(0, 1, 3, 2, 4, 5)
        .reshape(num_rows, block_lists.tiles_per_row * block_lists.tile_length, num_heads, head_dim)[:, :num_queries]
        .contiguous()
    )
