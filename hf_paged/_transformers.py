"""What Transformers does not document, or what differs between its versions: names, and what configurations say."""

import copy
import inspect
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, get_layer_types_and_kwargs
from transformers.generation import utils
from transformers.masking_utils import create_causal_mask

CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""The argument in which models and mask functions take a cache; 5.24 renamed it, and warns of the old name."""

_GENERATION: Any = utils
_CACHES = getattr(_GENERATION, "ALL_CACHE_NAMES", [CACHE])

_LISTS_SHARED_LAYERS = "dummy" in DYNAMIC_LAYER_TYPE_MAPPING
"""Whether caches have layers for those of a model that read the keys of others; those of 5.21 end before these."""

_WINDOWED = ("sliding_attention", "chunked_attention")
_HYBRID = ("hybrid", "hybrid_sliding")
_RECURRENT = ("linear_attention", "conv", *_HYBRID)
_STORING = ("full_attention", *_WINDOWED, *_HYBRID)
_EMPTY = ("dummy", "moe", "mlp")

_DYNAMIC = ("torch.ao.nn.quantized.dynamic", "torch.nn.quantized.dynamic")

EXPAND_LATENTS = "expand_kv"
"""The method of attention layers that makes keys and values of latents and of the rotary parts beside them."""

_WINDOWED_MASKS = ("create_sliding_window_causal_mask", "create_chunked_causal_mask", "create_masks_for_generate")


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer as the cache sees it.

    Attributes:
        kind: the layer type as Transformers names it, or `"dummy"` for a layer that stores nothing of its own.
        window: tokens that a query sees, itself included; None without a bound.
        num_states: states of each kind that it may keep for a row, beside keys and values or instead of them.
    """

    kind: str
    window: int | None = None
    num_states: int = 0

    @property
    def stores(self) -> bool:
        """Whether the layer stores keys and values."""
        return self.kind in _STORING


def layer_specs(config: PreTrainedConfig) -> list[LayerSpec]:
    """Read the layers of a decoder from its configuration.

    Raises:
        ValueError: if there are none, or a layer keeps something else than the keys and values of each token.
    """
    decoder = _of_decoder(config)
    if not isinstance(getattr(decoder, "num_hidden_layers", None), int):
        raise ValueError(
            f"The configuration of this {config.model_type!r} model says nothing of a decoder's layers "
            "(num_hidden_layers). Pass that of the part that generates, or use Transformers' DynamicCache."
        )
    kinds, arguments = get_layer_types_and_kwargs(decoder)
    of_images = getattr(decoder, "cross_attention_layers", None)
    if of_images:
        raise ValueError(
            f"PagedCache stores the keys and values of tokens, but layers {list(of_images)} of this "
            f"{config.model_type!r} model keep those of its images instead. Use Transformers' "
            "DynamicCache(config=model.config)."
        )
    has_keys = any(kind in _STORING for kind in kinds)
    for index, kind in enumerate(kinds):
        if kind not in (*_STORING, *_EMPTY) and not (has_keys and kind in _RECURRENT):
            raise ValueError(
                f"PagedCache stores keys and values, but layer {index} of this {config.model_type!r} model is a "
                f"{kind!r} layer, which keeps another state{'' if has_keys else ', as all of its layers do'}. Use "
                "Transformers' DynamicCache(config=model.config)."
            )
    return [
        LayerSpec(
            kind,
            argument.get("sliding_window"),
            argument.get("number_of_states", 1) if kind in _RECURRENT else 0,
        )
        for kind, argument in zip(kinds, arguments, strict=True)
    ]


def layer_kinds(config: PreTrainedConfig) -> Sequence[str]:
    """What a configuration calls each layer of a decoder; none if it says nothing."""
    return getattr(_of_decoder(config), "layer_types", None) or ()


def recurrent_layer(config: PreTrainedConfig) -> str | None:
    """Say in words which layer of a decoder keeps a state of each row; None if there is none."""
    # Not `layer_specs`: while `generate()` drafts by early exit, the configuration counts fewer layers than it lists.
    recurrent = ((index, kind) for index, kind in enumerate(layer_kinds(config)) if kind in _RECURRENT)
    return next((f"layer {index} is a {kind!r} layer, which keeps a state" for index, kind in recurrent), None)


def model_in(given: Any, asker: str) -> PreTrainedModel:
    """Return the model of Transformers that was given, out of what it is wrapped in, as by DistributedDataParallel.

    Args:
        given: by a caller.
        asker: who wants it, as in "PagePool.from_model()".

    Raises:
        ValueError: if it is something else.
    """
    model = given
    while not _has_config(model) and isinstance(inner := getattr(model, "module", None), torch.nn.Module):
        model = inner
    if not isinstance(model, torch.nn.Module) or not _has_config(model):
        raise not_a_model(given, asker)
    return model  # type: ignore[return-value]  # or one that hands on what is asked of it, as PEFT's


def not_a_model(given: Any, asker: str) -> ValueError:
    """Say that a model was wanted, and how to get it from what was given."""
    match given:
        case PreTrainedConfig():
            remedy = "With a configuration alone, use PagedCache(config) or PagePool(config)."
        case str() | os.PathLike():
            remedy = (
                f"Load it: AutoModelForCausalLM.from_pretrained({str(given)!r}, attn_implementation='paged_flex')."
            )
        case torch.nn.Module():
            remedy = "Pass the part of it that has a configuration of Transformers (model.config)."
        case _ if isinstance(getattr(given, "model", None), torch.nn.Module):
            remedy = "Pass the model that it has, its .model."
        case _:
            remedy = "Pass what AutoModelForCausalLM.from_pretrained() returns."
    return ValueError(f"{asker} was given a {type(given).__name__}, but it takes a model of Transformers. {remedy}")


def _has_config(model: Any) -> bool:
    return isinstance(getattr(model, "config", None), PreTrainedConfig)


def decoder_of(model: Any) -> torch.nn.Module:
    """The decoder of a model, which may be wrapped; not the head that a few models have under that name."""
    decoder: torch.nn.Module = model.get_decoder()
    return model.base_model if isinstance(decoder, torch.nn.Linear) else decoder


def obstacle(model: PreTrainedModel) -> str | None:
    """Say why the steps of a model, or of its decoder, can't be reserved before a pass; None if they can."""
    decoder = decoder_of(model)
    for part in (model, decoder):
        if isinstance(part, PreTrainedModel) and not part._can_set_attn_implementation():
            return "it computes attention by itself instead of through Transformers' attention interface"
    # `generate()` makes the masks of a reserved step from the configuration. These models make others.
    config = getattr(decoder, "config", model.config.get_text_config(decoder=True))
    if getattr(config, "is_decoder", True) is False and "config.is_decoder" in inspect.getsource(type(decoder)):
        return "its attention is bidirectional (is_decoder=False in its configuration)"
    names = [*vars(sys.modules[type(decoder).__module__]), *vars(type(model)), *vars(type(decoder))]
    has_windows = any(spec.window is not None for spec in layer_specs(model.config))
    if has_windows and not any(name in _WINDOWED_MASKS for name in names):
        return "it makes no mask for the sliding window that its configuration has"
    return None


def num_decoder_layers(config: PreTrainedConfig) -> int | None:
    """Layers of the decoder whose mask is made with this configuration; None where it counts those of an encoder."""
    if config.is_encoder_decoder or _counts_encoder(config):
        return None
    return int(config.num_hidden_layers) - num_unlisted_layers(config)


def num_unlisted_layers(config: PreTrainedConfig) -> int:
    """Layers at the end of a decoder that read the keys of others, where `layer_specs` leaves these out."""
    return 0 if _LISTS_SHARED_LAYERS else getattr(config, "num_kv_shared_layers", None) or 0


def has_position_bias(config: PreTrainedConfig) -> bool:
    """Whether a decoder adds a bias of its own to its scores, as T5 does."""
    return getattr(_of_decoder(config), "relative_attention_num_buckets", None) is not None


def has_latents(config: PreTrainedConfig) -> bool:
    """Whether a decoder caches latents, of which it makes keys and values after each update, as DeepSeek-V3 does."""
    return getattr(_of_decoder(config), "kv_lora_rank", None) is not None


def expands_latents(config: PreTrainedConfig) -> bool:
    """Whether its attention layers make these keys and values by a method, `EXPAND_LATENTS`, of what `update` returns.

    Known once the code of the model is imported.
    """
    if not has_latents(config):
        return False
    homes = (kind.__module__.replace("configuration_", "modeling_") for kind in type(_of_decoder(config)).__mro__)
    modules = (sys.modules[home] for home in homes if "modeling_" in home and home in sys.modules)
    return any(hasattr(value, EXPAND_LATENTS) for module in modules for value in vars(module).values())


def compile_obstacle(config: PreTrainedConfig) -> str | None:
    """Say what a decoder does that steps over pages can't be compiled with; None if nothing is known."""
    if has_position_bias(config):
        return "adds a position bias to its scores"
    if has_latents(config):
        return "makes keys and values of the latents that are cached"
    if "hybrid_sliding" in layer_kinds(config):
        return "has layers with a state and a window, of which generate() makes a mask without the window"
    return None


def uncompiled_weights(model: PreTrainedModel) -> str | None:
    """Say why Transformers does not compile the steps of a model, for its quantised weights; None if it does."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is None or quantizer.is_compileable:
        return None
    method = getattr(quantizer.quantization_config, "quant_method", None)
    return f"Transformers compiles no weights of {getattr(method, 'value', method)}"


def mixes_tokens(model: PreTrainedModel) -> bool:
    """Whether layers round a token by what else is in a pass.

    bitsandbytes looks for outliers among all tokens, and torch's dynamically quantised layers have one scale for all.
    """
    config: Any = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if getattr(config, "load_in_8bit", False) and getattr(config, "llm_int8_threshold", 0):
        return True
    return any(type(module).__module__.startswith(_DYNAMIC) for module in model.modules())


def least_token_bytes(config: PreTrainedConfig) -> int:
    """Bytes of one token's keys and values in a layer, in 16 bits, as the configuration has it in its usual words.

    Those of one head of size 1 where it has other words for it, or latent attention, of which models cache this or
    that.
    """
    decoder = _of_decoder(config)
    names = "num_key_value_heads", "head_dim", "hidden_size", "num_attention_heads"
    num_kv_heads, head_dim, hidden_size, num_heads = (getattr(decoder, name, None) for name in names)
    if head_dim is None and isinstance(hidden_size, int) and isinstance(num_heads, int):
        head_dim = hidden_size // num_heads
    if has_latents(decoder) or not (isinstance(num_kv_heads, int) and isinstance(head_dim, int)):
        num_kv_heads = head_dim = 1
    return 2 * num_kv_heads * head_dim * torch.float16.itemsize


def token_bytes_by_device(model: PreTrainedModel) -> dict[torch.device, int]:
    """Bytes of the keys and values of one token, in all layers of a device, as the model computes them.

    Configurations name head counts and sizes in too many ways, and not the dtype: the model is asked for one token.
    """
    cache: Any = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.zeros((1, 1), dtype=torch.int64, device=model.device), **{CACHE: cache}, use_cache=True)
    found: dict[torch.device, int] = {}
    for layer in cache.layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if tensor is not None:
                found[tensor.device] = found.get(tensor.device, 0) + tensor.nbytes
    return found


def _of_decoder(config: PreTrainedConfig) -> PreTrainedConfig:
    """The decoder's part; also of a decoder that is used by itself and whose family has an encoder, as BART."""
    config = config.get_text_config(decoder=True)
    if config.is_encoder_decoder or not _counts_encoder(config):
        return config
    config = copy.copy(config)
    config.is_encoder_decoder = True
    return config.get_text_config(decoder=True)


def _counts_encoder(config: PreTrainedConfig) -> bool:
    return "encoder" in config.attribute_map.get("num_hidden_layers", "")


def num_attention_layers(model: torch.nn.Module, num_layers: int) -> int:
    """Layers that a decoder has, of the `num_layers` that its configuration counts: those behind may be cut off."""
    indices = [index for index, _ in _attention_layers(model)]
    return min(num_layers, max(indices) + 1) if indices else num_layers


def layer_devices(model: torch.nn.Module) -> dict[int, torch.device]:
    """The device of each attention layer of a decoder, by its index, as far as modules say which they are."""
    parameters = ((index, next(module.parameters(), None)) for index, module in _attention_layers(model))
    return {index: parameter.device for index, parameter in parameters if parameter is not None}


def _attention_layers(model: torch.nn.Module) -> Iterator[tuple[int, torch.nn.Module]]:
    for module in (decoder_of(model) if hasattr(model, "get_decoder") else model).modules():
        if isinstance(index := getattr(module, "layer_idx", None), int):
            yield index, module


def arguments_of_generate(model: PreTrainedModel) -> dict[str, Any]:
    """What `generate()` was called with that calls this function's caller; {} if it does not.

    It keeps to itself what it does not hand on to a `custom_generate` (seen in 5.24): the streamer, and what asks for
    another mode.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "generate" and frame.f_globals is vars(_GENERATION):
            return frame.f_locals if frame.f_locals.get("self") is model else {}
        frame = frame.f_back
    return {}


def is_synced(model: PreTrainedModel) -> bool:
    """Whether `generate()` has the processes of this model wait for each other."""
    is_one_of_several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not is_one_of_several or torch.distributed.get_world_size() == 1:
        return False
    return bool(_GENERATION.is_deepspeed_zero3_enabled() or _GENERATION.is_fsdp_managed_module(model))


def cache_in(values: Mapping[str, Any]) -> Any:
    """The cache among the inputs or outputs of a model, by whatever name; None without."""
    return next((values[name] for name in _CACHES if name in values), None)


def keeps_to(model: PreTrainedModel, *names: str) -> bool:
    """Whether these methods of a model are those of Transformers' `GenerationMixin`."""
    return all(getattr(getattr(model, name), "__func__", None) is getattr(GenerationMixin, name) for name in names)
