"""Images and sound for tiny models, as a processor would hand them over."""

import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

SIDE, PATCH, FRAMES = 28, 14, 64
MOST = 80  # tokens for an image


def media_inputs(model: PreTrainedModel, ids: Tensor) -> dict[str, dict[str, Any]]:
    """Inputs with an image and with sound, where the model takes some of the shapes known here.

    A shape counts if the model runs with it and what it computes depends on it.
    """
    found = {}
    for medium, tokens, candidates in (
        ("image", ("image_token_id", "image_token_index", "image_patch_id"), _images),
        ("sound", ("audio_token_id", "audio_token_index"), _sounds),
    ):
        for candidate in candidates(model):
            inputs = _with_tokens(model, ids, candidate, medium, tokens)
            if inputs is not None and _counts(model, inputs, next(iter(candidate))):
                found[medium] = inputs
                break
    return found


def _first(config: PreTrainedConfig, names: tuple[str, ...]) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _side(value: Any, default: int) -> int:
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    return value if isinstance(value, int) else default


def _images(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    vision = getattr(model.config, "vision_config", None)
    if vision is None and "pixel_values" not in inspect.signature(model.forward).parameters:
        return
    vision = vision or model.config
    side, patch = _side(getattr(vision, "image_size", None), SIDE), _side(getattr(vision, "patch_size", None), PATCH)
    channels = _side(_first(vision, ("num_channels", "in_channels", "in_chans")), 3)
    frames = _side(getattr(vision, "temporal_patch_size", None), 1)
    generator = torch.Generator().manual_seed(2)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    grid = torch.tensor([[1, 4, 4]])
    sizes = torch.tensor([[side, side]])
    for depth in dict.fromkeys((frames, 1)):
        pixels = noise(16, channels * depth * patch * patch)
        yield {"pixel_values": pixels, "image_grid_thw": grid}
        yield {"pixel_values": pixels, "image_grid_hws": grid[:, 1:]}
        yield {"pixel_values": pixels.view(16, channels, depth * patch, patch), "image_grid_thw": grid}
        yield {"pixel_values": pixels.view(16, channels, depth * patch, patch), "image_grid_hws": grid[:, 1:]}
    for length in (side, 4 * patch, 2 * patch, 64, 224):
        square = (channels, length, length)
        yield {"pixel_values": noise(1, *square)}
        yield {"pixel_values": noise(1, *square), "image_sizes": sizes * length // side}
        yield {"pixel_values": noise(1, 1, *square)}
        yield {"pixel_values": noise(1, 2, *square), "image_sizes": sizes * length // side}
        yield {
            "pixel_values": noise(1, 1, 1, *square),
            "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long),
        }
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4))[None]
    yield {"pixel_values": noise(1, 16, channels * patch * patch), "image_position_ids": places}
    yield {
        "pixel_values": noise(1, 16, channels * patch * patch),
        "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]]),
    }


def _sounds(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    audio = getattr(model.config, "audio_config", None) or getattr(model.config, "encoder_config", None)
    if audio is None:
        return
    bins = _side(_first(audio, ("num_mel_bins", "input_feat_size", "n_mel_bins", "input_dim", "feature_size")), 8)
    generator = torch.Generator().manual_seed(3)
    for length in (FRAMES, 60, 3000, 200):
        features = torch.randn(1, bins, length, generator=generator)
        everything = torch.ones(1, length, dtype=torch.long)
        yield {"input_features": features, "feature_attention_mask": everything}
        yield {"input_features": features, "input_features_mask": everything}
        yield {"input_features": features.transpose(1, 2), "input_features_mask": everything.bool()}
        yield {"input_features": features}
        yield {"input_features": features.transpose(1, 2)}


def _with_tokens(
    model: PreTrainedModel, ids: Tensor, candidate: dict[str, Any], medium: str, names: tuple[str, ...]
) -> dict[str, Any] | None:
    """Put the tokens that stand for an image or sound behind the second one of a row."""
    takes = inspect.signature(model.forward).parameters
    if not set(candidate) <= set(takes):
        return None
    name = "get_image_features" if medium == "image" else "get_audio_features"
    features = getattr(model, name, None) or getattr(getattr(model, "model", None), name, None)
    count = 0
    token = _first(model.config, names)
    if features is not None:
        takes_too = inspect.signature(features).parameters
        if next(iter(candidate)) not in takes_too:
            return None
        try:
            with torch.no_grad():
                count = _count(features(**{name: value for name, value in candidate.items() if name in takes_too}))
        except Exception:
            return None
    elif getattr(model.config, "num_query_tokens", None):
        count = model.config.num_query_tokens
    if count > MOST or (count and token is None):
        return None
    marks = torch.full((1, count), token if count else 0)
    ids = torch.cat([ids[:, :2], marks, ids[:, 2:]], dim=1)
    inputs = {"input_ids": ids, **candidate}
    kind = 1 if medium == "image" else 3
    if "mm_token_type_ids" in takes:
        inputs["mm_token_type_ids"] = (ids == token).int() * kind
    elif "token_type_ids" in takes and medium == "image":
        inputs["token_type_ids"] = (ids == token).long()
    if "cross_attention_mask" in takes:
        inputs["cross_attention_mask"] = torch.ones(1, ids.shape[1], 1, 1, dtype=torch.long)
    if "image_attention_mask" in takes:
        inputs["image_attention_mask"] = torch.ones(1, ids.shape[1], 1, dtype=torch.long)
    return inputs


def _count(features: Any) -> int:
    """How many vectors there are in what a model makes of an image."""
    if hasattr(features, "pooler_output") and features.pooler_output is not None:
        features = features.pooler_output
    elif hasattr(features, "last_hidden_state"):
        features = features.last_hidden_state
    if isinstance(features, Tensor):
        return math.prod(features.shape[:-1])
    return sum(_count(part) for part in features)


@torch.no_grad()
def _counts(model: PreTrainedModel, inputs: dict[str, Any], medium: str) -> bool:
    """Whether the model runs with these inputs, and something else comes of other pixels."""
    try:
        logits = model(**inputs).logits[:, -1]
        other = model(**inputs | {medium: inputs[medium].flip(-1) * 0.5}).logits[:, -1]
    except Exception:
        return False
    return bool(torch.isfinite(logits).all()) and not torch.allclose(logits, other, atol=1e-3)
