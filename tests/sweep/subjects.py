"""The classes of Transformers that generate tokens, each made tiny with inputs for it."""

import inspect
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from tests.models import left_padded
from tests.sweep.checks import LENGTHS, PROMPT, Subject, greedy
from tests.sweep.media import media_inputs
from tests.sweep.tiny import VOCAB, config_class_of, tiny_config, tiny_model

MAPPINGS = {
    "causal": "CAUSAL_LM",
    "seq2seq": "SEQ_TO_SEQ_CAUSAL_LM",
    "vision-language": "IMAGE_TEXT_TO_TEXT",
    "speech": "SPEECH_SEQ_2_SEQ",
    "multimodal": "MULTIMODAL_LM",
}


def classes() -> dict[str, tuple[str, str]]:
    """Kind and model type of each class, by its name: the first of the mappings that have it."""
    found: dict[str, tuple[str, str]] = {}
    for kind, mapping in MAPPINGS.items():
        for model_type, names in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").items():
            for name in [names] if isinstance(names, str) else names:
                found.setdefault(name, (kind, model_type))
    return found


def words(num_rows: int, num_columns: int, seed: int = 0) -> Tensor:
    """Random tokens, none of the special ones that lie at either end of the vocabulary."""
    return torch.randint(3, VOCAB - 40, (num_rows, num_columns), generator=torch.Generator().manual_seed(seed))


def subject_of(name: str, kind: str) -> Subject:
    """Make the model once, to see whether it can be, and find inputs for it."""
    model_class = getattr(transformers, name)
    config_class = config_class_of(model_class)
    decodes = {"is_decoder": True} if kind == "causal" and hasattr(config_class(), "is_decoder") else {}

    def load(attention: str | dict[str, str]) -> PreTrainedModel:
        model = tiny_model(model_class, attention, tiny_config(config_class, decodes))
        model.generation_config = greedy(model)
        return model

    attention = "sdpa"
    try:
        model = load(attention)
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error) and "sdpa" not in str(error):
            raise
        attention = "eager"
        model = load(attention)
    return Subject(name, load, attention, inputs_of(model))


def inputs_of(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    takes = inspect.signature(model.forward).parameters
    if model.config.is_encoder_decoder:
        return encoder_inputs(model)
    ids, mask = words(3, PROMPT), left_padded(PROMPT, LENGTHS)
    extra: dict[str, Tensor] = {}
    if "token_type_ids" in takes and "vision_config" in model.config.sub_configs:
        extra["token_type_ids"] = torch.zeros_like(ids)
    row = {"input_ids": ids[:1]} | {name: value[:1] for name, value in extra.items()}
    batch = {"input_ids": ids * mask, "attention_mask": mask} | extra
    inputs = {"row": row, "batch": batch, "right-padded turn": batch, "beams": row, "fork": row}
    return inputs | media_inputs(model, row["input_ids"])


def encoder_inputs(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """What an encoder reads: one row; three, ragged where they are text, with a beginning to go on from."""
    name = model.main_input_name
    generator = torch.Generator().manual_seed(1)
    if name == "input_ids":
        mask = left_padded(20, [20, 11, 15]).flip(1)
        rows = {"input_ids": words(3, 20) * mask, "attention_mask": mask}
    else:
        noise = torch.randn(3, *_shape(model, name), generator=generator)
        rows = {name: noise.abs() if name == "flattened_patches" else noise}  # these begin with their places
    start = torch.cat([torch.full((3, 1), 2), words(3, 6)], dim=1)
    row = {name: rows[name][:1]}
    return {"row": row, "batch": rows | {"decoder_input_ids": start}, "beams": row}


def _shape(model: PreTrainedModel, name: str) -> tuple[int, ...]:
    """Of what an encoder of images or sound reads, without the row."""
    config = model.config
    encoder = getattr(config, "encoder", config)
    if name == "pixel_values":
        return 3, encoder.image_size, encoder.image_size
    if name == "flattened_patches":
        return 16, config.vision_config.patch_embed_hidden_size + 2
    if name == "input_features":
        bins = getattr(config, "input_feat_per_channel", getattr(config, "feature_projection_input_dim", None))
        return (60, bins) if bins else (getattr(config, "num_mel_bins", 8), 60)
    return (3200,)
