"""Chosen model families, tiny and random, and what each is expected to do with a `PagedCache`.

The tests hold every record to its expectation. All classes that Transformers has are in `tests.sweep`, which makes
docs/families.md.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel

from tests.models import left_padded, random_ids, tiny_model

SLIDING_AND_FULL = ["sliding_attention", "full_attention"] * 2
WIDE = {"hidden_size": 96}  # for configurations that take the head size from it
ENCODER = {
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "init_std": 0.3,
    "decoder_start_token_id": 2,
}
SOUND = {
    "max_source_positions": 30,
    "num_mel_bins": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_target_positions": 99,
}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}


class Outcome(StrEnum):
    """What becomes of a call that works with `DynamicCache`."""

    SAME = "same tokens"
    REFUSED = "clear error"


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        name: of the family.
        model: class name in Transformers, a causal language model or an encoder-decoder.
        config: class name of its configuration.
        has: what a cache has to get right for it.
        changes: to the sizes of `tiny_model`.
        oracle: attention that `DynamicCache` runs with, the fastest that the family has.
        paged_flex: outcome with `attn_implementation="paged_flex"`.
        gathered: outcome with the attention of the oracle.
        message: what the error says.
        note: why it is refused, or slow.
    """

    name: str
    model: str
    config: str
    has: str = ""
    changes: dict[str, Any] = field(default_factory=dict)
    oracle: str = "sdpa"
    paged_flex: Outcome = Outcome.SAME
    gathered: Outcome = Outcome.SAME
    message: str = ""
    note: str = ""

    @property
    def has_encoder(self) -> bool:
        return self.has.startswith("encoder")

    def outcome(self, attention: str) -> Outcome:
        return self.paged_flex if attention == "paged_flex" else self.gathered

    def load(self, attention: str) -> PreTrainedModel:
        """Make the model as `from_pretrained(..., attn_implementation=attention)` does; same weights each time."""
        changes = self.changes | {"attn_implementation": attention}
        return tiny_model(getattr(transformers, self.model), getattr(transformers, self.config), **changes)

    def encoder_inputs(self) -> dict[str, Tensor]:
        """What an encoder reads: three rows, ragged where they are text."""
        if "num_mel_bins" in self.changes:
            generator = torch.Generator().manual_seed(1)
            return {"input_features": torch.randn(3, self.changes["num_mel_bins"], 60, generator=generator)}
        return {"input_ids": random_ids(3, 20), "attention_mask": left_padded(20, [20, 11, 15]).flip(1)}


FAMILIES = [
    Family("Llama", "LlamaForCausalLM", "LlamaConfig", "grouped queries"),
    Family("Mistral", "MistralForCausalLM", "MistralConfig", "window", {"sliding_window": 24}),
    Family("Qwen3", "Qwen3ForCausalLM", "Qwen3Config", "normalized queries and keys"),
    Family(
        "Gemma 2",
        "Gemma2ForCausalLM",
        "Gemma2Config",
        "softcap; window in every other layer",
        {"sliding_window": 24, "query_pre_attn_scalar": 16},
        oracle="eager",
        note="no sdpa in Transformers",
    ),
    Family(
        "Gemma 3",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        "window in some layers",
        {
            "sliding_window": 24,
            "num_hidden_layers": 4,
            "layer_types": SLIDING_AND_FULL,
            "query_pre_attn_scalar": 16,
        },
    ),
    Family(
        "Gemma 3n",
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        "layers that read the keys of another layer; window in some layers",
        {
            "sliding_window": 24,
            "num_hidden_layers": 4,
            "layer_types": SLIDING_AND_FULL,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 200,
            "laurel_rank": 8,
        },
    ),
    Family("Granite", "GraniteForCausalLM", "GraniteConfig", "its own scale", {"attention_multiplier": 0.2}),
    Family(
        "SmolLM3",
        "SmolLM3ForCausalLM",
        "SmolLM3Config",
        "layers without rotary embedding",
        {"no_rope_layer_interval": 2},
    ),
    Family(
        "Cohere 2",
        "Cohere2ForCausalLM",
        "Cohere2Config",
        "window in some layers; layers without rotary embedding",
        {"sliding_window": 24, "num_hidden_layers": 4, "layer_types": SLIDING_AND_FULL, "logit_scale": 1.0},
    ),
    Family(
        "GPT-OSS",
        "GptOssForCausalLM",
        "GptOssConfig",
        "attention sinks; window in every other layer; experts",
        {"sliding_window": 24, **MOE},
        oracle="eager",
        note="no sdpa in Transformers",
    ),
    Family(
        "GPT-2",
        "GPT2LMHeadModel",
        "GPT2Config",
        "one head per query; learned positions",
        {"num_attention_heads": 3},
    ),
    Family(
        "DeepSeek-V3",
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        "values narrower than keys; latent attention; experts",
        {
            "num_key_value_heads": 6,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    Family(
        "Llama 4",
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        "chunked attention; layers without rotary embedding; experts",
        {
            "attention_chunk_size": 24,
            "num_hidden_layers": 4,
            "no_rope_layer_interval": 2,
            "intermediate_size_mlp": 64,
            "num_local_experts": 4,
        },
    ),
    Family(
        "JetMoe",
        "JetMoeForCausalLM",
        "JetMoeConfig",
        "views the output of attention; experts",
        {"kv_channels": 16, **MOE},
        note="repeats the whole pool in each step: sdpa is faster",
    ),
    Family(
        "BLOOM",
        "BloomForCausalLM",
        "BloomConfig",
        "ALiBi",
        {"n_head": 6, "n_layer": 2},
        oracle="eager",
        paged_flex=Outcome.REFUSED,
        message="computes attention by itself",
        note="computes attention by itself",
    ),
    Family(
        "Doge",
        "DogeForCausalLM",
        "DogeConfig",
        "a mask computed from the values",
        {"keep_window_size": 24},
        paged_flex=Outcome.REFUSED,
        message="mask",
        note="reads the values of the cache to compute its mask",
    ),
    Family(
        "GPT-NeoX Japanese",
        "GPTNeoXJapaneseForCausalLM",
        "GPTNeoXJapaneseConfig",
        "views the cached keys",
        WIDE,
        oracle="eager",
        paged_flex=Outcome.REFUSED,
        message="computes attention by itself",
        note="computes attention by itself",
    ),
    Family("BART", "BartForConditionalGeneration", "BartConfig", "encoder", ENCODER),
    Family("Whisper", "WhisperForConditionalGeneration", "WhisperConfig", "encoder of sound", ENCODER | SOUND),
    Family(
        "T5",
        "T5ForConditionalGeneration",
        "T5Config",
        "encoder; position bias",
        {"d_model": 48, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 3}
        | {"initializer_factor": 3.0, "decoder_start_token_id": 2},
    ),
    Family(
        "UMT5",
        "UMT5ForConditionalGeneration",
        "UMT5Config",
        "encoder; position bias in every layer",
        {"d_model": 48, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 3}
        | {"initializer_factor": 3.0, "decoder_start_token_id": 2},
    ),
    Family(
        "Mamba",
        "MambaForCausalLM",
        "MambaConfig",
        "recurrent state",
        oracle="eager",
        paged_flex=Outcome.REFUSED,
        gathered=Outcome.REFUSED,
        message="which keeps another state",
        note="no keys and values to store",
    ),
    Family(
        "Qwen3-Next",
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        "recurrent state in some layers; experts",
        {
            "num_hidden_layers": 4,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
    ),
    Family(
        "Falcon-H1",
        "FalconH1ForCausalLM",
        "FalconH1Config",
        "attention and a recurrent state in every layer",
        {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16},
    ),
    Family(
        "LFM2",
        "Lfm2ForCausalLM",
        "Lfm2Config",
        "convolutions in some layers",
        {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
    ),
]


def new_cache(model: PreTrainedModel) -> Cache:
    """The cache that `generate()` makes by itself."""
    config = model.config.get_text_config(decoder=True)
    decoder = DynamicCache(config=config)
    return EncoderDecoderCache(decoder, DynamicCache(config=config)) if model.config.is_encoder_decoder else decoder
