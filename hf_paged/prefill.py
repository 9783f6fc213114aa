"""Ragged prefill: the prompts of a batch without their padding, in chunks of bounded size."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from hf_paged._transformers import CACHE
from hf_paged.batch import Batch
from hf_paged.compilation import MIN_TOKENS, Filling, compiled_filling
from hf_paged.config import layer_specs
from hf_paged.host_memory import give_back_freed
from hf_paged.layer import layers_over
from hf_paged.mask import NAME
from hf_paged.packed import Chunk, PackedBatch

_CHUNK_ON_CPU, _CHUNK = 1536, 4096  # tokens at a time; a GPU takes as long for a few hundred


def usual_chunk(device: torch.device) -> int:
    """Tokens at a time where nobody says how many."""
    return _CHUNK_ON_CPU if device.type == "cpu" else _CHUNK


def prefill(
    model: PreTrainedModel,
    batch: Batch,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    max_tokens: int | None,
) -> None:
    """Compute all columns but the last one, packed; if that fails, nothing has changed.

    Args:
        model: a decoder.
        batch: the rows of a cache.
        input_ids: `(num_rows, num_columns)`, those that are cached included.
        attention_mask: like `input_ids`, 0 for padding; None without padding.
        max_tokens: tokens of a chunk; None for as many as keep the device busy.

    Raises:
        OutOfPagesError: if the pool has too few pages.
        ValueError: for arguments that don't fit the cache, or a model whose rows can't be packed.
    """
    decoder = _decoder(model, batch)
    if max_tokens is None:
        max_tokens = usual_chunk(input_ids.device)
    batch.rest()
    num_cached = batch.columns.count
    _check_inputs(input_ids, attention_mask, max_tokens, num_cached)
    if attention_mask is None:
        _check_unpadded(model, input_ids)
    ids = input_ids[:, num_cached:-1]
    if ids.shape[1] == 0:
        return
    packed = PackedBatch(batch)
    try:
        packed.pack(ids, None if attention_mask is None else attention_mask[:, :-1], max_tokens)
        _check_rotary(decoder, packed.longest)
        cache = Cache(layers=layers_over(packed))
        num_tokens = packed.num_tokens
        for first in range(0, num_tokens, max_tokens):
            num_queries = min(max_tokens, num_tokens - first)
            fill = compiled_filling(decoder) if _is_compiled(num_queries, max_tokens) else None
            if fill is not None:
                num_queries = max(num_queries, MIN_TOKENS)
            chunk = packed.begin(first, num_queries)
            _run(model, fill, cache, chunk, num_queries, input_ids.device)
            packed.end()
            num_freed = num_queries if first + max_tokens < num_tokens else num_tokens
            if input_ids.device.type == "cpu" and num_freed >= _CHUNK_ON_CPU:
                give_back_freed()  # what activations leave in C's heap while the pages fill up
        packed.unpack()
        batch.exchange(packed)
    finally:
        packed.clear()


def _is_compiled(num_tokens: int, max_tokens: int) -> bool:
    """Whether a chunk is for a compiled model, filled up if a few tokens are missing. Many would cost too much."""
    return max_tokens >= MIN_TOKENS and 4 * num_tokens >= 3 * MIN_TOKENS


@torch.no_grad()
def _run(
    model: PreTrainedModel,
    fill: Filling | None,
    cache: Cache,
    chunk: Chunk,
    num_queries: int,
    device: torch.device,
) -> None:
    """Let the decoder, compiled or not, compute a chunk, filled up with tokens of no row to `num_queries`."""
    ids, positions = torch.zeros((2, 1, num_queries), dtype=torch.int64)
    ids[0, : len(chunk.ids)] = torch.from_numpy(chunk.ids)
    positions[0, : len(chunk.ids)] = torch.from_numpy(chunk.places)
    inputs: dict[str, Any] = {"input_ids": ids.to(device), "position_ids": positions.to(device)}
    if fill is not None:
        for tensor in (inputs["input_ids"], inputs["position_ids"]):
            torch._dynamo.maybe_mark_dynamic(tensor, 1)
        # Outside of the graph, as generate() does.
        make_mask: Any = getattr(model, "create_masks_for_generate", create_masks_for_generate)
        inputs["attention_mask"] = make_mask(
            config=model.config,
            inputs_embeds=torch.empty((1, num_queries, 0), dtype=model.dtype, device=device),
            attention_mask=None,
            position_ids=inputs["position_ids"],
            **{CACHE: cache},
        )
    run = fill or model.get_decoder()  # type: ignore[no-untyped-call]
    run(**inputs, **{CACHE: cache}, use_cache=True)


def _decoder(model: PreTrainedModel, batch: Batch) -> torch.nn.Module:
    """The model without its head, if it can compute packed rows for this cache."""
    config = model.config.get_text_config(decoder=True)
    if config._attn_implementation != NAME:
        raise ValueError(
            f"prefill() was asked of a model with attn_implementation={config._attn_implementation!r}, which can't "
            f"tell packed rows apart. Load it with attn_implementation={NAME!r}, or let generate() compute the prompt "
            "by itself."
        )
    decoder: torch.nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    if model.config.is_encoder_decoder or "position_ids" not in inspect.signature(decoder.forward).parameters:
        what = "has an encoder" if model.config.is_encoder_decoder else "takes no position_ids"
        raise ValueError(
            f"{type(model).__name__} {what}, so its rows can't be packed. Leave out cache.prefill(): generate() "
            "computes the prompts of this model by itself."
        )
    if layer_specs(config) != batch.pool.layers:
        raise ValueError(
            f"{type(model).__name__} has other layers than the model that this cache was made for. Make a new "
            "PagedCache for this model."
        )
    return decoder


def _check_inputs(input_ids: Tensor, attention_mask: Tensor | None, max_tokens: int, num_cached: int) -> None:
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} was asked for; a chunk needs at least one token.")
    if input_ids.ndim != 2:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}, but prefill() needs (num_rows, num_columns), as "
            "generate() does."
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but input_ids {tuple(input_ids.shape)}. Pass "
            "both for all columns, those that are cached included."
        )
    if input_ids.shape[1] <= num_cached:
        raise ValueError(
            f"The cache holds {num_cached} tokens, but input_ids has {input_ids.shape[1]}, so no token is left to "
            "compute. Pass the whole conversation so far plus at least one new token, or call cache.crop(-n) to take "
            "tokens away."
        )


def _check_unpadded(model: PreTrainedModel, input_ids: Tensor) -> None:
    """Refuse what `generate()` would take for padding, when it is given no mask."""
    settings = model.generation_config
    padding = None if settings is None else settings.pad_token_id
    ends = None if settings is None else settings.eos_token_id
    if padding is None or padding in (ends if isinstance(ends, list) else [ends]):
        return
    if (input_ids == padding).any():
        raise ValueError(
            f"input_ids has the padding token {padding}, but no attention_mask was given. generate() would take it "
            "for padding; pass the mask to both."
        )


def _check_rotary(decoder: torch.nn.Module, longest: int) -> None:
    """Refuse rotary embeddings that depend on the longest row of a pass, where chunks would differ from the whole."""
    for module in decoder.modules():
        kinds, config = getattr(module, "rope_type", None), getattr(module, "config", None)
        parameters = getattr(config, "rope_parameters", None)
        if not isinstance(kinds, dict):  # one for each type of layer
            kinds, parameters = {None: kinds}, {None: parameters}
        for name, kind in kinds.items():
            if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
                limit: Any = getattr(module, "original_max_seq_len", 0)
                limit = (parameters or {})[name].get("original_max_position_embeddings", limit)
                if longest > limit:
                    raise ValueError(
                        f"A row of {longest} tokens is longer than the {limit} from which on the rotary embedding of "
                        f"this model ({kind!r}) depends on the longest row of each pass, so that chunks would differ "
                        "from the whole. Let generate() compute the prompt by itself."
                    )
