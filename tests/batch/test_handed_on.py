"""Keys that a model hands on are those of its rows, whatever else is in the pool."""

import copy
import gc
import pickle

import numpy as np
import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma4AssistantConfig,
    Gemma4AssistantForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
)

from hf_paged import PagedCache, PagePool
from tests.models import left_padded, random_ids, run, tiny_llama, tiny_model

FP32 = {"atol": 2e-4, "rtol": 1e-4}
KINDS = ["sliding_attention", "full_attention"]


def tiny_gemma4(window=12):
    return tiny_model(
        Gemma4ForCausalLM,
        Gemma4TextConfig,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=KINDS * 2,
        sliding_window=window,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=200,
        global_head_dim=16,
        num_global_key_value_heads=2,
    )


@pytest.fixture(scope="module")
def model():
    return tiny_gemma4()


def pool_with_others(model):
    """A pool in which pages of other requests lie before and between those of the next cache."""
    model.set_attn_implementation("paged_flex")
    pool = PagePool(model.config, page_size=16, host_bytes=2**20)
    first, second, third = (PagedCache(pool=pool) for _ in range(3))
    for seed, cache in enumerate((first, second, third)):
        run(model, cache, random_ids(2, 37, seed=seed + 10), [37])
    second.reset()
    return pool, (first, third)


@torch.no_grad()
def shared_states(model, cache, ids, first, mask=None):
    """What the pass over the columns behind `first` hands out."""
    run(model, cache, ids[:, :first], [first], None if mask is None else mask[:, :first])
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)[:, first:]
    output = model(
        ids[:, first:],
        past_key_values=cache,
        attention_mask=mask,
        position_ids=positions,
        return_shared_kv_states=True,
    )
    return output.shared_kv_states


def both(model, ids, first, mask=None):
    model.set_attn_implementation("sdpa")
    expected = shared_states(model, DynamicCache(config=model.config), ids, first, mask)
    pool, others = pool_with_others(model)
    cache = PagedCache(pool=pool)
    return shared_states(model, cache, ids, first, mask), expected, cache, others


def assert_same(actual, expected, is_token=None):
    assert actual.keys() == expected.keys()
    for kind in expected:
        for found, wanted in zip(actual[kind], expected[kind], strict=True):
            assert found.shape == wanted.shape
            if is_token is not None:
                real = is_token[:, None, -wanted.shape[2] :, None].bool()
                assert torch.equal(found * ~real, torch.zeros_like(found))
                found, wanted = found * real, wanted * real
            torch.testing.assert_close(found * 1, wanted, **FP32)


@pytest.mark.parametrize("num_new", [1, 5])
@pytest.mark.parametrize("num_cached", [7, 15, 16, 33])
def test_shared_states_are_those_of_a_dynamic_cache(model, num_cached, num_new):
    actual, expected, *_ = both(model, random_ids(2, num_cached + num_new), num_cached)
    assert_same(actual, expected)


@pytest.mark.parametrize("lengths", [[21, 5], [4, 21], [20, 17]])
@pytest.mark.parametrize("num_new", [1, 3])
def test_shared_states_of_ragged_rows_have_zeros_for_padding(model, lengths, num_new):
    count = 21 + num_new
    mask = left_padded(count, [length + num_new for length in lengths])
    actual, expected, *_ = both(model, random_ids(2, count), 21, mask)
    assert_same(actual, expected, mask)


def test_shared_states_of_beams_are_their_own(model):
    ids, results = random_ids(2, 20), []
    for attention in ("sdpa", "paged_flex"):
        model.set_attn_implementation(attention)
        cache = PagedCache.from_model(model, page_size=16) if results else DynamicCache(config=model.config)
        run(model, cache, ids.repeat_interleave(2, dim=0), [20])
        cache.reorder_cache(torch.tensor([1, 2, 2, 0]))
        with torch.no_grad():
            output = model(random_ids(4, 1), past_key_values=cache, return_shared_kv_states=True)
        results.append(output.shared_kv_states)
    assert_same(*reversed(results))


def crop(model, cache):
    cache.crop(-cache.get_seq_length())


def go_on(model, cache):
    run(model, cache, random_ids(2, 30), [1, 29])


def reset(model, cache):
    cache.reset()


def reorder(model, cache):
    cache.reorder_cache(torch.tensor([1, 1]))


def release(model, cache):
    cache.release([0])


def account(model, cache):
    cache.stats()


def swap_out(model, cache):
    cache.activate_past_recording()
    cache.swap_out()


def edit(model, cache):
    for layer in cache.layers[:2]:
        layer.keys.zero_()
        layer.values.zero_()


@pytest.mark.parametrize(
    "change", [crop, go_on, reset, reorder, release, account, swap_out, edit], ids=lambda change: change.__name__
)
def test_shared_states_stay_what_they_were(model, change):
    """As those of a DynamicCache do, of which drafts are made after the cache was cropped."""
    actual, expected, cache, others = both(model, random_ids(2, 22), 21)
    change(model, cache)
    for other in others:  # take the pages that were given back
        run(model, other, random_ids(2, 40), [40])
    assert_same(actual, expected)
    cache.pool.check_integrity()


def test_shared_states_outlive_their_cache(model):
    actual, expected, cache, others = both(model, random_ids(2, 22), 21)
    pool, num_active = cache.pool, cache.pool.stats().num_active_pages
    del cache
    for other in others:
        run(model, other, random_ids(2, 3), [3])
    assert_same(actual, expected)
    del actual
    gc.collect()
    assert pool.stats().num_active_pages < num_active


def test_any_use_of_shared_states_is_that_of_a_copy(model):
    actual, _, cache, _ = both(model, random_ids(2, 22), 21)
    keys, values = actual["full_attention"]
    held = cache.gather(1)
    assert (keys.dtype, keys.device, keys.ndim, keys.is_cuda) == (torch.float32, torch.device("cpu"), 4, False)
    assert keys.to("cpu") is keys
    assert keys.to(torch.float32) is keys
    assert (keys.size(2), len(keys), values.numel()) == (22, 2, held[1].numel())
    for found in (
        keys.clone(),
        keys.contiguous(),
        keys[:, :, :],
        keys + 0,
        torch.cat([keys[:1], keys[1:]]),
        torch.stack(list(keys)),
        torch.from_numpy(keys.numpy()),
        torch.from_numpy(np.asarray(keys)),
        torch.tensor(keys.tolist()),
        copy.deepcopy(keys),
        pickle.loads(pickle.dumps(keys)),
        keys.to(torch.float64).float(),
        torch.add(input=keys, other=0),
        keys.detach(),
        keys.data,
    ):
        assert type(found) is torch.Tensor
        assert torch.equal(found, held[0])
    assert torch.equal(torch.cat((values, keys)), torch.cat([held[1], held[0]]))
    assert repr(keys) == repr(held[0])


def test_keys_that_are_changed_between_update_and_attention_are_refused(model):
    cache = PagedCache(pool=pool_with_others(model)[0])
    ids = random_ids(2, 21)
    run(model, cache, ids[:, :20], [20])
    update = cache.layers[0].update

    def changed(*args, **kwargs):
        keys, values = update(*args, **kwargs)
        keys.mul_(2)
        return keys, values

    cache.layers[0].update = changed
    with pytest.raises(ValueError, match=r"returned were changed in place before attention"):
        run(model, cache, ids[:, 20:], [1])


def test_layers_that_read_others_attend_as_before():
    model = tiny_model(
        Gemma3nForCausalLM,
        Gemma3nTextConfig,
        sliding_window=12,
        num_hidden_layers=4,
        layer_types=KINDS * 2,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=200,
        laurel_rank=8,
    )
    ids, mask = random_ids(2, 30), left_padded(30, [30, 22])
    model.set_attn_implementation("sdpa")
    expected = run(model, DynamicCache(config=model.config), ids, [20, 1, 1, 5, 3], mask)
    actual = run(model, PagedCache(pool=pool_with_others(model)[0]), ids, [20, 1, 1, 5, 3], mask)
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], **FP32)


def test_layers_of_other_models_are_handed_plain_tensors():
    model = tiny_llama()
    model.set_attn_implementation("paged_flex")
    cache, handed = PagedCache.from_model(model, page_size=16), []
    run(model, cache, random_ids(1, 20), [20])
    update = cache.layers[0].update
    cache.layers[0].update = lambda *args, **kwargs: handed.append(update(*args, **kwargs)) or handed[-1]
    run(model, cache, random_ids(1, 1), [1])
    assert handed[0][0] is cache.pool.storage(0).keys


@pytest.mark.skipif(not hasattr(Gemma4TextConfig, "kv_sharing_modes"), reason="drafts of Transformers after 5.21")
def test_drafts_are_made_of_a_request_s_own_keys(monkeypatch):
    model = tiny_gemma4(24)
    own = Gemma4TextConfig.kv_sharing_modes.fget

    def modes(config):
        all_shared = config.num_kv_shared_layers == config.num_hidden_layers
        return ["reuse"] * config.num_hidden_layers if all_shared else own(config)

    # All layers of an assistant read those of another model, for which the class has no words.
    monkeypatch.setattr(Gemma4TextConfig, "validate_architecture", lambda config: None)
    monkeypatch.setattr(Gemma4TextConfig, "kv_sharing_modes", property(modes))
    text = model.config.to_dict() | {
        "num_hidden_layers": 2,
        "layer_types": KINDS,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
    }
    settings = Gemma4AssistantConfig(text_config=Gemma4TextConfig(**text), backbone_hidden_size=48)
    drafter = Gemma4AssistantForCausalLM(settings).eval()
    drafter.generation_config.num_assistant_tokens = 3
    drafts, forward = [], drafter.forward

    def noted(*args, **kwargs):
        output = forward(*args, **kwargs)
        drafts.append(output.logits)
        return output

    monkeypatch.setattr(drafter, "forward", noted)
    ids, results = random_ids(1, 40, seed=1), []
    for attention in ("sdpa", "paged_flex"):
        model.set_attn_implementation(attention)
        cache = PagedCache(pool=pool_with_others(model)[0]) if results else DynamicCache(config=model.config)
        drafts.clear()
        tokens = model.generate(
            ids, past_key_values=cache, assistant_model=drafter, max_new_tokens=12, do_sample=False, eos_token_id=None
        )
        results.append((tokens, torch.cat(drafts)))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[1][1], results[0][1], **FP32)
