"""Decoding steps recorded as CUDA graphs: the same tokens, whatever changes between two steps."""

import pytest
import torch
from transformers import DynamicCache

from hf_paged import PagedCache, ReleaseFinished, cuda_graphs
from hf_paged.compilation import compiled
from tests.families import FAMILIES
from tests.models import generate, left_padded, random_ids, tiny_llama

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """How often a step was recorded, and how often it was repeated."""
    torch._dynamo.reset()
    counts = {"record": 0, "repeat": 0}

    def count(name):
        original = getattr(cuda_graphs._Recording, name)

        def counting(*arguments):
            counts[name] += 1
            return original(*arguments)

        monkeypatch.setattr(cuda_graphs._Recording, name, counting)

    count("record")
    count("repeat")
    return counts


def plain_tokens(model, ids, **arguments):
    return generate(model, "sdpa", DynamicCache(config=model.config), ids, **arguments)


def compiled_tokens(model, ids, page_size=16, **arguments):
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=page_size)
    with compiled(model):
        tokens = generate(model, "paged_flex", cache, ids, **arguments)
    cache.pool.check_integrity()
    return tokens


@pytest.mark.parametrize("num_rows", [1, 3])
def test_steps_are_repeated_and_recorded_anew_when_the_pool_has_grown(calls, num_rows):
    model, ids = tiny_llama().cuda(), random_ids(num_rows, 20).cuda()
    mask = left_padded(20, [20, 7, 13][:num_rows]).cuda()
    settings = {"attention_mask": mask, "max_new_tokens": 400}
    expected = plain_tokens(model, ids, **settings)
    assert torch.equal(compiled_tokens(model, ids, **settings), expected)
    assert calls["record"] > 1
    assert calls["repeat"] > 399 - 3 * calls["record"] - 10


def test_batches_of_several_sizes():
    model = tiny_llama().cuda()
    for num_rows in (1, 3, 4, 2, 5, 1):
        ids = random_ids(num_rows, 30).cuda()
        mask = left_padded(30, [30, 2, 17, 16, 5][:num_rows]).cuda()
        expected = plain_tokens(model, ids, attention_mask=mask)
        assert torch.equal(compiled_tokens(model, ids, attention_mask=mask), expected)


@pytest.mark.parametrize("name", ["Mistral", "Gemma 2", "GPT-OSS", "Qwen3"])
def test_windows_softcap_and_sinks(calls, name):
    (family,) = (family for family in FAMILIES if family.name == name)
    model, ids = family.load(family.oracle).cuda(), random_ids(3, 40).cuda()
    mask = left_padded(40, [40, 13, 31]).cuda()
    settings = {"attention_mask": mask, "max_new_tokens": 60}
    expected = generate(model, family.oracle, DynamicCache(config=model.config), ids, **settings)
    assert torch.equal(compiled_tokens(model, ids, **settings), expected)
    assert calls["repeat"] > 30


def test_released_rows():
    model, ids = tiny_llama().cuda(), random_ids(2, 40).cuda()
    end = int(plain_tokens(model, ids)[0, 45])
    expected = plain_tokens(model, ids, eos_token_id=end)
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    with compiled(model):
        finished = [ReleaseFinished(cache, end)]
        actual = generate(model, "paged_flex", cache, ids, eos_token_id=end, stopping_criteria=finished)
    assert torch.equal(actual, expected)


def test_caches_that_take_turns_keep_apart(calls):
    model = tiny_llama().cuda()
    prompts = [random_ids(1, length, seed=length).cuda() for length in (20, 33)]
    expected = [plain_tokens(model, ids, max_new_tokens=64) for ids in prompts]
    model.set_attn_implementation("paged_flex")
    caches = [PagedCache.from_model(model, page_size=16) for _ in prompts]
    actual = list(prompts)
    with compiled(model):
        for _ in range(8):
            for turn, cache in enumerate(caches):
                actual[turn] = generate(model, "paged_flex", cache, actual[turn], max_new_tokens=8)
    assert all(map(torch.equal, actual, expected))
    assert calls["repeat"] > 60


def test_weights_that_change_in_place_are_read():
    model, ids = tiny_llama().cuda(), random_ids(1, 20).cuda()
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    with compiled(model):
        first = generate(model, "paged_flex", cache, ids)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).cuda(), alpha=0.1)
        cache.reset()
        second = generate(model, "paged_flex", cache, ids)
    assert not torch.equal(first, second)
    assert torch.equal(second, plain_tokens(model, ids))


def test_what_cannot_be_recorded_runs_without(monkeypatch, caplog):
    def fail(*arguments):
        raise RuntimeError("no graphs today")

    monkeypatch.setattr(cuda_graphs._Recording, "record", fail)
    model, ids = tiny_llama().cuda(), random_ids(2, 20).cuda()
    expected = plain_tokens(model, ids)
    with caplog.at_level("WARNING"):
        assert torch.equal(compiled_tokens(model, ids), expected)
    assert "no graphs today" in caplog.text
