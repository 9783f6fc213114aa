"""Prompts of models with recurrent layers that begin as earlier ones did: the states behind the beginning are kept."""

import pytest
import torch

import hf_paged
from hf_paged import PagedCache, PagePool
from hf_paged.pages import prefix_index
from tests.cache.test_recurrent import CHOSEN, logits_of, model_of, plain_tokens, tokens_of
from tests.models import left_padded
from tests.sweep.subjects import words

GOING_ON = CHOSEN[:3]


def pool_of(model, **settings):
    return PagePool.from_model(model, page_size=16, prefix_cache=True, **settings)


def found_in(pool):
    return pool.stats().num_hit_tokens


@pytest.mark.parametrize("name", GOING_ON)
def test_a_prompt_goes_on_from_the_end_of_an_earlier_one(name):
    model, beginning = model_of(name), words(1, 40)
    pool = pool_of(model)
    with PagedCache(pool=pool) as cache:
        cache.prefill(model, beginning)
        assert cache.lengths == [39]
        assert torch.equal(tokens_of(model, cache, beginning), plain_tokens(name, beginning))
    assert found_in(pool) == 0
    prompt = torch.cat([beginning, words(1, 30, seed=1)], dim=1)
    cache = PagedCache(pool=pool)
    cache.prefill(model, prompt)
    assert found_in(pool) == 32, "39 tokens, rounded down to a page"
    alone = PagedCache.from_model(model, page_size=16)
    logits_of(model, alone, prompt[:, :-1])
    fork = cache.fork()
    logits = [logits_of(model, each, prompt[:, -1:]) for each in (fork, alone)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(tokens_of(model, cache, prompt), plain_tokens(name, prompt))
    pool.check_integrity()


def test_a_state_is_kept_where_a_prompt_parts_from_an_earlier_one():
    model, beginning = model_of(CHOSEN[1]), words(1, 37)
    pool = pool_of(model)
    for seed, num_found in ((1, 0), (2, 0), (3, 32), (4, 64)):
        prompt = torch.cat([beginning, words(1, 30, seed=seed)], dim=1)
        with PagedCache(pool=pool) as cache:
            cache.prefill(model, prompt)
            assert torch.equal(tokens_of(model, cache, prompt), plain_tokens(CHOSEN[1], prompt))
        assert found_in(pool) == num_found


@pytest.mark.parametrize("name", GOING_ON)
def test_rows_that_begin_alike_are_computed_behind_their_beginning(name):
    model, beginning = model_of(name), words(1, 33)
    rows = [torch.cat([beginning, words(1, n, seed=n)], dim=1)[0] for n in (30, 12, 30)] + [words(1, 20)[0]]
    width = max(map(len, rows))
    mask = left_padded(width, [len(row) for row in rows])
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    expected = plain_tokens(name, ids, mask)
    pool = pool_of(model)
    with PagedCache(pool=pool) as cache:
        cache.prefill(model, beginning)
    for way in ({}, {"custom_generate": hf_paged.sample}):
        before = found_in(pool)
        with PagedCache(pool=pool) as cache:
            if not way:
                cache.prefill(model, ids, mask)
            assert torch.equal(tokens_of(model, cache, ids, mask, **way), expected)
            assert found_in(pool) - before == (64 if not way else 48 + 32 + 16)
            pool.check_integrity()


def test_states_are_kept_as_long_as_their_pages_and_few_of_them(monkeypatch):
    model = model_of(CHOSEN[0])
    pool = pool_of(model, num_pages=8)
    cache = PagedCache(pool=pool)
    sizes = []
    for seed in range(3):
        cache.prefill(model, words(1, 40, seed=seed))
        cache.reset()
        sizes.append(pool.stats().state_bytes)
    assert sizes == [sizes[0], 2 * sizes[0], 3 * sizes[0]]
    cache.prefill(model, words(1, 100, seed=9))  # takes the pages of those
    cache.reset()
    assert pool.stats().state_bytes <= 2 * sizes[0]
    pool.forget_prefixes()
    assert pool.stats().state_bytes == 0
    monkeypatch.setattr(prefix_index, "_MAX_STATES", 1)
    for seed in range(2):
        cache.prefill(model, words(1, 40, seed=seed))
        cache.reset()
    assert pool.stats().state_bytes == sizes[0]
    pool.check_integrity()


def test_many_prompts_find_what_those_before_them_have_left():
    model, beginning = model_of(CHOSEN[0]), words(1, 33)[0].tolist()
    prompts = [beginning + words(1, length, seed=length)[0].tolist() for length in (9, 17, 1)]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = [plain_tokens(CHOSEN[0], torch.tensor([ids]), new=6)[0, len(ids) :].tolist() for ids in prompts]
    pool = pool_of(model, num_pages=12)
    for _ in range(2):
        answers = hf_paged.generate_many(model, prompts, pool=pool, max_rows=2, **settings)
        assert [result.tokens for result in answers.in_order()] == expected
    assert found_in(pool) >= 3 * 32
    pool.check_integrity()


def test_a_chunk_ends_where_states_are_kept():
    model, prompt = model_of(CHOSEN[1]), words(1, 60)
    pool = pool_of(model)
    cache = PagedCache(pool=pool)
    cache.prefill(model, prompt, max_tokens=20)
    cache.reset()
    other = torch.cat([prompt[:, :35], words(1, 9, seed=3)], dim=1)
    cache.prefill(model, other)
    assert found_in(pool) == 32
    assert torch.equal(tokens_of(model, cache, other), plain_tokens(CHOSEN[1], other))


def test_of_a_model_that_begins_anew_nothing_is_found(caplog):
    model, prompt = model_of(CHOSEN[3]), words(2, 40)
    pool = pool_of(model)
    for _ in range(2):
        with PagedCache(pool=pool) as cache:
            cache.prefill(model, prompt)
            assert torch.equal(tokens_of(model, cache, prompt), plain_tokens(CHOSEN[3], prompt))
    assert found_in(pool) == 0
    assert "its recurrent layers begin anew where several tokens come behind others" in caplog.text


def test_a_prompt_that_ends_in_padding_is_computed_by_generate_alone():
    """A token that comes alone goes into the state, hidden or not."""
    name = CHOSEN[1]
    model, ids, mask = model_of(name), words(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[0, -1] = 0
    pool = pool_of(model)
    with PagedCache(pool=pool) as cache:
        tokens = tokens_of(model, cache, ids, mask, custom_generate=hf_paged.sample)
    assert torch.equal(tokens, plain_tokens(name, ids, mask))
    for cache in (PagedCache(pool=pool), PagedCache.from_model(model, page_size=16)):
        with pytest.raises(ValueError, match="last column is 0 in some row"):
            cache.prefill(model, ids, mask)
        assert cache.get_seq_length() == 0
