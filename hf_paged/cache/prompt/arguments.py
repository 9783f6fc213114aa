"""Which arguments of a prompt fit a cache."""

import inspect
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from hf_paged._transformers import layer_specs
from hf_paged.batch.sequences import Sequences

_SETTINGS = vars(GenerationConfig())  # type: ignore[no-untyped-call]
_OF_GENERATE = {*_SETTINGS, *inspect.signature(GenerationMixin.generate).parameters} - {"kwargs"}


def encoder_refused(model: PreTrainedModel) -> ValueError:
    """Say that the prompts of a model with an encoder aren't prefilled."""
    return ValueError(
        f"{type(model).__name__} has an encoder, so its rows can't be prefilled. Leave out cache.prefill(): "
        "generate() computes the prompts of this model by itself."
    )


def check_fits(model: PreTrainedModel, sequences: Sequences) -> None:
    """Raise ValueError unless the model is one whose prompts these rows can hold."""
    if model.config.is_encoder_decoder:
        raise encoder_refused(model)
    if layer_specs(model.config.get_text_config(decoder=True)) != sequences.pool.layers:
        raise ValueError(
            f"{type(model).__name__} has other layers than the model that this cache was made for. Make a new "
            "PagedCache for this model."
        )


def check_arguments(model: PreTrainedModel, inputs: dict[str, Any]) -> None:
    """Raise ValueError unless these are inputs of the model, and say which adapters it takes."""
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


def check_ids(input_ids: Tensor, attention_mask: Tensor | None, max_tokens: int) -> None:
    """Raise ValueError unless these are rows of columns, and a mask of them."""
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
    """Raise ValueError unless there are more columns than are cached."""
    if input_ids.shape[1] <= num_cached:
        raise ValueError(
            f"The cache holds {num_cached} tokens, but input_ids has {input_ids.shape[1]}, so no token is left to "
            "compute. Pass the whole conversation so far plus at least one new token, or call cache.crop(-n) to take "
            "tokens away."
        )
