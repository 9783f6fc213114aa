"""Models that make other masks or positions than a planned step takes for granted: right, or refused."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BigBirdPegasusConfig,
    BigBirdPegasusForConditionalGeneration,
    DynamicCache,
    EncoderDecoderCache,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MoshiConfig,
    MoshiForCausalLM,
)

from hf_paged import PagedCache
from tests.models import generate, left_padded, random_ids, tiny_llama, tiny_model


def moshi(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.3, "max_position_embeddings": 128}
    return MoshiForCausalLM(MoshiConfig(**(sizes | changes))).eval()


def test_a_window_that_the_model_does_not_mask_is_refused_over_pages():
    model = moshi(sliding_window=8)
    ids = random_ids(1, 20)
    model.set_attn_implementation("paged_flex")
    with pytest.raises(ValueError, match="makes no mask for the sliding window that its configuration has"):
        PagedCache.from_model(model)
    model.set_attn_implementation("sdpa")
    expected = generate(model, "sdpa", DynamicCache(config=model.config), ids, max_new_tokens=12)
    cache = PagedCache.from_model(model, page_size=16)
    assert torch.equal(generate(model, "sdpa", cache, ids, max_new_tokens=12), expected)


def test_a_window_that_the_model_masks_is_not_refused():
    model = tiny_model(MistralForCausalLM, MistralConfig, sliding_window=8)
    ids = random_ids(1, 20)
    expected = generate(model, "sdpa", DynamicCache(config=model.config), ids, max_new_tokens=12)
    cache = PagedCache.from_model(model, page_size=16)
    assert torch.equal(generate(model, "paged_flex", cache, ids, max_new_tokens=12), expected)


@pytest.mark.parametrize("is_decoder", [False, True])
def test_a_decoder_that_says_it_is_none_is_refused(is_decoder):
    sizes = {"vocab_size": 200, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    torch.manual_seed(0)
    config = BertConfig(**sizes, intermediate_size=64, initializer_range=0.3, is_decoder=is_decoder)
    model = BertLMHeadModel(config).eval()
    ids = random_ids(2, 20)
    expected = generate(model, "sdpa", DynamicCache(config=model.config), ids, max_new_tokens=8)
    model.set_attn_implementation("paged_flex")
    if not is_decoder:
        with pytest.raises(ValueError, match=r"its attention is bidirectional \(is_decoder=False"):
            PagedCache.from_model(model)
        return
    cache = PagedCache.from_model(model, page_size=16)
    assert torch.equal(generate(model, "paged_flex", cache, ids, max_new_tokens=8), expected)


def test_an_encoder_that_adds_its_mask_to_the_scores_does_not_see_padding():
    sizes = {"vocab_size": 200, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "init_std": 0.3}
    sizes |= {"encoder_attention_heads": 3, "decoder_attention_heads": 3, "max_position_embeddings": 64}
    torch.manual_seed(0)
    config = BigBirdPegasusConfig(**sizes, encoder_ffn_dim=64, decoder_ffn_dim=64, attention_type="original_full")
    model = BigBirdPegasusForConditionalGeneration(config).eval()
    ids, mask = random_ids(3, 20), left_padded(20, [20, 7, 15]).flip(1)
    settings = {"attention_mask": mask, "max_new_tokens": 8}
    oracle = EncoderDecoderCache(DynamicCache(), DynamicCache())
    expected = generate(model, "eager", oracle, ids, **settings)  # it has no sdpa
    model.set_attn_implementation("paged_flex")
    assert torch.equal(
        generate(model, "paged_flex", PagedCache.from_model(model, page_size=16), ids, **settings), expected
    )


@pytest.mark.parametrize("kept", [0, 1, 4, 7])
def test_a_row_whose_encoder_is_all_padding_gets_nothing_from_it(kept):
    config = {
        "vocab_size": 200,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "add_cross_attention": True,
    }
    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(**config, bos_token_id=0, eos_token_id=1)).eval()
    ids, states, mask = random_ids(3, 7), torch.randn(3, 7, 64), torch.ones(3, 7, dtype=torch.long)
    mask[0, kept:] = 0
    outputs = []
    for attention in ("sdpa", "paged_flex"):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            inputs = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
            outputs.append(model(ids, **inputs).last_hidden_state)
    assert torch.equal(*outputs)


def test_layers_that_keep_the_prompt_beside_a_window_are_refused():
    kinds = ["full_attention", "reference_sliding_attention"]
    config = tiny_llama().config
    config.layer_types, config.sliding_window = kinds, 8
    with pytest.raises(ValueError, match="layer 1 of this 'llama' model is a 'reference_sliding_attention' layer"):
        PagedCache(config)


class CountsPadding(LlamaForCausalLM):
    """Counts padding in the positions of every pass but the first, as some models with learned positions do."""

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        given = super().prepare_inputs_for_generation(input_ids, **kwargs)
        num_new = given["input_ids"].shape[1]
        if num_new < input_ids.shape[1]:
            given["position_ids"] = torch.arange(input_ids.shape[1] - num_new, input_ids.shape[1])[None]
        return given


@pytest.mark.parametrize("lengths", [[20, 20], [20, 7], [16, 20]], ids=str)
def test_a_prompt_whose_last_token_goes_on_otherwise_is_not_prefilled(lengths):
    model = tiny_model(CountsPadding, LlamaConfig)
    ids, mask = random_ids(2, 20), left_padded(20, lengths)
    settings = {"attention_mask": mask, "max_new_tokens": 8}
    expected = generate(model, "sdpa", DynamicCache(config=model.config), ids, **settings)
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    if min(lengths) < 20:
        with pytest.raises(ValueError, match="gives the last token of this prompt other scores if the tokens before"):
            cache.prefill(model, ids, mask)
        assert cache.get_seq_length() == 0
        cache.pool.check_integrity()
    else:
        cache.prefill(model, ids, mask)
        assert cache.lengths == [19, 19]
    assert torch.equal(generate(model, "paged_flex", cache, ids, **settings), expected)
