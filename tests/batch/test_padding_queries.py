"""What padding is given is what DynamicCache gives it, in every pass: `generate()` may go on from it."""

import pytest
import torch
from transformers import DynamicCache

from hf_paged import PagedCache
from tests.models import generate, plain, random_ids, run, tiny_gemma, tiny_llama

FP32 = {"atol": 2e-4, "rtol": 1e-4}


def llama():
    return tiny_llama()


def gemma():
    return tiny_gemma(8)


MODELS = pytest.mark.parametrize("make", [llama, gemma], ids=lambda make: make.__name__)


def right_padded(num_columns, lengths):
    return (torch.arange(num_columns) < torch.tensor(lengths)[:, None]).long()


@MODELS
@pytest.mark.parametrize("lengths", [[20, 17, 16], [20, 15, 1], [20, 4, 18]], ids=str)
@pytest.mark.parametrize("splits", [[20], [7, 7, 6], [10] + [1] * 10], ids=str)
def test_logits_of_right_padding_are_those_of_a_contiguous_cache(make, lengths, splits):
    model = make()
    ids, mask = random_ids(3, 20), right_padded(20, lengths)
    expected = plain(model, ids, splits, mask)
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    torch.testing.assert_close(run(model, cache, ids, splits, mask), expected, **FP32)
    assert cache.lengths == lengths


@MODELS
def test_a_second_turn_with_right_padding_generates_the_same(make):
    model = make()
    ids = random_ids(3, 32)
    mask = torch.cat([torch.ones(3, 16, dtype=torch.long), right_padded(16, [16, 3, 1])], dim=1)
    results = []
    for attention, new in (("sdpa", DynamicCache), ("paged_flex", lambda config: PagedCache(config, page_size=16))):
        model.set_attn_implementation(attention)
        cache = new(config=model.config)
        run(model, cache, ids[:, :16], [16])
        results.append(generate(model, attention, cache, ids, attention_mask=mask, max_new_tokens=6))
    assert torch.equal(*results)


@MODELS
@pytest.mark.parametrize("chunk", [3, 16])
def test_chunks_of_a_right_padded_prompt_generate_the_same(make, chunk):
    model = make()
    ids, mask = random_ids(3, 20), right_padded(20, [20, 11, 2])
    settings = {"attention_mask": mask, "max_new_tokens": 6, "prefill_chunk_size": chunk}
    expected = generate(model, "sdpa", DynamicCache(config=model.config), ids, **settings)
    cache = PagedCache.from_model(model, page_size=16)
    assert torch.equal(generate(model, "paged_flex", cache, ids, **settings), expected)


def test_prefill_leaves_the_padding_at_the_end_to_generate():
    model = tiny_llama()
    ids, mask = random_ids(3, 20), right_padded(20, [20, 11, 2])
    expected = generate(model, "sdpa", DynamicCache(config=model.config), ids, attention_mask=mask, max_new_tokens=6)
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    cache.prefill(model, ids, mask)
    tokens = generate(model, "paged_flex", cache, ids, attention_mask=mask, max_new_tokens=6)
    assert torch.equal(tokens, expected)


@MODELS
def test_padding_that_sees_nothing_is_given_nothing(make):
    model = make()
    ids = random_ids(2, 40)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 2:] = 0  # what the second row holds has left a window of 8 long before the end
    expected = plain(model, ids, [16] + [1] * 24, mask)
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    actual = run(model, cache, ids, [16] + [1] * 24, mask)
    assert actual.isfinite().all()
    torch.testing.assert_close(actual, expected, **FP32)
