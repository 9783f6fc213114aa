"""Sizes of tiny models by the names that configurations have for them, and what single classes need beside these.

Every model that can have it gets one layout of heads (4 of queries, 2 of keys, 16 wide), so that they share kernels.
"""

from typing import Any

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCAB = 64, 4, 2, 16, 2, 200
WINDOW = 12
MROPE = [2, 3, 3]  # pairs of a head that turn with time, height and width
MAX_POSITIONS = 512


def _all(names: str, value: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


SIZES: dict[str, Any] = {
    **_all("vocab_size vocab_size_per_layer_input src_vocab_size tgt_vocab_size unpadded_vocab_size", VOCAB),
    **_all("hidden_size d_model n_embd emb_dim embed_dim hidden_dim embedding_size dim out_hidden_size", HIDDEN),
    **_all("text_hidden_size projection_dim projector_hidden_size encoder_hidden_size output_dim", HIDDEN),
    **_all("input_embedding_size output_embedding_size word_embed_proj_dim backbone_hidden_size", HIDDEN),
    **_all("intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim d_ff dff dim_ff n_inner d_inner mlp_dim", 64),
    **_all("moe_intermediate_size shared_expert_intermediate_size intermediate_size_mlp ffn_hidden_size", 32),
    **_all("moe_shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size", 32),
    **_all("prefix_dense_intermediate_size dense_intermediate_size shared_experts_intermediate_size", 32),
    **_all("num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers layers depth", LAYERS),
    **_all("num_decoder_layers num_encoder_layers encoder_num_hidden_layers decoder_num_hidden_layers", LAYERS),
    **_all("speech_encoder_layers t2u_encoder_layers t2u_decoder_layers conf_num_hidden_layers num_blocks", LAYERS),
    **_all("num_attention_heads num_heads n_head n_heads encoder_attention_heads decoder_attention_heads", HEADS),
    **_all("attention_heads encoder_num_attention_heads decoder_num_attention_heads conf_num_attention_heads", HEADS),
    **_all("num_encoder_attention_heads num_decoder_attention_heads speech_encoder_attention_heads", HEADS),
    **_all("t2u_encoder_attention_heads t2u_decoder_attention_heads cross_num_attention_heads", HEADS),
    **_all("swa_num_attention_heads num_sliding_attention_heads resampler_n_heads resampler_heads", HEADS),
    **_all("num_key_value_heads encoder_num_key_value_heads decoder_num_key_value_heads num_kv_heads", KV_HEADS),
    **_all("swa_num_key_value_heads cross_num_key_value_heads kv_n_heads", KV_HEADS),
    **_all("head_dim d_kv v_head_dim qk_rope_head_dim qk_nope_head_dim kv_channels swa_head_dim dim_head", HEAD_DIM),
    **_all("resampler_head_dim resampler_dim_head attention_head_dim cross_head_dim index_head_dim", HEAD_DIM),
    **_all(
        "global_head_dim query_pre_attn_scalar linear_head_dim linear_key_head_dim linear_value_head_dim", HEAD_DIM
    ),
    **_all("kv_lora_rank q_lora_rank o_lora_rank laurel_rank hidden_size_per_layer_input gated_norm_rank", 16),
    **_all("linear_num_key_heads linear_num_value_heads linear_num_heads index_n_heads", 2),
    **_all("mamba_n_heads mamba_num_heads n_mamba_heads", 4),
    **_all("mamba_d_state mamba_chunk_size state_size ssm_state_size mamba_headdim mamba_head_dim", 16),
    **_all("num_experts n_routed_experts num_local_experts moe_num_experts", 4),
    **_all("num_experts_per_tok moe_topk moe_k moe_top_k num_experts_per_token", 2),
    **_all("n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts", 1),
    **_all("first_k_dense_replace num_dense_layers moe_layer_start_index", 1),
    **_all("zero_expert_num num_mtp_layers num_nextn_predict_layers", 0),
    **_all("sliding_window sliding_window_size attention_window_size attention_chunk_size local_attention", WINDOW),
    **_all("keep_window_size local_attention_window_len", WINDOW),
    **_all("sliding_window_pattern no_rope_layer_interval full_attn_interval full_attention_interval", 2),
    **_all("global_attn_every_n_layers layer_group_size attn_layer_period expert_layer_period", 2),
    **_all("attn_layer_offset expert_layer_offset interleave_moe_layer_step", 1),
    **_all("max_position_embeddings n_positions n_ctx max_seq_len max_target_positions", MAX_POSITIONS),
    **_all("max_decoder_position_embeddings max_encoder_position_embeddings context_length", MAX_POSITIONS),
    **_all("hidden_size_global", HIDDEN),
    **_all("encoder_hash_byte_group_vocab codebook_size num_embeddings", 64),
    "rotary_dim": 8,
    "max_source_positions": 30,
    "num_mel_bins": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_size": 28,
    "patch_size": 14,
    "initializer_range": 0.02,
}
"""Given to every field of that name whose default is a number."""

WHERE_SET = {"num_key_value_heads", "pad_token_id", "head_dim", "num_experts_per_tok"}
"""Given where the default is None, too."""

_LATENT = {"num_key_value_heads": HEADS}
_MROPE = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": MROPE}
    | {"partial_rotary_factor": 1.0}
}

CHANGES: dict[str, dict[str, Any]] = {
    "AriaConfig": {"projector_patch_to_query_dict": {4: 4}},
    "BambaConfig": {"attn_layer_indices": [1], "mamba_d_head": "auto"},
    "Blip2Config": {"image_token_index": 199, "num_query_tokens": 8},
    "ChameleonConfig": {"vocabulary_map": {"<image>": 199, **{f"IMGIMG{index}": index for index in range(64)}}},
    "ChameleonVQVAEConfig": {"base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1},
    "CohereCompassTextConfig": {
        "rope_parameters": {
            "sliding_attention": _MROPE["rope_parameters"],
            "full_attention": _MROPE["rope_parameters"],
        },
        "layer_types": ["sliding_attention", "full_attention"],
    },
    **_all(
        "Cosmos3EdgeTextConfig Glm4vTextConfig Glm4vMoeTextConfig GlmOcrTextConfig PaddleOCRTextConfig "
        "Qwen2_5OmniTextConfig Qwen2_5_VLTextConfig Qwen2VLTextConfig Qwen3_5TextConfig Qwen3_5MoeTextConfig "
        "Qwen3OmniMoeTextConfig Qwen3VLTextConfig Qwen3VLMoeTextConfig",
        _MROPE,
    ),
    "DbrxAttentionConfig": {"rope_theta": 10000.0, "clip_qkv": 8},
    "DeepseekOcr2TextConfig": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]},
    "DiffusionGemmaTextConfig": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "Dots1Config": {"n_routed_experts": 4, "n_shared_experts": 1},
    "Dots3NoteTextConfig": {"num_key_value_heads": HEADS, "swa_num_key_value_heads": HEADS, "swa_head_dim": 32},
    "Emu3Config": {"vocabulary_map": {"<image>": 199, "<|extra_200|>": 198}},
    "Emu3VQVAEConfig": {"base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1},
    "Ernie4_5_VLMoeTextConfig": {"moe_intermediate_size": [32, 32]}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}},
    "Florence2VisionConfig": {"embed_dim": [16, 16, 32, 64], "num_heads": [1, 1, 2, 4], "num_groups": [1, 1, 2, 4]},
    "FunAsrNanoAdaptorConfig": {"intermediate_size": 16},
    "Gemma3Config": {"mm_tokens_per_image": 4},
    "Gemma3nTextConfig": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
    },
    "Gemma4Config": {
        "vision_config": {
            **{"model_type": "gemma4_vision", "hidden_size": HIDDEN, "intermediate_size": 64, "head_dim": 16},
            **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "patch_size": 4},
            **{"pooling_kernel_size": 2, "position_embedding_size": 64},
        }
    },
    "Glm5NextTextConfig": _LATENT | {"qk_rope_head_dim": 0, "index_topk": 16, "index_kpool": 4},
    "GraniteMoeHybridConfig": {"layer_types": ["linear_attention", "full_attention"], "mamba_d_head": "auto"},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "Granite4VisionConfig": {
        "image_grid_pinpoints": [[28, 28]],
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [0, 1],
    }
    | {"downsample_rate": "1/2"},
    "InklingVisionConfig": {"patch_size": 4, "hidden_size": 32},
    "JanusVQVAEConfig": {"base_channels": 32, "channel_multiplier": [1, 2], "latent_channels": 32}
    | {"image_token_embed_dim": HIDDEN, "num_res_blocks": 1},
    "KyutaiSpeechToTextConfig": {"codec_config": {"num_filters": 16, "model_type": "mimi", "hidden_size": 64}},
    **_all("Lfm2Config Lfm2MoeConfig", {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}),
    "Llama4VisionConfig": {"intermediate_size": 256, "vision_output_dim": HIDDEN}
    | {"projector_input_dim": HIDDEN, "projector_output_dim": HIDDEN},
    **_all("LlavaNextConfig LlavaNextVideoConfig LlavaOnevisionConfig", {"image_grid_pinpoints": [[28, 28]]}),
    "MllamaTextConfig": {"num_hidden_layers": 4, "cross_attention_layers": [1, 3]},
    "MllamaVisionConfig": {"intermediate_layers_indices": [0], "num_global_layers": 1, "max_num_tiles": 1}
    | {"vision_output_dim": 2 * HIDDEN, "supported_aspect_ratios": [[1, 1]]},
    "Mamba2Config": {"num_heads": 8, "n_groups": 2},
    "Molmo2VitConfig": {"image_size": [28, 28]},
    "Molmo2AdapterConfig": {"vision_feature_layer": [-1, -2]},
    "MoonshineConfig": {"encoder_num_key_value_heads": HEADS, "decoder_num_key_value_heads": HEADS},
    "MoonshineStreamingConfig": {"num_key_value_heads": HEADS},
    "MuseSparkAudioConfig": {"hidden_sizes": [16, 16, 32, 64], "depths": [1, 1, 1, 1]},
    "NemotronHConfig": {"n_groups": 2},
    "NemotronH_Omni_Reasoning_V3_Config": {"vision_config": {"video_temporal_patch_size": 2}},
    "Qwen4ExpTextConfig": _MROPE
    | {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16}
    | {"indexer_budget": 16, "indexer_compress_ratio": 4},
    "ReformerConfig": {"is_decoder": True, "axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 32]},
    **_all(
        "VibeVoiceAcousticTokenizerConfig VibeVoiceAcousticTokenizerEncoderConfig "
        "VibeVoiceAcousticTokenizerDecoderConfig",
        {"num_filters": 2, "depths": [1] * 7, "hidden_size": 16},
    ),
    "Speech2TextConfig": {"input_feat_per_channel": 8, "conv_channels": HIDDEN},
    "Step3p7TextConfig": {"sliding_window": WINDOW},
    "VipLlavaConfig": {"vision_feature_layers": [-1, -2]},
    **_all(
        "EncoderDecoderConfig VisionEncoderDecoderConfig SpeechEncoderDecoderConfig",
        {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    ),
    "XmodConfig": {"default_language": "en_XX"},
    "ZambaConfig": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"],
    },
    "ZayaConfig": {"num_experts_per_tok": 1},
}
"""By configuration class, also of nested ones."""
