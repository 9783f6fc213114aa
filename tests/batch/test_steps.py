"""A forward pass that fails changes nothing, and says why."""

import threading

import pytest
import torch
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask

from hf_paged import OutOfPagesError, PagedCache, PagePool
from tests.models import generate, left_padded, plain, random_ids, run, tiny_llama

FP32 = {"atol": 2e-4, "rtol": 1e-4}


@pytest.fixture(name="model")
def paged_model():
    model = tiny_llama()
    model.set_attn_implementation("paged_flex")
    return model


def test_a_pool_one_page_too_small_raises_and_the_cache_goes_on_once_pages_are_free(model):
    pool = PagePool(model.config, num_pages=4, page_size=16)
    other, cache = PagedCache(pool=pool), PagedCache(pool=pool)
    ids = random_ids(1, 60)
    run(model, other, ids[:, :20], [20])
    first = run(model, cache, ids[:, :16], [16])
    held = [storage.clone() for storage in (pool.storage(0).keys, pool.storage(1).values)]
    with pytest.raises(OutOfPagesError, match=r"needs 3 more pages, but 1 of 4 are free.*Raise num_pages"):
        run(model, cache, ids[:, 16:], [44])
    assert torch.equal(pool.storage(0).keys, held[0])
    assert torch.equal(pool.storage(1).values, held[1])
    assert cache.get_seq_length() == 16
    assert cache.lengths == [16]
    assert pool.stats().num_free_pages == 1
    pool.check_integrity()
    other.reset()
    second = run(model, cache, ids[:, 16:], [44])
    torch.testing.assert_close(torch.cat([first, second], 1), plain(model, ids, [16, 44]), **FP32)


def test_generate_over_a_pool_that_is_too_small_raises_and_the_cache_generates_again(model):
    ids = random_ids(2, 30)
    cache = PagedCache.from_model(model, num_pages=3, page_size=16)
    with pytest.raises(OutOfPagesError, match="needs 4 more pages, but 3 of 3 are free"):
        generate(model, "paged_flex", cache, ids)
    assert cache.batch_size == -1
    expected = generate(model, "sdpa", DynamicCache(config=model.config), ids[:1], max_new_tokens=16)
    assert torch.equal(generate(model, "paged_flex", cache, ids[:1], max_new_tokens=16), expected)


def test_new_rows_leave_the_watermark_to_running_ones(model):
    pool = PagePool(model.config, num_pages=4, page_size=16, watermark=2)
    running = PagedCache(pool=pool)
    ids = random_ids(1, 60)
    run(model, running, ids[:, :32], [32])
    with pytest.raises(OutOfPagesError, match="2 of them held back for running rows"):
        run(model, PagedCache(pool=pool), ids[:, :5], [5])
    run(model, running, ids[:, 32:], [28])


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("prompt", [15, 16])
def test_a_fault_in_mid_step_loses_nothing(model, layer, prompt):
    cache, ids = PagedCache.from_model(model, page_size=16), random_ids(2, 40)
    mask = left_padded(40, [40, 30])
    expected = plain(model, ids, [prompt, 1, 39 - prompt], mask)
    model.set_attn_implementation("paged_flex")
    real = mask.bool()
    start = run(model, cache, ids[:, :prompt], [prompt], mask[:, :prompt])
    held = cache.pool.stats().num_free_pages

    def fail(*_):
        raise RuntimeError("injected")

    # In layer 0 before anything is written, in layer 1 when layer 0 was.
    hook = model.model.layers[layer].input_layernorm.register_forward_hook(fail)
    for num_new in (1, 20):
        with pytest.raises(RuntimeError, match="injected"), torch.no_grad():
            model(ids[:, prompt : prompt + num_new], past_key_values=cache, attention_mask=mask[:, : prompt + num_new])
        cache.roll_back()
    hook.remove()
    assert cache.pool.stats().num_free_pages == held
    cache.pool.check_integrity()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    rest = []
    with torch.no_grad():
        for begin, end in ((prompt, prompt + 1), (prompt + 1, 40)):
            rest.append(
                model(
                    ids[:, begin:end],
                    past_key_values=cache,
                    attention_mask=mask[:, :end],
                    position_ids=positions[:, begin:end],
                ).logits
            )
    actual = torch.cat([start, *rest], dim=1)
    torch.testing.assert_close(actual[real], expected[real], **FP32)


def test_a_pass_that_fails_after_its_last_layer_is_taken_back_by_crop(model):
    cache, ids = PagedCache.from_model(model, page_size=16), random_ids(1, 24)
    run(model, cache, ids[:, :15], [15])
    hook = model.lm_head.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("injected")))
    with pytest.raises(RuntimeError, match="injected"):
        run(model, cache, ids[:, 15:18], [3])
    hook.remove()
    cache.crop(-3)
    actual = run(model, cache, ids[:, 15:], [3, 6])
    torch.testing.assert_close(actual, plain(model, ids, [15, 3, 6])[:, 15:], **FP32)


def test_a_failed_step_is_rolled_back_and_done_again(model):
    cache, ids = PagedCache.from_model(model, page_size=16), random_ids(1, 24)
    run(model, cache, ids[:, :10], [10])
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("injected")))
    with pytest.raises(RuntimeError, match="injected"):
        run(model, cache, ids[:, 10:11], [1])
    hook.remove()
    cache.roll_back()
    actual = run(model, cache, ids[:, 10:], [1, 13])
    torch.testing.assert_close(actual, plain(model, ids, [10, 1, 13])[:, 10:], **FP32)


def test_a_plan_that_was_not_used_is_not_taken_for_another_attentions_pass(model):
    cache, ids = PagedCache.from_model(model, page_size=16), random_ids(1, 24)
    run(model, cache, ids[:, :20], [20])
    hook = model.model.layers[0].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("injected")))
    with pytest.raises(RuntimeError, match="injected"):
        run(model, cache, ids[:, 20:21], [1])
    hook.remove()
    model.set_attn_implementation("sdpa")
    actual = run(model, cache, ids[:, 20:], [1, 3])
    torch.testing.assert_close(actual, plain(model, ids, [20, 1, 3])[:, 20:], **FP32)


def test_threads_share_a_pool(model):
    pool = PagePool(model.config, page_size=16)  # unbounded: it grows while others write
    prompts = [random_ids(2, 20 + 7 * index, seed=index) for index in range(4)]
    expected = [generate(model, "paged_flex", PagedCache.from_model(model, page_size=16), ids) for ids in prompts]
    results = [None] * 4

    def work(index):
        cache = PagedCache(pool=pool)
        for _ in range(3):
            cache.reset()
            results[index] = generate(model, "paged_flex", cache, prompts[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, tokens) for result, tokens in zip(results, expected, strict=True))
    pool.check_integrity()


def test_forks_go_their_own_ways(model):
    ids = random_ids(1, 50)
    trunk = PagedCache.from_model(model, page_size=16)
    run(model, trunk, ids[:, :20], [20])
    used = trunk.pool.stats().num_active_pages
    fork = trunk.fork()
    assert trunk.pool.stats().num_active_pages == used
    other = random_ids(1, 50, seed=9)
    other[:, :20] = ids[:, :20]
    ours = run(model, trunk, ids[:, 20:], [1] * 10 + [20])
    theirs = run(model, fork, other[:, 20:], [1] * 10 + [20])
    trunk.pool.check_integrity()
    splits = [20] + [1] * 10 + [20]
    torch.testing.assert_close(ours, plain(model, ids, splits)[:, 20:], **FP32)
    torch.testing.assert_close(theirs, plain(model, other, splits)[:, 20:], **FP32)


def test_another_model_raises_and_leaves_the_cache_unharmed(model):
    cache, ids = PagedCache.from_model(model, page_size=16), random_ids(1, 21)
    run(model, cache, ids[:, :20], [20])
    for other, difference in (
        (tiny_llama(num_kv_heads=3), r"key heads and head size \(3, 16\), but this cache holds \(2, 16\)"),
        (tiny_llama(head_dim=32), r"\(2, 32\), but this cache holds \(2, 16\)"),
        (tiny_llama(dtype=torch.bfloat16), "dtype torch.bfloat16, but this cache holds torch.float32"),
    ):
        other.set_attn_implementation("paged_flex")
        with pytest.raises(ValueError, match=difference):
            run(other, cache, ids[:, 20:], [1])
    actual = run(model, cache, ids[:, 20:], [1])
    torch.testing.assert_close(actual, plain(model, ids, [20, 1])[:, 20:], **FP32)


def test_gradients_and_dropout_raise(model):
    cache, ids = PagedCache.from_model(model, page_size=16), random_ids(1, 20)
    with pytest.raises(ValueError, match=r"can't be differentiated. Run the model under torch.no_grad"):
        model(ids, past_key_values=cache)
    model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"dropout is 0.1.*model.eval"):
        run(model, cache, ids, [20])
    model.eval()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(run(model, cache, ids, [20]), plain(model, ids, [20]), **FP32)


def test_a_model_with_its_own_attention_raises(model):
    class OwnAttention(type(model)):
        @classmethod
        def _can_set_attn_implementation(cls):
            return False

    own = OwnAttention(model.config)
    with pytest.raises(ValueError, match="computes attention by itself"):
        PagedCache.from_model(own)
    cache = PagedCache.from_model(model, page_size=16)
    run(model, cache, random_ids(1, 20), [20])
    mask = create_causal_mask(model.config, torch.zeros(1, 1, 48), None, cache)
    with pytest.raises(ValueError, match="computes attention by itself"):
        torch.zeros(1, 6, 1, 21) + mask  # what such a model does with a mask
