"""Latents that a model makes its keys and values of are what the pages hold."""

import pytest
import torch
import transformers
from transformers import DynamicCache

from hf_paged import PagedCache, PagePool, compiled
from tests.models import generate, left_padded, random_ids, tiny_model

RANK, ROTARY, NUM_LAYERS = 24, 8, 2
LATENT = {
    "num_key_value_heads": 6,
    "kv_lora_rank": RANK,
    "qk_rope_head_dim": ROTARY,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 24,  # keys are wider than values
    "v_head_dim": 16,
    "head_dim": ROTARY,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}


def deepseek(version: str = "V3"):
    model_class = getattr(transformers, f"Deepseek{version}ForCausalLM")
    return tiny_model(model_class, getattr(transformers, f"Deepseek{version}Config"), **LATENT)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"prefill_chunk_size": 7}], ids=str)
@pytest.mark.parametrize("version", ["V2", "V3"])
def test_ragged_batches_give_the_tokens_of_dynamic_cache(version, settings):
    model, ids, mask = deepseek(version), random_ids(3, 21), left_padded(21, [21, 5, 16])
    expected = generate(model, "sdpa", DynamicCache(config=model.config), ids, attention_mask=mask, **settings)
    cache = PagedCache.from_model(model, page_size=16)
    found = generate(model, "paged_flex", cache, ids, attention_mask=mask, **settings)
    assert torch.equal(found, expected)
    cache.pool.check_integrity()


def test_a_token_takes_its_latent_and_its_rotary_part_in_each_layer():
    model = deepseek()
    cache = PagedCache.from_model(model, page_size=16)
    generate(model, "paged_flex", cache, random_ids(1, 16), max_new_tokens=17)
    stats = cache.stats()
    assert cache.lengths == [32]
    assert stats.live_bytes == 32 * stats.token_bytes == 32 * NUM_LAYERS * (RANK + ROTARY) * 4


def test_keys_are_made_of_the_tokens_of_the_rows_alone():
    """Whatever else the pool holds."""
    model = deepseek()
    model.set_attn_implementation("paged_flex")
    pool = PagePool(model.config, num_pages=64, page_size=16)
    other, cache = PagedCache(pool=pool), PagedCache(pool=pool)
    generate(model, "paged_flex", other, random_ids(4, 100), max_new_tokens=2)
    sizes = []
    hook = model.model.layers[0].self_attn.kv_b_proj.register_forward_pre_hook(
        lambda module, args: sizes.append(tuple(args[0].shape[:-1]))
    )
    generate(model, "paged_flex", cache, random_ids(2, 9), max_new_tokens=4)
    hook.remove()
    assert sizes == [(2, 1, 9), (2, 1, 10), (2, 1, 11), (2, 1, 12)]


def test_prompts_are_computed_packed():
    model, ids, mask = deepseek(), random_ids(3, 40), left_padded(40, [40, 17, 33])
    expected = generate(model, "sdpa", DynamicCache(config=model.config), ids, attention_mask=mask)
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    cache.prefill(model, ids, attention_mask=mask)
    assert torch.equal(generate(model, "paged_flex", cache, ids, attention_mask=mask), expected)


def test_compiling_is_refused_before_anything_is_generated():
    model = deepseek()
    model.set_attn_implementation("paged_flex")
    with pytest.raises(ValueError, match="makes keys and values of the latents that are cached"), compiled(model):
        pass


def test_layers_with_an_index_of_their_own_are_refused():
    model = deepseek("V32")
    with pytest.raises(ValueError, match="'indexed_attention' layer, which keeps another state"):
        PagedCache.from_model(model)
