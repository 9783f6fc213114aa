"""Tiny random models of any class of Transformers, made from its configuration class."""

import copy
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from tests.sweep.sizes import CHANGES, MROPE, SIZES, WHERE_SET

VOCAB = 200
MAX_LAYERS = 4
MAX_PARAMETERS = 20_000_000


def tiny_config(config_class: type[PreTrainedConfig], changes: dict[str, Any] | None = None) -> PreTrainedConfig:
    """Make a configuration with every size that it has made small.

    Of each kind of layer that the class has by itself, one is kept. Special tokens become the last ones of the
    vocabulary.

    Args:
        config_class: a configuration class whose fields all have defaults.
        changes: to what `tests.sweep.sizes` has, nested as configurations are.
    """
    ids = iter(range(VOCAB - 1, 0, -1))
    return config_class(**_values(config_class(), changes or {}, ids))


def _values(whole: PreTrainedConfig, changes: dict[str, Any], ids: Iterator[int]) -> dict[str, Any]:
    """Arguments for the configuration class, nested ones as dictionaries."""
    changes = _merged(CHANGES.get(type(whole).__name__, {}), changes)
    values: dict[str, Any] = {}
    num_layers = vars(whole).get("num_hidden_layers")
    kinds = _kinds_of_layers(whole, num_layers) if isinstance(num_layers, int) else [0, 1]
    for field in dataclasses.fields(whole):
        name, value = field.name, vars(whole).get(field.name)
        if isinstance(value, PreTrainedConfig):
            values[name] = {**_values(value, changes.get(name, {}), ids), "model_type": value.model_type}
        elif name in SIZES and (isinstance(value, (int, float)) or (value is None and name in WHERE_SET)):
            values[name] = SIZES[name]
        elif name.endswith(("token_id", "token_index")) and isinstance(value, int) and value >= VOCAB:
            values[name] = next(ids)
        elif isinstance(value, (list, tuple)) and len(value) == num_layers and num_layers > 2:
            values[name] = [value[layer] for layer in kinds]
        elif isinstance(value, dict) and "mrope_section" in value:
            values[name] = value | {"mrope_section": MROPE}
    if isinstance(num_layers, int) and "num_hidden_layers" in values:
        values["num_hidden_layers"] = len(kinds)
    if "kv_lora_rank" in values and "num_key_value_heads" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]  # latent attention expands one for each
    for name, value in changes.items():
        if not isinstance(vars(whole).get(name), PreTrainedConfig):
            values[name] = value
    return values


def _kinds_of_layers(config: PreTrainedConfig, num_layers: int) -> list[int]:
    """The first layer of each kind, as lists with an entry for each layer tell them apart; at least two layers."""
    lists = [
        value
        for field in dataclasses.fields(config)
        if isinstance(value := vars(config).get(field.name), (list, tuple)) and len(value) == num_layers
    ]
    first: dict[str, int] = {}
    for layer in range(num_layers):
        first.setdefault(repr([value[layer] for value in lists]), layer)
    kinds = sorted(first.values())[:MAX_LAYERS]
    return kinds if len(kinds) > 1 else [0, min(1, num_layers - 1)]


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for name, value in above.items():
        both = isinstance(value, dict) and isinstance(result.get(name), dict)
        result[name] = _merged(result[name], value) if both else value
    return result


def tiny_model(
    model_class: type[PreTrainedModel], attention: str | dict[str, str], config: PreTrainedConfig
) -> PreTrainedModel:
    """Make the model as `from_pretrained(..., attn_implementation=attention)` does; same weights each time."""
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(copy.deepcopy(config)).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{model_class.__name__} still has {size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = model_class._from_config(config, attn_implementation=attention)
    randomize(model)
    return model.float().eval()


@torch.no_grad()
def randomize(model: PreTrainedModel) -> None:
    """Spread the weights so that tokens depend on what attention reads.

    Matrices get a gain of 3 and embeddings are small, so that what the layers add decides the tokens, also where the
    head is the embedding; scales and biases vary a little.
    """
    generator = torch.Generator().manual_seed(0)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.is_floating_point():
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2 and not any(part in name for part in ("A_log", "conv1d", "time_", "decay")):
            fan_in = max(parameter.shape[-1], 16) if parameter.ndim < 4 else math.prod(parameter.shape[1:])
            parameter.copy_(noise * (0.5 if id(parameter) in embeddings else 3) / math.sqrt(fan_in))
        elif parameter.ndim < 2 and not any(part in name for part in ("A_log", "dt_bias", ".D")):
            parameter.add_(0.1 * noise)


def config_class_of(model_class: type[PreTrainedModel]) -> type[PreTrainedConfig]:
    return model_class.config_class or getattr(transformers, model_class.__name__.replace("Model", "Config"))
