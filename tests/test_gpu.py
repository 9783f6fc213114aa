"""The same on a CUDA device. Where there is none, these say nothing about it."""

import pytest
import torch
from transformers import DynamicCache

from hf_paged import PagedCache, ReleaseFinished
from hf_paged.evaluation.audit import MemoryAudit
from tests.families import FAMILIES
from tests.models import generate, left_padded, plain, random_ids, run, tiny_llama

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("page_size", [16, 128])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_logits_match_those_of_sdpa(page_size, num_rows):
    model, ids = tiny_llama().cuda(), random_ids(num_rows, 200).cuda()
    splits = [100] + [1] * 40 + [60]
    expected = plain(model, ids, splits)
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=page_size)
    torch.testing.assert_close(run(model, cache, ids, splits), expected, atol=1e-2, rtol=1e-2)
    cache.pool.check_integrity()


@pytest.mark.parametrize("disable_compile", [True, False], ids=["eager", "compiled"])
def test_a_ragged_batch_generates_the_same_tokens(disable_compile):
    model, ids = tiny_llama().cuda(), random_ids(4, 40).cuda()
    mask = left_padded(40, [40, 3, 17, 31]).cuda()
    expected = generate(model, "sdpa", DynamicCache(config=model.config), ids, attention_mask=mask)
    cache = PagedCache.from_model(model, page_size=16, num_pages=32)
    actual = generate(model, "paged_flex", cache, ids, attention_mask=mask, disable_compile=disable_compile)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", ["Mistral", "Gemma 2", "GPT-OSS", "Gemma 3n"])
def test_windows_softcap_and_sinks_give_what_they_give_without_pages(name):
    (family,) = (family for family in FAMILIES if family.name == name)
    model, ids, splits = family.load(family.oracle).cuda(), random_ids(3, 100).cuda(), [40] + [1] * 20 + [40]
    mask = left_padded(100, [100, 71, 90]).cuda()
    expected = run(model, DynamicCache(config=model.config), ids, splits, mask)
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    logits = run(model, cache, ids, splits, mask)
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], atol=1e-2, rtol=1e-2)
    cache.pool.check_integrity()


def test_beams_and_released_rows_leave_the_tokens_as_they_are():
    model, ids = tiny_llama().cuda(), random_ids(2, 40).cuda()
    expected = generate(model, "sdpa", DynamicCache(config=model.config), ids, num_beams=3)
    assert torch.equal(generate(model, "paged_flex", PagedCache.from_model(model), ids, num_beams=3), expected)
    expected = generate(model, "sdpa", DynamicCache(config=model.config), ids)
    settings = {"eos_token_id": int(expected[0, 45])}
    expected = generate(model, "sdpa", DynamicCache(config=model.config), ids, **settings)
    cache = PagedCache.from_model(model, page_size=16)
    finished = [ReleaseFinished(cache, settings["eos_token_id"])]
    actual = generate(model, "paged_flex", cache, ids, stopping_criteria=finished, **settings)
    assert torch.equal(actual, expected)
    assert cache.lengths[0] == 0


def test_what_the_accounting_reserves_is_allocated():
    model = tiny_llama().cuda()
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    with MemoryAudit(model, cache) as audit:
        run(model, cache, random_ids(2, 300).cuda(), [100, 200])
    assert audit.summary()["agrees"]
    for step in audit.steps:
        assert step.residence.resident_bytes == step.pool.reserved_bytes
        assert step.process_bytes >= step.pool.reserved_bytes
