"""What is refused before a prompt is computed."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from hf_paged._transformers import layer_specs
from hf_paged.batch.sequences import Sequences
from hf_paged.errors import NotPackable

_SETTINGS = vars(GenerationConfig())  # type: ignore[no-untyped-call]
_OF_GENERATE = {*_SETTINGS, *inspect.signature(GenerationMixin.generate).parameters} - {"kwargs"}


def encoder_refused(model: PreTrainedModel) -> ValueError:
    """Say that the prompts of a model with an encoder aren't prefilled."""
    return ValueError(
        f"{type(model).__name__} has an encoder, so its rows can't be prefilled. Leave out cache.prefill(): "
        "generate() computes the prompts of this model by itself."
    )


def check_fits(model: PreTrainedModel, sequences: Sequences) -> None:
    """Refuse a model with an encoder, or with other layers than the cache."""
    if model.config.is_encoder_decoder:
        raise encoder_refused(model)
    if layer_specs(model.config.get_text_config(decoder=True)) != sequences.pool.layers:
        raise ValueError(
            f"{type(model).__name__} has other layers than the model that this cache was made for. Make a new "
            "PagedCache for this model."
        )


def check_arguments(model: PreTrainedModel, inputs: dict[str, Any]) -> None:
    """Refuse what a model is not to be given, and several adapters of which none is named."""
    wrong = sorted(({"cache", "past_key_values"} | _OF_GENERATE).intersection(inputs))
    if wrong:
        raise ValueError(
            f"prefill() was given {', '.join(wrong)}, but it only takes what the model is to be given. Pass that to "
            "generate() instead."
        )
    adapters: dict[str, Any] = {} if isinstance(model, PreTrainedModel) else getattr(model, "peft_config", {})
    if len(adapters) > 1 and "adapter_names" not in inputs:
        raise ValueError(
            f"{type(model).__name__} has several adapters: {', '.join(adapters)}. Pass the adapter_names that "
            "generate() will be given, or adapter_names=None for the active adapter in all rows."
        )


def check_tensor(input_ids: Any) -> None:
    """Refuse ids that are no tensor."""
    if not isinstance(input_ids, Tensor):
        raise ValueError(
            f"prefill() was given a {type(input_ids).__name__} as input_ids, but it takes a tensor of token ids: "
            "cache.prefill(model, **tokenizer(text, return_tensors='pt'))."
        )


def check_ids(input_ids: Tensor, attention_mask: Tensor | None, max_tokens: int) -> None:
    """Refuse ids, a mask or a number of tokens that make no prompt."""
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


def check_is_longer(input_ids: Tensor, num_cached: int) -> None:
    """Refuse a prompt that has no more columns than are cached."""
    if input_ids.shape[1] <= num_cached:
        raise ValueError(
            f"The cache holds {num_cached} tokens, but input_ids has {input_ids.shape[1]}, so no token is left to "
            "compute. Pass the whole conversation so far plus at least one new token, or call cache.crop(-n) to take "
            "tokens away."
        )


def check_rotary(decoder: torch.nn.Module, longest: int) -> None:
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
                    raise NotPackable(
                        f"a row is longer than the {limit} tokens from which on the rotary embedding ({kind!r}) "
                        "depends on the longest row of each pass"
                    )


def ends_in_padding(inputs: dict[str, Any]) -> bool:
    """Whether the last column of a prompt is padding in some row."""
    mask: Tensor | None = inputs.get("attention_mask")
    return mask is not None and not mask[:, -1].all()


def check_end(sequences: Sequences, attention_mask: Tensor | None) -> None:
    """Refuse a prompt whose last column hides a token, if it is to come alone to layers that would take it in."""
    if sequences.pool.has_states and ends_in_padding({"attention_mask": attention_mask}):
        raise ValueError(
            "prefill() was given an attention_mask whose last column is 0 in some row, but it leaves this column to "
            "generate(), and recurrent layers take in a token that comes alone, hidden or not. Pad on the left, or "
            "leave out prefill()."
        )
