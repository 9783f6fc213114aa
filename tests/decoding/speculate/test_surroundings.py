"""Drafts work where decoding does: without a compiler, compiled, enabled, with a prefix cache, behind embeddings."""

import copy

import pytest
import torch

import hf_paged
from hf_paged import PagedCache, PagePool, assisted, compiled, prompt_lookup
from hf_paged.attention import dispatch
from hf_paged.compile import api
from tests.decoding.speculate.drafting import assert_as_without_drafts, decode, draft_whatever_there_is, oracle
from tests.models import left_padded, paged_cache, random_ids, tiny_gemma, tiny_llama

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 24}
MODELS = {"causal": tiny_llama, "windows": lambda: tiny_gemma(window=20)}


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", MODELS)
def test_without_a_compiler_rows_are_copied(family, padding, monkeypatch):
    monkeypatch.setattr(dispatch, "can_compile", lambda device: False)
    mask = left_padded(30, [30, 17, 5])
    mask = mask if padding == "left" else mask.flip(1)
    assert_as_without_drafts(MODELS[family](), oracle, random_ids(3, 30), mask, eos_token_id=list(range(3, 9)))


def test_a_compiled_model_has_few_graphs(monkeypatch):
    graphs = []
    monkeypatch.setattr(api, "compile_graph", lambda graph, *arguments: graphs.append(graph) or graph)
    model = tiny_llama()
    model.set_attn_implementation("paged_flex")
    ids, mask = random_ids(3, 30), left_padded(30, [30, 17, 5])
    settings = {"attention_mask": mask, "past_key_values": paged_cache(model)} | GREEDY
    expected = model.generate(ids, **settings)
    for seed in range(3):
        with compiled(model), paged_cache(model) as kv_cache:
            loop = oracle(expected, seed, num_tokens=11)
            said = model.generate(ids, **settings | {"past_key_values": kv_cache}, custom_generate=loop)
            assert torch.equal(said, expected)
    assert 2 <= len(graphs) <= 3


def test_an_enabled_model_gives_the_cache():
    model, ids = tiny_llama(), random_ids(3, 30)
    expected, _, _ = decode(model, hf_paged.sample, ids, max_new_tokens=24)
    with hf_paged.enable(model):
        assert torch.equal(model.generate(ids, custom_generate=oracle(expected), **GREEDY), expected)


def test_what_was_drafted_is_found_by_its_prefix():
    model, ids = tiny_llama(), random_ids(2, 30)
    model.set_attn_implementation("paged_flex")
    pool = PagePool.from_model(model, 64, 16, prefix_cache=True)
    expected, _, _ = decode(model, hf_paged.sample, ids, max_new_tokens=24)
    with PagedCache(pool=pool) as kv_cache:
        said = model.generate(ids, past_key_values=kv_cache, custom_generate=oracle(expected), **GREEDY)
    assert torch.equal(said, expected)
    longer = torch.cat([said, random_ids(2, 3, seed=1)], dim=1)
    expected, _, _ = decode(model, hf_paged.sample, longer, max_new_tokens=24)
    with PagedCache(pool=pool) as kv_cache:
        assert torch.equal(
            model.generate(longer, past_key_values=kv_cache, custom_generate=oracle(expected), **GREEDY), expected
        )
        # 53 tokens of each row were there, 48 of them in full pages.
        assert pool.stats().num_hit_tokens >= 2 * 48
    pool.check_integrity()


def test_rows_that_are_samples_of_one_prompt_part(monkeypatch):
    draft_whatever_there_is(monkeypatch)
    model, ids = tiny_llama(), random_ids(1, 20)
    torch.manual_seed(0)
    settings = {"do_sample": True, "num_return_sequences": 4, "max_new_tokens": 60, "top_k": 3, "temperature": 0.5}
    said, kv_cache, _ = decode(model, prompt_lookup(max_ngram=1), ids, **settings)
    assert len({tuple(row) for row in said.tolist()}) > 1
    assert kv_cache.lengths == [79] * 4
    # The cache holds what it would hold had it been told.
    held = paged_cache(model)
    with torch.no_grad():
        model(said[:, :-1], past_key_values=held)
    for one, other in zip(held, kv_cache, strict=True):
        torch.testing.assert_close(other[0], one[0], rtol=1e-3, atol=1e-3)


def test_a_prompt_may_be_embeddings():
    model, ids = tiny_llama(), random_ids(2, 20)
    expected, _, _ = decode(model, hf_paged.sample, ids, max_new_tokens=24)
    embedded = model.get_input_embeddings()(ids)
    for loop in (oracle(expected[:, 20:]), prompt_lookup()):
        said = model.generate(
            inputs_embeds=embedded, past_key_values=paged_cache(model), custom_generate=loop, **GREEDY
        )
        assert torch.equal(said, expected[:, 20:])
    draft = copy.deepcopy(model)
    with pytest.raises(ValueError, match="prompt of embeddings"):
        model.generate(
            inputs_embeds=embedded, past_key_values=paged_cache(model), custom_generate=assisted(draft), **GREEDY
        )


def test_ids_may_be_those_that_are_not_cached_alone():
    model, ids = tiny_llama(), random_ids(2, 20)
    expected, _, _ = decode(model, hf_paged.sample, ids, max_new_tokens=24)
    kv_cache = paged_cache(model)
    with torch.no_grad():
        model(ids[:, :12], past_key_values=kv_cache)
    said = model.generate(
        ids[:, 12:],
        attention_mask=torch.ones_like(ids),
        past_key_values=kv_cache,
        custom_generate=oracle(expected[:, 12:]),
        **GREEDY,
    )
    assert torch.equal(said, expected[:, 12:])
    assert kv_cache.lengths == [43, 43]
