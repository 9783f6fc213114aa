"""All pages in one list, as kernels on a GPU want them, tried on a CPU."""

import pytest
import torch
from transformers import DynamicCache

from hf_paged import PagedCache
from hf_paged.attention import dispatch
from hf_paged.attention.backends import flex as kernel
from tests.families import FAMILIES, new_cache
from tests.models import generate, left_padded, paged_cache, random_ids, run, tiny_llama


@pytest.fixture(autouse=True)
def one_list(monkeypatch):
    monkeypatch.setattr(dispatch, "choose_backend", lambda *_: dispatch.Backend.FLEX)
    monkeypatch.setattr(kernel, "lists_full_pages", lambda device: False)


@pytest.mark.parametrize("name", ["Gemma 2", "GPT-OSS", "Llama 4"])
def test_prompts_single_tokens_and_continued_prompts(name):
    (family,) = (family for family in FAMILIES if family.name == name)
    model, ids, splits = family.load(family.oracle), random_ids(3, 100), [40] + [1] * 20 + [40]
    mask = left_padded(100, [100, 71, 90])
    expected = run(model, DynamicCache(config=model.config), ids, splits, mask)
    cache = paged_cache(model)
    logits = run(model, cache, ids, splits, mask)
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)
    cache.pool.check_integrity()


@pytest.mark.parametrize("num_rows", [1, 3])
def test_batches_that_are_no_power_of_two(num_rows):
    model, ids = tiny_llama(), random_ids(num_rows, 20)
    expected = generate(model, "sdpa", DynamicCache(config=model.config), ids)
    assert torch.equal(generate(model, "paged_flex", PagedCache.from_model(model, page_size=16), ids), expected)


@pytest.mark.parametrize("name", ["GPT-OSS", "DeepSeek-V3"])
def test_packed_prompts(name):
    (family,) = (family for family in FAMILIES if family.name == name)
    oracle, model = family.load(family.oracle), family.load("paged_flex")
    ids, mask = random_ids(3, 70), left_padded(70, [70, 3, 40])
    expected = generate(oracle, family.oracle, new_cache(oracle), ids, attention_mask=mask)
    cache = paged_cache(model)
    cache.prefill(model, ids, mask, max_tokens=50)
    assert torch.equal(generate(model, "paged_flex", cache, ids, attention_mask=mask), expected)
