"""Latents that a model makes its keys and values of are what the pages hold."""

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

from hf_paged import PagedCache, PagePool, compiled
from hf_paged.attention.backends import latents
from tests.models import generate, left_padded, paged_cache, plain, random_ids, run, tiny_model

CLOSE = {"atol": 2e-4, "rtol": 1e-4}
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


YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "mscale": 0.7,
    "mscale_all_dim": 0.7,
}


def deepseek(version: str = "V3", **changes):
    model_class = getattr(transformers, f"Deepseek{version}ForCausalLM")
    return tiny_model(model_class, getattr(transformers, f"Deepseek{version}Config"), **LATENT | changes)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"prefill_chunk_size": 7}], ids=str)
@pytest.mark.parametrize("version", ["V2", "V3"])
def test_ragged_batches_give_the_tokens_of_dynamic_cache(version, settings):
    model, ids, mask = deepseek(version), random_ids(3, 21), left_padded(21, [21, 5, 16])
    expected = generate(model, "sdpa", DynamicCache(config=model.config), ids, attention_mask=mask, **settings)
    cache = PagedCache.from_model(model, page_size=16)
    found = generate(model, "paged_flex", cache, ids, attention_mask=mask, **settings)
    assert torch.equal(found, expected)
    cache.pool.check_integrity()


@torch.inference_mode()
def test_on_a_cpu_a_prompt_has_its_scores_in_memory_a_few_at_a_time():
    model, ids = deepseek(), random_ids(1, 600)
    model.set_attn_implementation("paged_flex")
    with torch.profiler.profile(profile_memory=True) as profile:
        model(ids, past_key_values=PagedCache.from_model(model, page_size=16), logits_to_keep=1)
    num_heads = model.config.num_attention_heads
    assert max(event.cpu_memory_usage for event in profile.events()) < num_heads * 600 * 600 * 4


def test_a_token_takes_its_latent_and_its_rotary_part_in_each_layer():
    model = deepseek()
    cache = PagedCache.from_model(model, page_size=16)
    generate(model, "paged_flex", cache, random_ids(1, 16), max_new_tokens=17)
    stats = cache.stats()
    assert cache.lengths == [32]
    assert stats.live_bytes == 32 * stats.token_bytes == 32 * NUM_LAYERS * (RANK + ROTARY) * 4


def ragged(num_columns: int) -> Tensor:
    """Rows with padding on the left, in the middle, and without."""
    mask = torch.ones(3, num_columns, dtype=torch.long)
    mask[0, :13] = 0
    mask[1, 20:34] = 0
    return mask


@pytest.mark.parametrize("way", ["absorbed", "expanded"])
def test_logits_are_those_of_dynamic_cache(way, caplog):
    """Of single tokens, drafts, and a chunk of so many that keys are made of latents before it by any layer."""
    model, ids, splits = deepseek(rope_parameters=YARN), random_ids(3, 190), [40, 1, 1, 8, 140]
    mask = ragged(190)
    expected = plain(model, ids, splits, mask)
    if way == "expanded":
        for layer in model.model.layers:
            layer.self_attn.kv_b_proj.register_forward_hook(lambda module, args, output: output.clone())
    cache = paged_cache(model)
    latents._tell_once.cache_clear()
    found = run(model, cache, ids, splits, mask)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **CLOSE)
    assert ("as long as with DynamicCache" in caplog.text) == (way == "expanded")
    cache.pool.check_integrity()


def test_cached_tokens_may_be_hidden():
    ids, mask = random_ids(3, 50), torch.ones(3, 50, dtype=torch.long)
    mask[0, 3:20] = mask[2, 39:41] = 0
    model, found = deepseek(), []
    for attention in ("sdpa", "paged_flex"):
        model.set_attn_implementation(attention)
        cache = DynamicCache(config=model.config) if attention == "sdpa" else paged_cache(model)
        run(model, cache, ids[:, :42], [42])
        with torch.no_grad():
            for first, stop in ((42, 43), (43, 50)):
                found.append(model(ids[:, first:stop], past_key_values=cache, attention_mask=mask[:, :stop]).logits)
    torch.testing.assert_close(torch.cat(found[2:], dim=1), torch.cat(found[:2], dim=1), **CLOSE)


def test_a_model_makes_keys_of_new_tokens_alone(monkeypatch):
    """Whatever the pool holds, of these rows or of others."""
    model = deepseek()
    pool = PagePool(model.config, num_pages=64, page_size=16)
    other, cache = PagedCache(pool=pool), PagedCache(pool=pool)
    sizes, layer = [], model.model.layers[0].self_attn
    whole = type(layer).expand_kv

    def expand_kv(self, kv_nope, k_rot):
        if self is layer:
            sizes.append(tuple(kv_nope.shape[:-1]))
        return whole(self, kv_nope, k_rot)

    monkeypatch.setattr(type(layer), "expand_kv", expand_kv)
    generate(model, "paged_flex", other, random_ids(4, 100), max_new_tokens=2)
    sizes.clear()  # a method is tried once
    generate(model, "paged_flex", cache, random_ids(2, 9), max_new_tokens=4)
    assert sizes == [(2, 1, 9), (2, 1, 1), (2, 1, 1), (2, 1, 1)]


def test_what_is_left_in_pages_counts_for_nothing():
    model, ids = deepseek(), random_ids(2, 37)
    expected = plain(model, ids, [20, 1, 16])
    cache = paged_cache(model)
    run(model, cache, random_ids(2, 60), [60])
    for layer in range(NUM_LAYERS):
        for tensor in cache.pool.storage(layer).tensors:
            tensor.fill_(torch.nan)
    cache.reset()
    torch.testing.assert_close(run(model, cache, ids, [20, 1, 16]), expected, **CLOSE)


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
