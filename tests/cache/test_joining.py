"""Caches of one pool become rows of one batch, and rows of a batch caches, without a token being copied."""

import pytest
import torch
from torch.nn.functional import pad

from hf_paged import PagedCache, PagePool
from hf_paged._transformers import CACHE
from hf_paged.errors import UnclearPassError
from tests.models import left_padded, plain_tokens, random_ids, tiny_gemma, tiny_llama
from tests.reference import forward, random_layers, tiny_config

pytestmark = pytest.mark.usefixtures("quick_collection")
SETTINGS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def models():
    return {"llama": tiny_llama(), "gemma": tiny_gemma(20)}


@pytest.fixture(params=["llama", "gemma"])
def model(request, models):
    models[request.param].set_attn_implementation("paged_flex")
    return models[request.param]


def pool_of(model, **arguments):
    return PagePool.from_model(model, page_size=16, **arguments)


def computed(model, pool, length, seed, **arguments):
    """A cache that holds all but the last token of a prompt, and the prompt."""
    ids = random_ids(1, length, seed)
    cache = PagedCache(pool=pool, **arguments)
    cache.prefill(model, ids)
    return cache, ids


def batch(rows):
    """Left-padded ids and their mask."""
    width = max(ids.shape[1] for ids in rows)
    mask = left_padded(width, [ids.shape[1] for ids in rows])
    return torch.cat([pad(ids, (width - ids.shape[1], 0)) for ids in rows]), mask


def go_on(model, cache, ids, mask=None, num_new=12):
    return model.generate(ids, attention_mask=mask, **{CACHE: cache}, max_new_tokens=num_new, **SETTINGS)


def expected(model, ids, mask=None, num_new=12):
    tokens = plain_tokens(model, ids, attention_mask=mask, max_new_tokens=num_new)
    model.set_attn_implementation("paged_flex")
    return tokens


@pytest.mark.parametrize("lengths", [(1, 2), (16, 17, 18), (40, 7, 33), (33, 33)], ids=str)
def test_caches_of_any_lengths_go_on_as_one_batch(model, lengths):
    pool = pool_of(model)
    caches, rows = zip(*(computed(model, pool, length + 1, seed) for seed, length in enumerate(lengths)), strict=True)
    joined = PagedCache.concatenate(caches)
    ids, mask = batch(rows)
    assert joined.lengths == list(lengths)
    assert pool.stats().num_copied_pages == 0
    assert torch.equal(go_on(model, joined, ids, mask), expected(model, ids, mask))
    pool.check_integrity()
    for cache, row in zip(caches, rows, strict=True):  # which hold what they held
        assert torch.equal(go_on(model, cache, row), expected(model, row))


def test_joined_caches_share_every_page(model):
    pool = pool_of(model)
    caches = [computed(model, pool, length, length)[0] for length in (18, 40)]
    num_held = pool.stats().num_active_pages
    joined = PagedCache.concatenate(caches)
    assert pool.stats().num_active_pages == num_held
    assert joined.stats().num_shared_pages == num_held


def test_forks_that_went_apart_join(model):
    pool = pool_of(model)
    cache, ids = computed(model, pool, 24, 0)
    tokens = []
    forks = [cache.fork() for _ in range(3)]
    for seed, fork in enumerate(forks):
        prompt = torch.cat([ids, random_ids(1, 3 + 9 * seed, seed)], dim=1)
        tokens.append(go_on(model, fork, prompt, num_new=5))
    joined = PagedCache.concatenate([*forks, cache])
    padded, mask = batch([*tokens, ids])
    assert torch.equal(go_on(model, joined, padded, mask), expected(model, padded, mask))
    pool.check_integrity()


def test_batches_join_with_caches_of_one_row(model):
    pool = pool_of(model)
    rows = [random_ids(1, length, length) for length in (5, 19, 38)]
    ids, mask = batch(rows[:2])
    first = PagedCache(pool=pool)
    first.prefill(model, ids, mask)
    last, _ = computed(model, pool, 38, 38)
    ids, mask = batch(rows)
    joined = PagedCache.concatenate([first, last])
    assert torch.equal(go_on(model, joined, ids, mask), expected(model, ids, mask))


def test_a_batch_is_split_into_its_rows_without_their_padding(model):
    pool = pool_of(model)
    rows = [random_ids(1, length, length) for length in (5, 38, 18)]
    ids, mask = batch(rows)
    cache = PagedCache(pool=pool)
    tokens = go_on(model, cache, ids, mask, num_new=4)
    num_held = pool.stats().num_active_pages
    parts = cache.split()
    assert pool.stats().num_active_pages == num_held
    assert [part.get_seq_length() for part in parts] == [8, 41, 21]
    for part, row, length in zip(parts, tokens, (9, 42, 22), strict=True):
        alone = row[-length:][None]
        assert torch.equal(go_on(model, part, alone), expected(model, alone))
    assert torch.equal(go_on(model, cache, tokens, pad(mask, (0, 4), value=1)), expected(model, ids, mask, num_new=16))
    pool.check_integrity()


def test_what_was_split_is_joined_again(model):
    pool = pool_of(model)
    ids, mask = batch([random_ids(1, length, length) for length in (30, 3, 17)])
    cache = PagedCache(pool=pool)
    cache.prefill(model, ids, mask)
    joined = PagedCache.concatenate(reversed(cache.split()))
    assert torch.equal(go_on(model, joined, ids.flip(0), mask.flip(0)), expected(model, ids, mask).flip(0))


def test_a_joined_cache_knows_its_tokens(model):
    pool = pool_of(model)
    caches, rows = zip(*(computed(model, pool, length, length) for length in (9, 30)), strict=True)
    ids, mask = batch(rows)
    joined = PagedCache.concatenate(caches)
    ids[0, -3] += 1
    with pytest.raises(ValueError, match="holds another prompt: row 0 has token"):
        go_on(model, joined, ids, mask)
    ids, mask = batch(rows)
    ids[1, 4] += 1
    with pytest.raises(ValueError, match="holds another prompt: row 1 has token"):
        go_on(model, joined, ids, mask)
    with pytest.raises(ValueError, match="holds another prompt: row 0 has token"):
        go_on(model, joined.split()[1], ids[1:])


def test_tokens_that_one_cache_does_not_know_are_not_compared():
    pool = PagePool(tiny_config(), page_size=16)
    first, second = PagedCache(pool=pool), PagedCache(pool=pool)
    generator = torch.Generator().manual_seed(0)
    for cache in (first, second):
        forward(cache, random_layers(1, 4, generator))
    assert PagedCache.concatenate([first, second])._sequences.rows.known_ids.known is None


@pytest.mark.parametrize("salts", [("one", "one"), (None, None)])
def test_joined_caches_can_still_be_found(model, salts):
    pool = pool_of(model, prefix_cache=True)
    caches, rows = zip(*(computed(model, pool, 20, seed, salt=salt) for seed, salt in enumerate(salts)), strict=True)
    joined = PagedCache.concatenate(caches)
    ids, _ = batch(rows)
    joined.commit(go_on(model, joined, ids, num_new=20))
    tokens = expected(model, ids, num_new=20)
    again = PagedCache(pool=pool, salt=salts[0])
    before = pool.stats().num_hit_tokens
    again.prefill(model, tokens, torch.ones_like(tokens))
    assert pool.stats().num_hit_tokens - before == 2 * 32
    mask = torch.ones_like(tokens)
    assert torch.equal(go_on(model, again, tokens, mask), expected(model, tokens, mask))
    pool.check_integrity()


def test_caches_that_another_model_has_filled_in_part_are_not_found(models):
    model = models["llama"]
    model.set_attn_implementation("paged_flex")
    pool = pool_of(model, prefix_cache=True)
    caches = [PagedCache(pool=pool) for _ in range(2)]
    caches[0].prefill(model, random_ids(1, 20))
    weight = model.model.layers[0].mlp.down_proj.weight
    try:
        weight.data.neg_()
        caches[1].prefill(model, random_ids(1, 20))
        joined = PagedCache.concatenate(caches)
        with pytest.raises(ValueError, match="commit\\(\\) was called on a cache that may hold more"):
            joined.commit(random_ids(2, 19))
    finally:
        weight.data.neg_()


def test_rows_that_were_released_stay_so():
    pool = PagePool(tiny_config(), page_size=16)
    generator = torch.Generator().manual_seed(0)
    first, second = PagedCache(pool=pool), PagedCache(pool=pool)
    forward(first, random_layers(2, 20, generator))
    forward(second, random_layers(1, 5, generator))
    first.release([0])
    joined = PagedCache.concatenate([first, second])
    forward(joined, random_layers(3, 1, generator), [[0] * 21, [1] * 21, [0] * 15 + [1] * 6])
    assert joined.lengths == [0, 21, 6]
    assert [part.lengths for part in joined.split()] == [[], [21], [6]]


def test_empty_caches_add_no_rows():
    pool = PagePool(tiny_config(), page_size=16)
    cache, empty = PagedCache(pool=pool), PagedCache(pool=pool)
    forward(cache, random_layers(2, 20, torch.Generator().manual_seed(0)))
    assert PagedCache.concatenate([empty, cache, empty]).lengths == [20, 20]
    assert PagedCache.concatenate([empty, empty]).lengths == []
    assert empty.split() == []


def test_keys_and_values_stand_where_they_stood():
    pool = PagePool(tiny_config(), page_size=16)
    generator = torch.Generator().manual_seed(0)
    caches = [PagedCache(pool=pool) for _ in range(2)]
    for cache, length in zip(caches, (18, 3), strict=True):
        forward(cache, random_layers(1, length, generator))
    joined = PagedCache.concatenate(caches)
    for layer in range(len(joined)):
        for tensor, first, second in zip(*(cache.gather(layer) for cache in (joined, *caches)), strict=True):
            assert torch.equal(tensor[:1], first)
            assert torch.equal(tensor[1:], pad(second, (0, 0, 15, 0)))


def test_a_write_to_a_joined_cache_leaves_the_others_alone():
    pool = PagePool(tiny_config(), page_size=16)
    generator = torch.Generator().manual_seed(0)
    caches = [PagedCache(pool=pool) for _ in range(2)]
    for cache in caches:
        forward(cache, random_layers(1, 5, generator))
    held = [cache.gather(0)[0] for cache in caches]
    joined = PagedCache.concatenate(caches)
    forward(joined, random_layers(2, 3, generator))
    forward(caches[0], random_layers(1, 3, generator))
    for cache, keys in zip(caches, held, strict=True):
        assert torch.equal(cache.gather(0)[0][:, :, :5], keys)
    assert torch.equal(joined.gather(0)[0][:, :, :5], torch.cat(held))
    pool.check_integrity()


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (lambda cache: [], r"given no caches, .* Pass at least one"),
        (lambda cache: [cache, PagedCache(tiny_config())], "caches of different pools"),
        (lambda cache: [cache, torch.zeros(1)], "given a Tensor, but it joins caches over pages"),
        (
            lambda cache: [cache, PagedCache(pool=cache.pool, salt="other")],
            "caches with different salts",
        ),
    ],
    ids=["none", "pools", "kinds", "salts"],
)
def test_what_does_not_belong_together_is_not_joined(others, message):
    cache = PagedCache(pool=PagePool(tiny_config(), page_size=16, prefix_cache=True))
    forward(cache, random_layers(1, 5, torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match=message):
        PagedCache.concatenate(others(cache))
    assert cache.lengths == [5]


def test_a_cache_in_the_middle_of_a_pass_is_neither_joined_nor_split():
    pool = PagePool(tiny_config(), page_size=16)
    generator = torch.Generator().manual_seed(0)
    cache, other = PagedCache(pool=pool), PagedCache(pool=pool)
    forward(cache, random_layers(1, 5, generator))
    forward(other, random_layers(1, 5, generator))
    cache.update(*random_layers(1, 2, generator)[0], 0)
    with pytest.raises(UnclearPassError):
        PagedCache.concatenate([other, cache])
    with pytest.raises(UnclearPassError):
        cache.split()
    cache.roll_back()
    assert PagedCache.concatenate([other, cache]).lengths == [5, 5]
    pool.check_integrity()


def test_caches_that_hold_other_layers_are_not_joined():
    pool = PagePool(tiny_config(), page_size=16)
    generator = torch.Generator().manual_seed(0)
    cache, other = PagedCache(pool=pool), PagedCache(pool=pool)
    forward(cache, random_layers(1, 5, generator))
    other.update(*random_layers(1, 5, generator)[0], 0)  # of a model that passes over the others
    other._sequences.progress.missing.clear()
    other._sequences.rows.absent = frozenset({1})
    other._sequences._commit(other._sequences.step)
    with pytest.raises(ValueError, match="caches that hold different layers"):
        PagedCache.concatenate([cache, other])
