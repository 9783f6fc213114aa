"""Layers that a model passes over hold nothing; a pass that stops before the last layer is never taken for another."""

import pytest
import torch
from transformers import (
    BartConfig,
    BartForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    WhisperConfig,
    WhisperForCausalLM,
)

from hf_paged import OutOfPagesError, PagedCache, PagePool
from hf_paged.errors import UnclearPassError
from tests.models import generate, left_padded, plain, random_ids, run, tiny_gemma, tiny_llama, tiny_model

FP32 = {"atol": 2e-4, "rtol": 1e-4}


class NoAttention(torch.nn.Module):
    def forward(self, hidden_states, **kwargs):
        return torch.zeros_like(hidden_states), None


def bypass(layer):
    layer.forward = lambda hidden_states, **kwargs: hidden_states


def cut_off(model):
    model.model.layers = model.model.layers[:2]


def counted_off(model):
    model.config.num_hidden_layers = 3


def first_bypassed(model):
    bypass(model.model.layers[0])


def two_bypassed(model):
    bypass(model.model.layers[0])
    bypass(model.model.layers[2])


def middle_ablated(model):
    model.model.layers[1].self_attn = NoAttention()


def last_ablated(model):
    model.model.layers[3].self_attn = NoAttention()


CHANGES = [cut_off, counted_off, first_bypassed, two_bypassed, middle_ablated, last_ablated]


def uncached(model, ids, mask):
    """What the model says without any cache: DynamicCache asks its first layer for the length of all."""
    return generate(model, "sdpa", None, ids, attention_mask=mask, max_new_tokens=10, use_cache=False)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("attention", ["paged_flex", "sdpa"])
def test_what_is_left_of_a_model_generates_what_it_does_without_a_cache(change, attention):
    model = tiny_llama(num_layers=4)
    change(model)
    lengths = [17, 17] if attention == "sdpa" else [17, 9]  # which keeps its padding to itself
    ids, mask = random_ids(2, 17), left_padded(17, lengths)
    expected = uncached(model, ids, mask)
    model.set_attn_implementation(attention)
    cache = PagedCache.from_model(model, page_size=16)
    actual = generate(model, attention, cache, ids, attention_mask=mask, max_new_tokens=10)
    assert torch.equal(actual, expected)
    assert cache.get_seq_length() == 26
    cache.pool.check_integrity()


@pytest.mark.parametrize("left_out", [0, 1], ids=["with a window", "without a window"])
def test_a_layer_of_either_group_may_be_left_out(left_out):
    model = tiny_gemma(24)
    bypass(model.model.layers[left_out])
    ids = random_ids(2, 30)
    expected = uncached(model, ids, torch.ones_like(ids))
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    assert torch.equal(generate(model, "paged_flex", cache, ids, max_new_tokens=10), expected)
    assert cache.gather(left_out) == (None, None)


def test_what_holds_nothing_goes_on_holding_nothing_in_forks_and_after_beams():
    model = tiny_llama(num_layers=4)
    two_bypassed(model)
    ids = random_ids(1, 20)
    model.set_attn_implementation("sdpa")
    settings = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, use_cache=False, **settings)
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    run(model, cache, ids[:, :-1], [19])
    fork = cache.fork()
    assert torch.equal(model.generate(ids, past_key_values=cache, **settings), expected)
    assert torch.equal(model.generate(ids, past_key_values=fork, **settings), expected)
    assert fork.gather(2) == (None, None)


@pytest.mark.parametrize("attention", ["paged_flex", "sdpa"])
def test_a_cache_made_for_a_deeper_model_is_right_or_refuses(attention):
    small, deep = tiny_llama(num_layers=2), tiny_llama(num_layers=3)
    ids = random_ids(1, 20)
    expected = uncached(small, ids, None)
    small.set_attn_implementation(attention)
    cache = PagedCache(deep.config, page_size=16)
    if attention == "paged_flex":  # whose mask function is told how many layers there are
        assert torch.equal(generate(small, attention, cache, ids, max_new_tokens=10), expected)
        return
    for _ in range(2):
        with pytest.raises(UnclearPassError, match=r"through layer 1 and no further, .* a model with 3 layers"):
            generate(small, attention, cache, ids, max_new_tokens=10)
    cache.roll_back()
    assert cache.get_seq_length() == 0
    cache.pool.check_integrity()


@pytest.mark.parametrize("attention", ["paged_flex", "sdpa"])
@pytest.mark.parametrize("num_tokens", [1, 16, 17])
def test_a_cache_made_for_a_shallower_model_is_refused_and_holds_nothing(attention, num_tokens):
    small, deep = tiny_llama(num_layers=2), tiny_llama(num_layers=3)
    deep.set_attn_implementation(attention)
    cache = PagedCache(small.config, page_size=16)
    with pytest.raises(ValueError, match=r"made for a model of 2 layers. Make a PagedCache for this model"):
        run(deep, cache, random_ids(1, num_tokens), [num_tokens])
    assert cache.pool.stats().num_active_pages == 0
    small.set_attn_implementation(attention)
    run(small, cache, random_ids(1, num_tokens), [num_tokens])
    assert cache.lengths == [num_tokens]


def test_an_encoder_with_another_number_of_layers_is_not_counted():
    sizes = {"vocab_size": 200, "d_model": 48, "decoder_layers": 3, "decoder_attention_heads": 3, "init_std": 0.3}
    sizes |= {"decoder_ffn_dim": 64, "encoder_ffn_dim": 64, "encoder_attention_heads": 3, "pad_token_id": 0}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    for model_class, config in ((BartForCausalLM, BartConfig), (WhisperForCausalLM, WhisperConfig)):
        for encoder_layers in (1, 2, 4):
            torch.manual_seed(0)
            model = model_class(config(**sizes, encoder_layers=encoder_layers)).eval()
            ids = random_ids(1, 20)
            expected = uncached(model, ids, None)
            cache = PagedCache.from_model(model, page_size=16)
            assert torch.equal(generate(model, "paged_flex", cache, ids, max_new_tokens=10), expected)


@pytest.mark.parametrize("change", [first_bypassed, middle_ablated, two_bypassed], ids=lambda change: change.__name__)
def test_layers_left_out_from_some_pass_on_are_refused(change):
    model = tiny_llama(num_layers=4)
    ids = random_ids(1, 24)
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    run(model, cache, ids[:, :20], [20])
    change(model)
    run(model, cache, ids[:, 20:21], [1])
    with pytest.raises(UnclearPassError, match=r"left out layers \[.*\], which hold the tokens before it"):
        run(model, cache, ids[:, 21:22], [1])
    with pytest.raises(UnclearPassError, match=r"Call cache.roll_back\(\) to forget that pass"):
        cache.crop(0)
    cache.roll_back()
    assert cache.lengths == [20]
    cache.pool.check_integrity()


def test_layers_that_come_back_are_refused_until_the_cache_is_reset():
    model = tiny_llama(num_layers=4)
    ids = random_ids(1, 24)
    expected = uncached(model, ids, None)
    bypass(model.model.layers[1])
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    run(model, cache, ids[:, :20], [20])
    del model.model.layers[1].forward
    with pytest.raises(ValueError, match="Layer 1 was given new tokens, but it holds none of those that are cached"):
        run(model, cache, ids[:, 20:], [4])
    assert cache.lengths == [20]
    cache.reset()
    assert torch.equal(generate(model, "paged_flex", cache, ids, max_new_tokens=10), expected)


def test_the_last_layer_bypassed_is_refused_also_where_drafts_are_taken_back():
    model = tiny_llama(num_layers=3)
    bypass(model.model.layers[2])
    model.set_attn_implementation("paged_flex")
    ids = random_ids(1, 10).repeat(1, 3)
    for arguments in ({}, {"prompt_lookup_num_tokens": 3}):
        cache = PagedCache.from_model(model, page_size=16)
        with pytest.raises(UnclearPassError, match="through layer 1 and no further"):
            generate(model, "paged_flex", cache, ids, max_new_tokens=10, **arguments)


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, torch.cuda.OutOfMemoryError])
@pytest.mark.parametrize("layer", [1, 2])
def test_a_pass_that_failed_is_not_taken_for_a_shorter_model(failure, layer):
    model = tiny_llama(num_layers=3)
    ids = random_ids(1, 40)
    expected = uncached(model, ids, None)
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    run(model, cache, ids[:, :17], [17])

    def fail(*arguments):
        raise failure("injected")

    hook = model.model.layers[layer].register_forward_pre_hook(fail)
    with pytest.raises(failure, match="injected"):
        run(model, cache, ids[:, 17:], [23])
    hook.remove()
    for use in (lambda: generate(model, "paged_flex", cache, ids), cache.fork, lambda: cache.crop(-1)):
        with pytest.raises(UnclearPassError, match=rf"through layer {layer - 1} .*call cache.roll_back\(\)"):
            use()
    assert cache.lengths == [17]
    cache.roll_back()
    assert torch.equal(generate(model, "paged_flex", cache, ids, max_new_tokens=10), expected)


@pytest.mark.parametrize("num_new", [1, 5])
@pytest.mark.parametrize("num_rows", [1, 2])
def test_a_pass_given_up_before_its_first_layer_leaves_nothing_to_one_of_another_attention(num_rows, num_new):
    model, ids = tiny_llama(), random_ids(num_rows, 32)
    split = 32 - num_new
    # A mask in four dimensions is taken as it is: the cache is not asked for the sizes of one.
    hidden = torch.zeros(num_rows, 1, num_new, 32).masked_fill(torch.arange(32) < 5, torch.finfo(torch.float32).min)
    hidden = hidden.masked_fill(torch.arange(32) > split + torch.arange(num_new)[:, None], hidden.min())
    inputs = {"attention_mask": hidden, "position_ids": torch.arange(split, 32)[None]}
    expected = DynamicCache(config=model.config)
    model.set_attn_implementation("sdpa")
    run(model, expected, ids[:, :split], [split])
    with torch.no_grad():
        logits = model(ids[:, split:], past_key_values=expected, **inputs).logits
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16, num_pages=2 * num_rows)  # as many slots as columns
    run(model, cache, ids[:, :split], [split])

    def fail(*args):
        raise KeyError

    hook = model.model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        run(model, cache, ids[:, split:], [num_new])
    hook.remove()
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        torch.testing.assert_close(model(ids[:, split:], past_key_values=cache, **inputs).logits, logits, **FP32)


def test_a_pass_that_ran_out_of_pages_needs_no_roll_back():
    model = tiny_llama()
    model.set_attn_implementation("paged_flex")
    pool = PagePool(model.config, num_pages=3, page_size=16)
    cache, other = PagedCache(pool=pool), PagedCache(pool=pool)
    ids = random_ids(2, 40)
    run(model, other, ids[:1, :20], [20])
    with pytest.raises(OutOfPagesError):  # which rows of equal length say in the first layer
        run(model, cache, ids, [40])
    other.reset()
    run(model, cache, ids[:1], [40])
    assert cache.lengths == [40]


def test_layers_cut_off_after_the_cache_was_made_are_refused_if_nothing_counts_them():
    model = tiny_model(LlamaForCausalLM, LlamaConfig, num_hidden_layers=4)
    model.set_attn_implementation("sdpa")
    cache = PagedCache.from_model(model, page_size=16)
    cut_off(model)
    with pytest.raises(UnclearPassError, match=r"make its cache by PagedCache.from_model\(model\) after its layers"):
        generate(model, "sdpa", cache, random_ids(1, 20))
    cache = PagedCache.from_model(model, page_size=16)
    expected = uncached(model, random_ids(1, 20), None)
    assert torch.equal(generate(model, "sdpa", cache, random_ids(1, 20), max_new_tokens=10), expected)


@pytest.mark.parametrize("order", [[2, 0, 1, 3], [3, 2, 1, 0], [1, 3, 0, 2]], ids=str)
def test_layers_may_be_called_in_any_order(order):
    model = tiny_llama(num_layers=4)
    model.model.layers = torch.nn.ModuleList(model.model.layers[index] for index in order)
    ids, mask = random_ids(2, 17), left_padded(17, [17, 9])
    expected = uncached(model, ids, mask)
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    assert torch.equal(generate(model, "paged_flex", cache, ids, attention_mask=mask, max_new_tokens=10), expected)
    assert cache.get_seq_length() == 26
    assert all(cache.gather(layer)[0] is not None for layer in range(4))


def test_a_layer_that_was_passed_over_may_be_read_before_a_crop():
    model = tiny_llama(num_layers=2)
    model.model.layers[0].forward = lambda hidden_states, *args, **kwargs: hidden_states
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    with torch.no_grad():
        model(random_ids(2, 20), past_key_values=cache)
        assert [keys is None for keys, _, _ in cache] == [True, False]
        cache.crop(-5)
    assert cache.lengths == [15, 15]
    assert cache.gather(1)[0].shape[2] == 15


def test_a_layer_that_no_cache_has_leaves_an_empty_cache_as_it_was():
    model = tiny_llama(num_layers=2)
    ids = random_ids(1, 20)
    expected = plain(model, ids, [20])
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    states = torch.zeros(1, 2, 3, 16)
    with pytest.raises(ValueError, match="Layer 5 was given to a PagedCache that was made for a model of 2 layers"):
        cache.update(states, states, 5)
    torch.testing.assert_close(run(model, cache, ids, [20]), expected, atol=2e-4, rtol=1e-4)
