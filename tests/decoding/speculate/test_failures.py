"""What can't be done with drafts is refused, and what fails leaves the cache as it was."""

import copy
from functools import wraps

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor

import hf_paged
from hf_paged import OutOfPagesError, PagedCache, UnclearPassError, assisted, prompt_lookup
from tests.cache.test_generate_modes import MODELS
from tests.decoding.speculate.drafting import decode, draft_whatever_there_is, oracle
from tests.models import paged_cache, plain_tokens, random_ids, tiny_gemma, tiny_llama

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 40}


def test_a_full_pool_is_drafted_for_as_long_as_there_is_room():
    ids = random_ids(2, 20)
    model = tiny_llama()
    expected, _, _ = decode(model, hf_paged.sample, ids, max_new_tokens=28)
    # 47 tokens of each row are stored, in 3 pages: one more would take a fourth.
    actual, kv_cache, _ = decode(model, oracle(expected, share_wrong=0.1), ids, max_new_tokens=28, num_pages=6)
    assert torch.equal(actual, expected)
    assert kv_cache.lengths == [47, 47]


@pytest.mark.parametrize("make_model", [tiny_llama, lambda: tiny_gemma(window=20)], ids=["causal", "windows"])
def test_too_few_pages_leave_what_was_accepted(make_model):
    model, ids = make_model(), random_ids(2, 20)
    expected, _, _ = decode(model, hf_paged.sample, ids, max_new_tokens=40)
    kv_cache = paged_cache(model, num_pages=6)
    with pytest.raises(OutOfPagesError, match="more page"):
        model.generate(ids, past_key_values=kv_cache, custom_generate=oracle(expected), **GREEDY)
    kv_cache.pool.check_integrity()
    lengths = kv_cache.lengths
    assert max(lengths) == 48
    for row, length in enumerate(lengths):
        held = kv_cache.gather(0)[0][row]
        assert held[:, -1].any() == (length == max(lengths))


@pytest.mark.parametrize("layer", [0, 1])
def test_a_pass_that_fails_is_forgotten(layer):
    model, ids = tiny_llama(), random_ids(3, 20)
    expected, _, _ = decode(model, hf_paged.sample, ids)
    kv_cache, calls = paged_cache(model), []

    def fail(*args):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("on purpose")

    hook = model.model.layers[layer].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        model.generate(ids, past_key_values=kv_cache, custom_generate=oracle(expected), **GREEDY)
    hook.remove()
    if layer == 0:
        with pytest.raises(UnclearPassError, match="roll_back"):
            kv_cache.fork()
    kv_cache.roll_back()
    kv_cache.pool.check_integrity()
    lengths = kv_cache.lengths
    assert all(20 <= length < 60 for length in lengths)
    kv_cache.crop([20 - length for length in lengths])
    said = model.generate(ids, past_key_values=_cropped(kv_cache), custom_generate=oracle(expected), **GREEDY)
    assert torch.equal(said, expected)


def _cropped(kv_cache):
    kv_cache.crop(-1)
    return kv_cache


class Fails(LogitsProcessor):
    """Fails where the last pass is over, and what was drafted in vain is still to be taken back."""

    def __init__(self, number, error):
        self.number, self.error = number, error

    def __call__(self, input_ids, scores):
        self.number -= 1
        if not self.number:
            raise self.error
        return scores


@pytest.mark.parametrize("make_model", [tiny_llama, lambda: tiny_gemma(window=20)], ids=["causal", "windows"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("on purpose")], ids=["interrupt", "error"])
def test_what_was_drafted_in_vain_is_not_gone_on_from_after_a_failure(make_model, error):
    model, ids = make_model(), random_ids(1, 20)
    expected, _, _ = decode(model, hf_paged.sample, ids)
    kv_cache = paged_cache(model)
    failing = {"custom_generate": oracle(expected, share_wrong=0.5), "logits_processor": [Fails(8, error)]}
    with pytest.raises(type(error)):
        model.generate(ids, past_key_values=kv_cache, **failing, **GREEDY)
    assert 20 < kv_cache.lengths[0] < 40
    other = expected.clone()
    other[0, 22] += 1
    with pytest.raises(ValueError, match=r"has token \d+ in column 22"):
        model.generate(other, past_key_values=kv_cache, **GREEDY)
    found = model.generate(expected, past_key_values=kv_cache, **GREEDY)
    assert torch.equal(found, plain_tokens(model, expected, **GREEDY))


def test_tokens_that_were_returned_are_the_callers_to_change():
    model, ids = tiny_llama(), random_ids(1, 20)
    expected, _, _ = decode(model, hf_paged.sample, ids)
    returned, kv_cache, _ = decode(model, oracle(expected), ids)
    returned[:, 20:] = 3
    with pytest.raises(ValueError, match="has token"):
        model.generate(returned, past_key_values=kv_cache, **GREEDY)
    assert model.generate(expected, past_key_values=kv_cache, **GREEDY).shape == (1, 100)


def test_a_draft_model_that_fails_leaves_the_cache_between_two_passes(monkeypatch):
    draft_whatever_there_is(monkeypatch)
    model, ids = tiny_llama(), random_ids(3, 20)
    model.set_attn_implementation("paged_flex")
    draft, kv_cache = copy.deepcopy(model), paged_cache(model)

    def fail(*args):
        raise RuntimeError("on purpose")

    draft.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        model.generate(ids, past_key_values=kv_cache, custom_generate=assisted(draft), **GREEDY)
    assert kv_cache.lengths == [20] * 3
    kv_cache.pool.check_integrity()


REFUSALS = {
    "beams": ({"num_beams": 2}, "beam search"),
    "scores": ({"return_dict_in_generate": True, "output_scores": True}, "output_scores"),
    "states": ({"return_dict_in_generate": True, "output_hidden_states": True}, "output_hidden_states"),
    "other_cache": ({"past_key_values": DynamicCache()}, "PagedCache"),
    "no_cache": ({"use_cache": False, "past_key_values": None}, "PagedCache"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_is_not_supported_is_refused(arguments, message):
    model = tiny_llama()
    kv_cache = paged_cache(model)
    with pytest.raises(ValueError, match=message):
        model.generate(
            random_ids(2, 20), **({"past_key_values": kv_cache} | GREEDY | arguments), custom_generate=prompt_lookup()
        )
    assert kv_cache.lengths == []


def test_another_attention_is_refused():
    model = tiny_llama()
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="paged_flex"):
        model.generate(
            random_ids(2, 20), past_key_values=PagedCache.from_model(model), custom_generate=prompt_lookup(), **GREEDY
        )


def test_a_model_that_prepares_its_inputs_itself_is_refused():
    model = tiny_llama()
    kv_cache = paged_cache(model)
    own = model.prepare_inputs_for_generation
    model.prepare_inputs_for_generation = wraps(own)(lambda *args, **inputs: own(*args, **inputs))
    with pytest.raises(ValueError, match="in a way of its own"):
        model.generate(random_ids(2, 20), past_key_values=kv_cache, custom_generate=prompt_lookup(), **GREEDY)
    assert kv_cache.lengths == []


def test_draft_models_that_can_not_draft_are_refused():
    model = tiny_llama()
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="can't draft"):
        assisted(model)
    with pytest.raises(ValueError, match="num_tokens=0"):
        prompt_lookup(num_tokens=0)
    with pytest.raises(ValueError, match="max_ngram=0"):
        prompt_lookup(max_ngram=0)
    other = MODELS["llama"][0]()
    other.config.vocab_size += 1
    other.set_attn_implementation("paged_flex")
    kv_cache = paged_cache(model)
    with pytest.raises(ValueError, match="both must have the same"):
        model.generate(random_ids(2, 20), past_key_values=kv_cache, custom_generate=assisted(other), **GREEDY)
