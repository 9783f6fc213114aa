"""What a cache has to get right for a model, read from its configuration."""

from transformers import PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

KINDS = {
    "sliding_attention": "window",
    "reference_sliding_attention": "window",
    "chunked_attention": "chunks",
    "dummy": "shared keys",
    **dict.fromkeys(("linear_attention", "mamba", "conv", "hybrid", "moe", "linear"), "recurrent layers"),
}


def features(model: PreTrainedModel) -> list[str]:
    """In words for a table."""
    config = model.config
    text = config.get_text_config(decoder=True)
    found = ["encoder"] if config.is_encoder_decoder else []
    names = " ".join(sorted(set(dir(config)) | set(config.sub_configs)))
    found += [word for word, part in (("images", "vision"), ("sound", "audio")) if part in names]
    if model.main_input_name in ("input_features", "input_values") and "sound" not in found:
        found.append("sound")
    try:
        kinds = get_layer_types_and_kwargs(text)[0]
    except Exception:
        kinds = []
    found += sorted({KINDS.get(kind, kind.replace("_", " ")) for kind in kinds if kind != "full_attention"})
    for word, fields in (
        ("latent attention", ("kv_lora_rank",)),
        ("experts", ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")),
        ("softcap", ("attn_logit_softcapping",)),
    ):
        if any(getattr(text, field, None) for field in fields):
            found.append(word)
    if any(name.endswith("sinks") for name, _ in model.named_parameters()):
        found.append("sinks")
    return found
