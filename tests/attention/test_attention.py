"""`paged_flex` gives what `sdpa` over a DynamicCache gives."""

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BigBirdPegasusConfig,
    BigBirdPegasusForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
)

from hf_paged import PagedCache, PagePool
from tests.models import generate, left_padded, plain, random_ids, run, tiny_llama, tiny_model

FP32 = {"atol": 2e-4, "rtol": 1e-4}


def paged(model, ids, splits, mask=None, page_size=16):
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=page_size)
    logits = run(model, cache, ids, splits, mask)
    cache.pool.check_integrity()
    return logits


def tiny_gemma2():
    return tiny_model(Gemma2ForCausalLM, Gemma2Config, sliding_window=24, query_pre_attn_scalar=16)


def test_both_functions_are_registered():
    assert "paged_flex" in AttentionInterface()
    assert "paged_flex" in AttentionMaskInterface()


@pytest.mark.parametrize("prompt", [1, 15, 16, 33])
def test_decoding_matches_across_page_edges(prompt):
    model, ids = tiny_llama(), random_ids(1, prompt + 20)
    splits = [prompt] + [1] * 20
    torch.testing.assert_close(paged(model, ids, splits), plain(model, ids, splits), **FP32)


@pytest.mark.parametrize("page_size", [32, 128])
def test_any_page_size_gives_the_same(page_size):
    model, ids = tiny_llama(), random_ids(2, page_size + 50)
    splits = [page_size - 6, *9 * [1], 12, 1, 1, 33]
    torch.testing.assert_close(paged(model, ids, splits, page_size=page_size), plain(model, ids, splits), **FP32)


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("splits", [[5, 1, 16, 1, 17, 60], [3, 2, 2, 2, 91]], ids=str)
def test_many_queries_over_a_cache_that_is_not_empty(splits, num_rows):
    model, ids = tiny_llama(), random_ids(num_rows, 100)
    torch.testing.assert_close(paged(model, ids, splits), plain(model, ids, splits), **FP32)


@pytest.mark.usefixtures("block_lists")
@pytest.mark.parametrize("lengths", [[100], [100, 71, 90]], ids=str)
def test_many_queries_are_flex_attention_s_where_block_lists_are_read(lengths):
    model, ids, mask = tiny_gemma2(), random_ids(len(lengths), 100), left_padded(100, lengths)
    model.set_attn_implementation("eager")
    splits, real = [5, 1, 16, 2, 76], mask.bool()
    expected = run(model, DynamicCache(config=model.config), ids, splits, mask)
    torch.testing.assert_close(paged(model, ids, splits, mask)[real], expected[real], **FP32)


@pytest.mark.parametrize("kind", ["left", "right", "holes"])
def test_padding_is_not_seen_and_not_stored(kind):
    model, ids = tiny_llama(), random_ids(4, 90)
    if kind == "left":
        mask = left_padded(90, [90, 61, 42, 57])
    elif kind == "right":
        mask = torch.ones(4, 90, dtype=torch.long)
        for row, length in enumerate((33, 17, 32, 1)):
            mask[row, length:40] = 0  # padding inside of the first pass, then more tokens
    else:
        mask = (torch.rand(4, 90, generator=torch.Generator().manual_seed(1)) > 0.3).long()
    splits = [40, 1, 1, 1, 20, 1, 26]
    expected = plain(model, ids, splits, mask)
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    actual = run(model, cache, ids, splits, mask)
    real = mask.bool()
    torch.testing.assert_close(actual[real], expected[real], **FP32)
    lengths = real.sum(1).tolist()
    assert cache.lengths == lengths
    assert cache.stats().num_active_pages == sum(-(-length // 16) for length in lengths)


@pytest.mark.parametrize("attention", ["paged_flex", "eager"])
def test_any_attention_gives_the_same_tokens(attention):
    model, ids = tiny_llama(), random_ids(3, 21)
    mask = left_padded(21, [21, 9, 16])
    expected = generate(model, "sdpa", DynamicCache(config=model.config), ids, attention_mask=mask)
    cache = PagedCache.from_model(model, page_size=16)
    assert torch.equal(generate(model, attention, cache, ids, attention_mask=mask), expected)


def test_a_cache_filled_by_one_attention_is_continued_by_another():
    model, ids = tiny_llama(), random_ids(2, 60)
    mask = left_padded(60, [60, 41])
    expected = plain(model, ids, [30, 10, 20], mask)
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    run(model, cache, ids[:, :30], [30], mask[:, :30])
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        model.set_attn_implementation("sdpa")
        second = model(
            ids[:, 30:40], past_key_values=cache, attention_mask=mask[:, :40], position_ids=positions[:, 30:40]
        ).logits
        model.set_attn_implementation("paged_flex")
        third = model(ids[:, 40:], past_key_values=cache, attention_mask=mask, position_ids=positions[:, 40:]).logits
    torch.testing.assert_close(second, expected[:, 30:40], **FP32)
    torch.testing.assert_close(third, expected[:, 40:], **FP32)


def test_a_large_batch():
    model, ids = tiny_llama(), random_ids(64, 36)
    splits = [20] + [1] * 16
    torch.testing.assert_close(paged(model, ids, splits), plain(model, ids, splits), **FP32)


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "num_rows"), [(4, 4, 1), (4, 1, 3)], ids=["MHA", "MQA"])
def test_head_layouts(num_heads, num_kv_heads, num_rows):
    model, ids = tiny_llama(num_heads, num_kv_heads), random_ids(num_rows, 50)
    splits = [20] + [1] * 10 + [20]
    torch.testing.assert_close(paged(model, ids, splits), plain(model, ids, splits), **FP32)


@pytest.mark.parametrize("head_dim", [24, 256])
def test_small_and_large_head_sizes_that_need_not_be_powers_of_two(head_dim):
    model, ids = tiny_llama(head_dim=head_dim), random_ids(2, 50)
    splits = [20] + [1] * 10 + [20]
    torch.testing.assert_close(paged(model, ids, splits), plain(model, ids, splits), **FP32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_are_as_close_to_fp32_as_those_of_sdpa(dtype):
    ids, splits = random_ids(2, 190), [100] + [1] * 20 + [70]
    exact = plain(tiny_llama(), ids, splits)
    expected = plain(tiny_llama(dtype=dtype), ids, splits)
    actual = paged(tiny_llama(dtype=dtype), ids, splits)
    assert (actual - exact).abs().mean() < 1.2 * (expected - exact).abs().mean()
    assert (actual - exact).abs().max() < 1.5 * (expected - exact).abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_queries_in_16_bit_give_the_logits_of_sdpa_to_the_bit(dtype):
    model, ids, splits = tiny_llama(dtype=dtype), random_ids(3, 100), [40, 7, 16, 37]
    assert torch.equal(paged(model, ids, splits), plain(model, ids, splits))
    mask = left_padded(100, [100, 71, 90])
    real = mask.bool()
    torch.testing.assert_close(paged(model, ids, splits, mask)[real], plain(model, ids, splits, mask)[real])


def test_many_queries_in_16_bit_see_their_window():
    ids, splits = random_ids(2, 90), [40, *9 * [1], 20, 21]
    exact, model = tiny_gemma2(), tiny_gemma2().to(torch.bfloat16)
    actual = paged(model, ids, splits)
    model.set_attn_implementation("eager")
    expected = run(model, DynamicCache(config=model.config), ids, splits)
    exact.set_attn_implementation("eager")
    reference = run(exact, DynamicCache(config=exact.config), ids, splits)
    assert (actual - reference).abs().mean() < 1.2 * (expected - reference).abs().mean()


def test_a_sliding_window_is_respected():
    model, ids = tiny_model(MistralForCausalLM, MistralConfig, sliding_window=24), random_ids(3, 100)
    mask = left_padded(100, [100, 71, 90])
    splits = [40] + [1] * 12 + [48]
    real = mask.bool()
    torch.testing.assert_close(paged(model, ids, splits, mask)[real], plain(model, ids, splits, mask)[real], **FP32)


def test_softcap_and_two_kinds_of_layers():
    model, ids = tiny_gemma2(), random_ids(2, 70)
    splits = [40] + [1] * 10 + [20]
    actual = paged(model, ids, splits)
    model.set_attn_implementation("eager")
    expected = run(model, DynamicCache(config=model.config), ids, splits)
    torch.testing.assert_close(actual, expected, **FP32)


def test_queries_that_are_a_slice_of_one_projection():
    model, ids = (
        tiny_model(GPT2LMHeadModel, GPT2Config, num_attention_heads=3),
        random_ids(3, 60),
    )
    splits = [30, 1, 1, 1, 27]
    torch.testing.assert_close(paged(model, ids, splits), plain(model, ids, splits), **FP32)


def test_a_cached_token_can_be_hidden_later():
    model, ids = tiny_llama(), random_ids(2, 41)
    mask = torch.ones(2, 41, dtype=torch.long)
    mask[0, 3:20] = 0
    caches = {"sdpa": DynamicCache(config=model.config), "paged_flex": PagedCache.from_model(model, page_size=16)}
    logits = {}
    for attention, cache in caches.items():
        model.set_attn_implementation(attention)
        run(model, cache, ids[:, :40], [40])
        with torch.no_grad():
            logits[attention] = model(ids[:, 40:], past_key_values=cache, attention_mask=mask).logits
    torch.testing.assert_close(logits["paged_flex"], logits["sdpa"], **FP32)


def test_without_a_paged_cache_it_is_sdpa():
    model, ids = tiny_llama(), random_ids(2, 30)
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        expected = model(ids, use_cache=False).logits
        model.set_attn_implementation("paged_flex")
        assert torch.equal(model(ids, use_cache=False).logits, expected)
    expected = generate(model, "sdpa", DynamicCache(config=model.config), ids)
    assert torch.equal(generate(model, "paged_flex", DynamicCache(config=model.config), ids), expected)


def test_the_placement_of_pages_changes_no_bit():
    model, ids = tiny_llama(), random_ids(3, 80)
    model.set_attn_implementation("paged_flex")
    splits, results = [33] + [1] * 20 + [27], []
    for seed in range(3):
        pool = PagePool(model.config, num_pages=24, page_size=16)
        order = torch.randperm(24, generator=torch.Generator().manual_seed(seed)).tolist()
        pages = pool.groups[0].take(24)
        pool.groups[0].allocator.release([pages[index] for index in order])
        results.append(run(model, PagedCache(pool=pool), ids, splits))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_what_another_sequence_left_in_a_page_is_not_seen():
    model, ids = tiny_llama(), random_ids(1, 40)
    model.set_attn_implementation("paged_flex")
    pool = PagePool(model.config, num_pages=4, page_size=16)
    expected = run(model, PagedCache(pool=pool), ids, [20] + [1] * 20)
    for layer in range(2):
        pool.storage(layer).keys.fill_(float("nan"))
        pool.storage(layer).values.fill_(float("nan"))
    assert torch.equal(run(model, PagedCache(pool=pool), ids, [20] + [1] * 20), expected)


def test_a_growing_pool_keeps_what_it_holds():
    model, ids = tiny_llama(), random_ids(2, 700)
    splits = [20] + [1] * 10 + [300, 1, 369]
    torch.testing.assert_close(paged(model, ids, splits), plain(model, ids, splits), **FP32)


def test_a_cache_filled_in_inference_mode_works_outside_of_it():
    model, ids = tiny_llama(), random_ids(2, 40)
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    with torch.inference_mode():
        first = model(ids[:, :30], past_key_values=cache).logits
    second = run(model, cache, ids[:, 30:], [1, 1, 8])
    expected = plain(model, ids, [30, 1, 1, 8])
    torch.testing.assert_close(torch.cat([first, second], dim=1), expected, **FP32)


@pytest.mark.parametrize("lengths", [[20, 20], [20, 9]], ids=str)
def test_a_causal_mask_counts_where_the_layers_say_that_they_are_not_causal(lengths):
    sizes = {"vocab_size": 200, "d_model": 48, "decoder_layers": 2, "decoder_attention_heads": 3, "init_std": 0.3}
    sizes |= {"decoder_ffn_dim": 64, "max_position_embeddings": 64, "pad_token_id": 0}
    torch.manual_seed(0)
    model = BigBirdPegasusForCausalLM(BigBirdPegasusConfig(**sizes)).eval()
    assert not model.model.decoder.layers[0].self_attn.is_causal
    ids, mask = random_ids(len(lengths), 20), left_padded(20, lengths)
    settings = {"attention_mask": mask, "max_new_tokens": 10}
    expected = generate(model, "eager", DynamicCache(config=model.config), ids, **settings)  # it has no sdpa
    cache = PagedCache.from_model(model, page_size=16)
    assert torch.equal(generate(model, "paged_flex", cache, ids, **settings), expected)
