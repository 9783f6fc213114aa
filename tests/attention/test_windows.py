"""Layers with a sliding window hold the pages of the window, and no others."""

import pytest
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from hf_paged import OutOfPagesError, PagedCache
from hf_paged.attention.mask import paged_flex_mask
from tests.models import generate, left_padded, plain, random_ids, run, tiny_gemma, tiny_llama, tiny_model

FP32 = {"atol": 2e-4, "rtol": 1e-4}
WINDOW = 24


@pytest.fixture
def mistral():
    return tiny_model(MistralForCausalLM, MistralConfig, sliding_window=WINDOW)


@pytest.fixture
def gemma():
    return tiny_gemma(WINDOW)


@pytest.fixture(params=["all layers slide", "some layers slide"])
def model(request):
    return request.getfixturevalue("mistral" if request.param == "all layers slide" else "gemma")


def paged(model, num_pages=None):
    model.set_attn_implementation("paged_flex")
    return PagedCache.from_model(model, num_pages, page_size=16)


def num_held(cache, window):
    cache.stats()  # lets go of what has left the window
    (group,) = (group for group in cache.pool.groups if group.window == window)
    return group.allocator.num_active


@pytest.mark.parametrize(
    "splits", [[10] + [1] * 60, [100] + [1] * 20, [23, 1, 1, 1, 30, 1, 40], [16, 16, 16, 16, 24]], ids=str
)
@pytest.mark.parametrize("lengths", [[1.0], [1.0, 0.4, 0.7]], ids=["one row", "ragged"])
def test_logits_are_those_of_a_contiguous_cache(model, splits, lengths):
    count = sum(splits)
    ids = random_ids(len(lengths), count)
    mask = left_padded(count, [int(share * count) for share in lengths]) if len(lengths) > 1 else None
    expected = plain(model, ids, splits, mask)
    cache = paged(model)
    logits = run(model, cache, ids, splits, mask)
    real = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(logits[real], expected[real], **FP32)
    cache.pool.check_integrity()


def test_the_window_counts_columns_with_holes_in_them(model):
    ids, mask = random_ids(3, 120), (torch.rand(3, 120, generator=torch.Generator().manual_seed(1)) > 0.4).long()
    splits = [50] + [1] * 20 + [20, 30]
    expected = plain(model, ids, splits, mask)
    cache = paged(model)
    logits = run(model, cache, ids, splits, mask)
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], **FP32)
    assert cache.lengths == mask.sum(1).tolist()
    cache.pool.check_integrity()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_other_attention_is_handed_the_columns_of_the_window(model, attention):
    ids, splits = random_ids(2, 100), [50, 1, 1, 30, 18]
    expected = plain(model, ids, splits)
    dynamic = DynamicCache(config=model.config)
    run(model, dynamic, ids, splits)
    cache = paged(model)
    model.set_attn_implementation(attention)
    torch.testing.assert_close(run(model, cache, ids, splits), expected, **FP32)
    for layer, (held, other) in enumerate(zip(cache.layers, dynamic.layers, strict=True)):
        assert held.get_mask_sizes(7) == other.get_mask_sizes(7)
        assert held.is_sliding == other.is_sliding
        torch.testing.assert_close(cache.gather(layer)[0], other.keys, **FP32)
        torch.testing.assert_close(cache.gather(layer)[1], other.values, **FP32)


def test_pages_are_freed_as_the_window_leaves_them(model):
    ids, cache = random_ids(1, 200), paged(model)
    run(model, cache, ids[:, :20], [20])
    for length in range(21, 200):
        run(model, cache, ids[:, length - 1 : length], [1])
        first = max(0, length + 1 - WINDOW) // 16
        assert num_held(cache, WINDOW) == -(-length // 16) - first <= 3
        if len(cache.pool.groups) > 1:
            assert num_held(cache, None) == -(-length // 16)
    cache.pool.check_integrity()


def test_a_prompt_takes_the_pages_of_its_window_only(mistral):
    cache = paged(mistral, num_pages=2)
    logits = run(mistral, cache, random_ids(1, 1000), [1000])
    assert cache.lengths == [1000]
    torch.testing.assert_close(logits, plain(mistral, random_ids(1, 1000), [1000]), **FP32)


def test_no_more_than_a_page_and_the_window_is_held_beside_what_a_contiguous_cache_holds(gemma):
    ids = random_ids(2, 500)
    cache, dynamic = paged(gemma), DynamicCache(config=gemma.config)
    run(gemma, cache, ids, [400] + [1] * 100)
    gemma.set_attn_implementation("sdpa")
    run(gemma, dynamic, ids, [400] + [1] * 100)
    held = sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in dynamic.layers)
    stats = cache.stats()
    assert stats.live_bytes == held
    page_bytes = stats.page_size * stats.token_bytes
    assert stats.active_bytes <= held + 2 * 2 * page_bytes
    assert f"for layers with a window of {WINDOW}" in str(cache.memory_map())


def test_a_bounded_pool_bounds_each_kind_of_layer(gemma):
    ids, splits = random_ids(1, 64), [60, 1, 1, 1, 1]
    expected = plain(gemma, ids, splits)
    cache = paged(gemma, num_pages=4)
    torch.testing.assert_close(run(gemma, cache, ids, splits), expected, **FP32)
    before = [cache.gather(layer) for layer in range(3)]
    with pytest.raises(OutOfPagesError, match="needs 1 more pages, but 0 of 4 are free"):
        run(gemma, cache, ids[:, :1], [1])
    for layer in range(3):
        assert all(torch.equal(a, b) for a, b in zip(cache.gather(layer), before[layer], strict=True))
    cache.pool.check_integrity()


@pytest.mark.parametrize("count", [1, 7, 16, 30])
def test_what_is_recorded_can_be_taken_back(model, count):
    ids, splits = random_ids(2, 120), [60, 1, 1, 38, 20]
    expected = plain(model, ids, splits)
    cache = paged(model)
    cache.activate_past_recording()
    assert all(cache.is_recording_past(layer) for layer in range(len(cache)))
    run(model, cache, ids[:, :100], [60, 1, 1, 38])
    run(model, cache, random_ids(2, count, seed=5), [count])
    cache.crop(-count)
    torch.testing.assert_close(run(model, cache, ids[:, 100:], [20]), expected[:, 100:], **FP32)
    cache.crop(0)
    assert num_held(cache, WINDOW) <= 2 * 3
    cache.pool.check_integrity()


def test_what_has_left_the_window_cannot_be_taken_back(model):
    ids, cache = random_ids(1, 100), paged(model)
    run(model, cache, ids, [60] + [1] * 40)
    before = [cache.gather(layer) for layer in range(len(cache))]
    with pytest.raises(
        ValueError, match=r"left the window of 24 and were dropped. Call cache.activate_past_recording"
    ):
        cache.crop(-1)
    for layer in range(len(cache)):
        assert all(torch.equal(a, b) for a, b in zip(cache.gather(layer), before[layer], strict=True))
    cache.crop(-100)
    expected = plain(model, ids, [100])
    model.set_attn_implementation("paged_flex")
    torch.testing.assert_close(run(model, cache, ids, [100]), expected, **FP32)


def test_a_short_row_is_taken_back_exactly(model):
    ids, cache = random_ids(1, 40), paged(model)
    run(model, cache, ids[:, :23], [23])
    cache.crop(-10)
    expected = plain(model, ids, [13, 27])[:, 13:]
    model.set_attn_implementation("paged_flex")
    torch.testing.assert_close(run(model, cache, ids[:, 13:], [27]), expected, **FP32)


def test_beams_over_a_window_are_those_of_a_contiguous_cache(model):
    ids, mask = random_ids(2, 40), left_padded(40, [40, 18])
    settings = {"num_beams": 3, "max_new_tokens": 40, "attention_mask": mask}
    expected = generate(model, "sdpa", DynamicCache(config=model.config), ids, **settings)
    cache = paged(model)
    assert torch.equal(generate(model, "paged_flex", cache, ids, **settings), expected)
    cache.pool.check_integrity()


def test_draft_and_lookup_decoding_over_a_window_give_the_greedy_tokens(model):
    ids = random_ids(1, 12).repeat(1, 4)
    expected = generate(model, "sdpa", DynamicCache(config=model.config), ids, max_new_tokens=50)
    for how in ({"prompt_lookup_num_tokens": 5}, {"assistant_model": tiny_llama()}):
        cache = paged(model)
        tokens = generate(model, "paged_flex", cache, ids, max_new_tokens=50, **how)
        assert torch.equal(tokens, expected)
        cache.pool.check_integrity()


def test_a_fork_keeps_what_its_parent_lets_go(model):
    ids, cache = random_ids(2, 120), paged(model)
    splits = [50, 1, 1, 1, 7, 60]
    expected = plain(model, ids, splits)[:, 60:]
    model.set_attn_implementation("paged_flex")
    run(model, cache, ids[:, :60], splits[:-1])
    fork = cache.fork()
    run(model, cache, random_ids(2, 100, seed=3), [1] * 100)
    torch.testing.assert_close(run(model, fork, ids[:, 60:], [60]), expected, **FP32)
    cache.pool.check_integrity()


@pytest.mark.parametrize("differs", ["nowhere", "in the first layer", "in the last layer"])
def test_repeated_prompts_share_the_pages_of_their_window_until_they_differ(differs):
    config = MistralConfig(num_hidden_layers=2, num_key_value_heads=2, sliding_window=WINDOW)
    cache = PagedCache(config, page_size=16)
    layers = [torch.randn(1, 2, 100, 8).repeat(3, 1, 1, 1) for _ in range(2)]
    if differs != "nowhere":
        layers[0 if "first" in differs else 1][2] += 1
    cache.get_mask_sizes(100, 0)
    for layer, states in enumerate(layers):
        cache.update(states, -states, layer)
    assert num_held(cache, WINDOW) == (3 if differs == "nowhere" else 6)
    for layer, states in enumerate(layers):
        keys, values = cache.gather(layer)
        assert torch.equal(keys, states[:, :, 100 + 1 - WINDOW :])
        assert torch.equal(values, -keys)
    cache.pool.check_integrity()


# The masks


def test_a_sliding_mask_is_known_by_what_it_is_made_of(mistral):
    cache = paged(mistral)
    run(mistral, cache, random_ids(1, 50), [50])

    def mask(function):
        kv_length, kv_offset = cache.get_mask_sizes(1, 0)
        return paged_flex_mask(1, 1, kv_length, 50, kv_offset, function, config=mistral.config)

    def narrower(batch_idx, head_idx, q_idx, kv_idx):
        return (kv_idx > q_idx - 5) & causal_mask_function(batch_idx, head_idx, q_idx, kv_idx)

    for window in (5, WINDOW):
        planned = mask(sliding_window_causal_mask_function(window))
        assert (planned.metadata.window, planned.metadata.visible) == (window, None)
    other = mask(narrower)
    assert other.metadata.window is None
    assert other.metadata.visible.sum() == 5


def test_a_mask_that_sees_dropped_tokens_raises(mistral):
    cache = paged(mistral)
    run(mistral, cache, random_ids(1, 50), [50])
    mistral.config.sliding_window = 2 * WINDOW
    with pytest.raises(ValueError, match="tokens to be seen that have left the window of 24 tokens and were dropped"):
        run(mistral, cache, random_ids(1, 1), [1])
