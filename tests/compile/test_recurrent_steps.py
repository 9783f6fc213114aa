"""Compiled steps of models with recurrent layers: one graph, which reads and writes the states in two places."""

import gc

import pytest
import torch

from hf_paged import PagedCache, PagePool
from hf_paged.compile import api
from hf_paged.compile.api import compiled
from hf_paged.errors import UnclearPassError
from tests.cache.test_recurrent import (
    CHOSEN,
    are_equal,
    logits_of,
    model_of,
    plain_tokens,
    states_of,
    tokens_of,
)
from tests.models import left_padded
from tests.sweep.subjects import words


@pytest.mark.parametrize("name", CHOSEN)
def test_all_batches_have_the_tokens_of_dynamic_cache_and_few_graphs(name, graphs):
    model = model_of(name)
    with compiled(model):
        for lengths in ([19, 7, 1], [9, 9], [12, 3, 8, 12], [17]):
            width = max(lengths)
            mask = left_padded(width, lengths)
            ids = words(len(lengths), width, seed=width) * mask
            cache = PagedCache.from_model(model, page_size=16)
            assert torch.equal(tokens_of(model, cache, ids, mask), plain_tokens(name, ids, mask))
            cache.pool.check_integrity()
    assert len(graphs) <= 3, "for three rows, for any number, and for one"


@torch.no_grad()
@pytest.mark.parametrize("name", ["FalconH1ForCausalLM", "Qwen3NextForCausalLM"])
def test_a_model_that_is_compiled_by_hand_knows_where_it_is_without_positions(name):
    torch._dynamo.reset()
    model, ids = model_of(name), words(2, 13)
    forward = torch.compile(model.forward, backend="eager")
    caches = [PagedCache.from_model(model, page_size=16) for _ in range(2)]
    for begin, end in ((0, 9), (9, 10), (10, 11), (11, 12), (12, 13)):
        expected, found = (
            run(ids[:, begin:end], past_key_values=cache).logits
            for run, cache in zip((model, forward), caches, strict=True)
        )
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["Qwen3NextForCausalLM", "Lfm2ForCausalLM"])
def test_rows_are_forked_and_chosen_between_compiled_steps(name, graphs):
    model = model_of(name)
    with compiled(model):
        cache = PagedCache.from_model(model, page_size=16)
        text = tokens_of(model, cache, words(2, 17), new=6)
        fork = cache.fork()
        assert torch.equal(tokens_of(model, cache, text, new=8), plain_tokens(name, text, new=8))
        fork.reorder_cache(torch.tensor([1, 0]))
        fork.batch_repeat_interleave(2)
        chosen = text[[1, 1, 0, 0]]
        assert torch.equal(tokens_of(model, fork, chosen, new=7), plain_tokens(name, chosen, new=7))
        beams = {"num_beams": 3, "new": 6}
        cache = PagedCache.from_model(model, page_size=16)
        assert torch.equal(tokens_of(model, cache, text, **beams), plain_tokens(name, text, **beams))


@pytest.mark.parametrize("name", ["Qwen3NextForCausalLM", "Lfm2ForCausalLM"])
def test_a_compiled_step_that_fails_leaves_states_as_they_were(name, monkeypatch):
    torch._dynamo.reset()
    fails = False

    class Failure(Exception):
        pass

    def run_and_fail(graph, *arguments):
        def run(*inputs):
            outputs = graph(*inputs)
            if fails:
                raise Failure
            return outputs

        return run

    monkeypatch.setattr(api, "compile_graph", run_and_fail)
    model, ids = model_of(name), words(2, 17)
    expected = plain_tokens(name, ids, new=10)
    cache = PagedCache.from_model(model, page_size=16)
    with compiled(model):
        tokens_of(model, cache, ids, new=4)
        fork, fails = cache.fork(), True
        logits_of(model, fork, expected[:, 20:21])  # which generate() computes uncompiled, first
        with pytest.raises(Failure):
            tokens_of(model, cache, expected[:, :21], new=4)
        with pytest.raises(UnclearPassError):
            logits_of(model, cache, words(2, 1))
        cache.roll_back()
        assert cache.lengths == [21, 21]
        assert are_equal(states_of(cache), states_of(fork))
        fails = False
        assert torch.equal(tokens_of(model, cache, expected[:, :22], new=5), expected)


def test_a_cache_of_which_a_step_was_traced_gives_its_pages_back(graphs):
    model = model_of("Lfm2ForCausalLM")
    pool = PagePool.from_model(model, page_size=16)
    gc.disable()
    try:
        with compiled(model):
            tokens_of(model, PagedCache(pool=pool), words(2, 17), new=4)
        assert len(graphs) == 1
        assert (pool.stats().num_active_pages, pool.stats().state_bytes) == (0, 0)
    finally:
        gc.enable()


def test_what_is_recorded_for_crop_is_no_compiled_step_s(graphs):
    model = model_of("Lfm2ForCausalLM")
    ids = words(1, 6).repeat(1, 4)
    cache = PagedCache.from_model(model, page_size=16)
    with compiled(model):
        found = tokens_of(model, cache, ids, prompt_lookup_num_tokens=3)
        assert torch.equal(found, plain_tokens("Lfm2ForCausalLM", ids))
        assert not cache.is_compileable
        assert not graphs
