"""The attention function of `"paged_flex"`, and its registration."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_paged._torch.dynamo import autocast_dtype, outside_of_graphs
from hf_paged._torch.opaque import OPAQUE_INPUTS
from hf_paged._torch.surroundings import profiled
from hf_paged._transformers import EXPAND_LATENTS
from hf_paged.attention.backends.base import AttentionParams
from hf_paged.attention.backends.reference import blockwise_attention
from hf_paged.attention.dispatch import bind, latent_attention
from hf_paged.attention.marks import NEW, is_marked, layer_of, note_output, output_of
from hf_paged.attention.mask import ALLOWED, NAME, PagedMask, paged_flex_mask
from hf_paged.attention.metadata import AttentionMetadata
from hf_paged.batch.handed_on import HandedOnTensor
from hf_paged.batch.steps.step import View
from hf_paged.pages.storage import holds_pages


class _Heads(NamedTuple):
    """What `sdpa_attention_forward` asks a layer for."""

    num_key_value_groups: int


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
        key: what `PagedLayer.update` returned, with a `PagedMask`; otherwise
            `(num_rows, num_kv_heads, num_columns, head_dim)`.
        value: like `key`.
        attention_mask: what the mask function returned.
        scaling: factor on the scores; None for `head_dim ** -0.5`.
        dropout: must be 0.
        softcap: bound of the scores; None without.
        s_aux: `(num_heads,)` attention sinks: the score of a token that every query sees and whose value is 0.
        position_bias: `(num_rows, num_heads, num_queries, num_columns)`, or of one row for all, added to the scores;
            None without.
        **kwargs: passed on to SDPA.

    Returns:
        `(num_rows, num_queries, num_heads, head_dim)` and no weights.

    Raises:
        ValueError: for what the kernel can't do.
    """
    if type(key) is HandedOnTensor and type(value) is HandedOnTensor:
        step = attention_mask.metadata.step if isinstance(attention_mask, PagedMask) else None
        key, value = key.states.for_attention(step)
    if dropout > 0 and isinstance(attention_mask, PagedMask):
        raise _refused(attention_mask, _no_dropout(dropout))
    if kwargs.get("output_attentions"):
        raise _refused(
            attention_mask,
            f"output_attentions=True was asked for, but {NAME!r} never has the attention weights at hand. Load the "
            'model with attn_implementation="eager"; PagedCache works with it.',
        )
    if kwargs.get("sinks") is not None:
        raise _refused(
            attention_mask,
            f"{NAME!r} can't compute attention with sinks of each query. Load the model with "
            'attn_implementation="eager"; PagedCache works with it.',
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not isinstance(attention_mask, PagedMask):
        # With one, what its function was asked for counts, not what the layer says of itself.
        is_causal = bool(kwargs.get("is_causal", getattr(module, "is_causal", True)))
        if holds_pages(key) or is_marked(key):
            raise _refused(
                attention_mask,
                "Keys in pages were given to the attention function with a mask that the model made itself. Load the "
                'model with attn_implementation="eager" or "sdpa"; PagedCache works with both.',
            )
        mask = getattr(attention_mask, ALLOWED, attention_mask)
        params = AttentionParams(scale, softcap, s_aux is not None)
        return _attend_to_columns(query, key, value, mask, is_causal, params, s_aux, position_bias, dropout), None
    is_traced = torch.compiler.is_dynamo_compiling()
    if not is_traced and getattr(module, "training", False) and attention_mask.metadata.is_unwritten:
        raise ValueError(
            "Attention was computed in training mode over keys that were not given to the PagedCache. Transformers "
            "takes the cache away from layers with gradient checkpointing there, and every later token would be "
            "computed without those before it. Call model.eval() before generating."
        )
    if query.dtype is not key.dtype and autocast_dtype(query) is not None:
        query = query.to(key.dtype)
    if is_traced and position_bias is not None:
        raise ValueError(_NO_BIAS_IN_GRAPHS)
    metadata, layer = attention_mask.metadata, getattr(module, "layer_idx", -1)
    options = (scale, softcap, s_aux)
    source = layer_of(key, value) if hasattr(key, NEW) else None
    if source is not None:
        # In a graph; or between two that parted behind the update.
        output: Tensor = torch.ops.hf_paged.write_and_attend(
            metadata, query, key, value, source, *options, output_of(key)
        )
        note_output(key, output)
    elif is_traced:
        run = torch.ops.hf_paged.attend_to_others if _HAS_OPERATIONS else _attend_between_graphs
        output = run(metadata, query, key, value, layer, *options)
    else:
        output = attend(metadata, query, key, value, layer, *options, position_bias, module)
    return output, None


def _refused(mask: Tensor | PagedMask | None, message: str) -> ValueError:
    """Give up the pass of a mask; an error that says why."""
    if isinstance(mask, PagedMask):
        mask.metadata.sequences.roll_back(mask.metadata.step)
    return ValueError(message)


def attend(
    metadata: AttentionMetadata,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: int,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None = None,
    module: torch.nn.Module | None = None,
) -> Tensor:
    """A layer's attention; arguments and result are those of `paged_flex_attention`, with the metadata of the mask.

    If it fails, so does the pass, of which nothing is left.
    """
    try:
        params = AttentionParams(scale, softcap, sinks is not None)
        return _attend(metadata, query, key, value, layer, params, sinks, bias, module)
    except BaseException:
        metadata.sequences.roll_back(metadata.step)
        raise


def _attend(
    metadata: AttentionMetadata,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: int,
    params: AttentionParams,
    sinks: Tensor | None,
    bias: Tensor | None,
    module: torch.nn.Module | None,
) -> Tensor:
    step = metadata.step
    num_rows, _, num_queries, _ = metadata.shape
    if (query.shape[0], query.shape[2]) != (num_rows, num_queries) or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"Queries of shape {tuple(query.shape)} don't fit a step of {num_rows} rows and {num_queries} new "
            f"tokens over {key.shape[1]} key/value heads."
        )
    if query.dtype != key.dtype:
        raise ValueError(
            f"Queries in {query.dtype} were given for keys in {key.dtype}, but FlexAttention wants one dtype. Load "
            "the model in one dtype."
        )
    if step.view is not View.PAGES:
        return _attend_to_columns(query, key, value, metadata.by_column, True, params, sinks, bias)
    if query.is_meta:
        return query.new_empty((num_rows, num_queries, query.shape[1], value.shape[3]))
    if module is not None and hasattr(type(module), EXPAND_LATENTS) and not holds_pages(key):
        if params.softcap is not None or sinks is not None or bias is not None:
            raise ValueError(_NO_MORE_OVER_LATENTS)
        with profiled("paged_attention"):
            return latent_attention(metadata, module, query, key, value, layer, params.scale)
    handed = None if step.is_cancelled else step.handed.get(key.data_ptr())
    if handed is None:
        table, storage = step.source_of(key, metadata.sequences.pool.group_of_layer.get(layer))
    else:
        _, table, storage = handed
    # All layers of a group have the same, as a rule: what depends on it is made once per pass.
    shapes = (query.shape, key.shape, value.shape, query.dtype, query.device, params, bias)
    attention = metadata.attentions.get((table, table.version, *shapes))
    if attention is None:
        attention, key, value = bind(metadata, table, storage, query, key, value, params, bias)
        shapes = (query.shape, key.shape, value.shape, *shapes[3:])
        metadata.attentions[table, table.version, *shapes] = attention
    with profiled("paged_attention"):
        return attention(query, key, value, sinks)


def _attend_to_columns(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    params: AttentionParams,
    sinks: Tensor | None,
    bias: Tensor | None,
    dropout: float = 0.0,
) -> Tensor:
    scale, softcap, _ = params
    if bias is not None:
        mask, is_causal = _added(bias, mask, is_causal), False
    if len(key) < len(query):
        if is_causal and mask is None and query.shape[2] > 1:
            repeats = len(query) // len(key)
            key, value = key.repeat_interleave(repeats, 0), value.repeat_interleave(repeats, 0)
        else:
            return _attend_to_repeated(query, key, value, mask, params, sinks, dropout)
    # Without a mask SDPA takes the queries for the first ones, not the last.
    is_last = is_causal and mask is None and 1 < query.shape[2] < key.shape[2]
    if softcap is not None or sinks is not None or is_last:
        if dropout > 0:
            raise ValueError(_no_dropout(dropout))
        return blockwise_attention(query, key, value, mask, is_causal, scale, softcap, sinks)
    heads: Any = _Heads(query.shape[1] // key.shape[1])
    options: Any = {"dropout": dropout, "scaling": scale, "is_causal": is_causal}
    # Values narrower than keys, as of latents, SDPA attends to on a CPU with all scores in memory at once.
    value_dim = value.shape[3]
    is_trained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    is_blockwise = query.device.type == "cpu" and query.shape[2] > 1 and not is_trained  # with no second derivatives
    num_missing = query.shape[3] - value_dim if is_blockwise else 0
    if num_missing > 0:
        value = pad(value, (0, num_missing))
    output: Tensor = sdpa_attention_forward(heads, query, key, value, mask, **options)[0]
    return output[..., :value_dim].contiguous() if num_missing > 0 else output


def _attend_to_repeated(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    params: AttentionParams,
    sinks: Tensor | None,
    dropout: float,
) -> Tensor:
    """Attend to keys that are there once for several rows, which follow one another: as more queries of one row."""
    num_rows, num_heads, num_queries, _ = query.shape
    repeats = num_rows // len(key)

    def stack(by_query: Tensor) -> Tensor:
        by_row = by_query.view(len(key), repeats, *by_query.shape[1:])
        return by_row.transpose(1, 2).flatten(2, 3)

    if mask is not None:
        mask = mask.expand(-1, -1, num_queries, -1)
        mask = mask.repeat(1, 1, repeats, 1) if len(mask) == 1 else stack(mask)
    output = _attend_to_columns(stack(query), key, value, mask, False, params, sinks, None, dropout)
    return output.reshape(num_rows, num_queries, num_heads, -1)


def _added(bias: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Put what a mask hides, and what is added to the scores, into one mask to be added."""
    num_queries, num_columns = bias.shape[2:]
    if mask is None and is_causal and num_queries > 1:
        last = torch.arange(num_columns - num_queries, num_columns, device=bias.device)
        mask = torch.arange(num_columns, device=bias.device) <= last[:, None]
    if mask is None:
        return bias
    return bias.masked_fill(~mask, torch.finfo(bias.dtype).min) if mask.dtype == torch.bool else bias + mask


def _no_dropout(dropout: float) -> str:
    return (
        f"Attention dropout is {dropout}, but {NAME!r} computes no dropout over pages, nor with softcap or sinks. "
        "Call model.eval() before generating."
    )


_NO_BIAS_IN_GRAPHS = (
    f"{NAME!r} can't add a position_bias in compiled steps. Run this model uncompiled: leave out compiled(), or call "
    "generate() with disable_compile=True."
)
_NO_MORE_OVER_LATENTS = (
    f"{NAME!r} computes latent attention without softcap, sinks or a position_bias. Load the model with "
    'attn_implementation="eager"; PagedCache works with it.'
)
_HAS_OPERATIONS = OPAQUE_INPUTS.is_on  # a constant in graphs
_attend_between_graphs = outside_of_graphs(attend)


def register() -> None:
    """Make `attn_implementation="paged_flex"` known to Transformers."""
    AttentionInterface.register(NAME, paged_flex_attention)
    # Without a mask function of the same name Transformers would pass no mask at all, silently.
    AttentionMaskInterface.register(NAME, paged_flex_mask)
