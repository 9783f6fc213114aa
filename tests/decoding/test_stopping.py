"""Finished rows give their pages back, and nothing else changes."""

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, MaxLengthCriteria

from hf_paged import PagedCache, PagePool, ReleaseFinished
from hf_paged.attention.backends.split_kv import cpu
from tests.models import generate, left_padded, random_ids, run, tiny_llama
from tests.reference import assert_same, filled, forward, random_layers, tiny_config

FP32 = {"atol": 2e-4, "rtol": 1e-4}


@pytest.fixture
def model():
    return tiny_llama()


def num_active(cache):
    return cache.pool.groups[0].allocator.num_active


def test_active_pages_fall_at_once_by_those_of_the_released_rows(generator):
    cache = PagedCache(tiny_config(), page_size=16)
    reference = filled(cache, generator, 4, 40, padding=[0, 10, 30, 0])
    assert num_active(cache) == 3 + 2 + 1 + 3
    cache.release([1, 3])
    reference.release([1, 3])
    assert num_active(cache) == 3 + 1
    assert cache.lengths == [40, 0, 10, 0]
    assert_same(cache, reference)
    cache.pool.check_integrity()


def test_an_end_token_in_half_of_the_rows_frees_just_their_pages(generator):
    cache = PagedCache(tiny_config(), page_size=16)
    reference = filled(cache, generator, 4, 40, padding=[0, 10, 30, 0])
    ids = torch.tensor([[5, 2], [2, 6], [7, 7], [5, 3]])
    stops = ReleaseFinished(cache, eos_token_id=[2, 3])(ids, torch.zeros(4, 8))
    assert not stops.any()
    assert num_active(cache) == 9 - 3 - 3
    reference.release([0, 3])
    assert_same(cache, reference)


@pytest.mark.parametrize("rows", [torch.tensor([0, 2]), torch.tensor([True, False, True]), [0, -1, 0]], ids=str)
def test_rows_are_named_by_index_or_by_mask(generator, rows):
    cache = PagedCache(tiny_config(), page_size=16)
    filled(cache, generator, 3, 5)
    cache.release(rows)
    assert cache.lengths == [0, 5, 0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [([3], r"Rows \[3\] were asked for, but this cache holds 3 rows"), (torch.tensor([True]), "A mask over 1 rows")],
    ids=["index", "mask"],
)
def test_releasing_a_row_that_does_not_exist_changes_nothing(generator, rows, message):
    cache = PagedCache(tiny_config(), page_size=16)
    reference = filled(cache, generator, 3, 5)
    with pytest.raises(ValueError, match=message):
        cache.release(rows)
    assert_same(cache, reference)


def test_a_released_row_neither_grows_nor_costs_attention_work(model):
    ids, mask = random_ids(3, 60), left_padded(60, [60, 41, 20])
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    run(model, cache, ids[:, :40], [40], mask[:, :40])
    cache.release([0])
    position = torch.tensor([[40], [21], [0]])
    for column in range(40, 60):
        kv_length, _ = cache.get_mask_sizes(1, 0)
        tables = kv_length.sequences.rows.tables
        with torch.no_grad():
            model(
                ids[:, column : column + 1],
                past_key_values=cache,
                position_ids=position,
                attention_mask=mask[:, : column + 1],
            )
        position += 1
        (builder,) = cpu._builders[tables[0]].values()
        assert builder._splits.counts.tolist() == [0, *(-(-tables[0].lengths[1:] // 16))]
        assert tables[0].row_pages(0) == []
    assert cache.lengths == [0, 41, 20]


@pytest.mark.parametrize("attention", ["paged_flex", "sdpa"])
def test_releasing_rows_changes_no_token_of_the_others(model, attention):
    ids = random_ids(4, 20)
    mask = left_padded(20, [20, 13, 16, 4]) if attention == "paged_flex" else torch.ones_like(ids)
    plain = generate(model, "sdpa", DynamicCache(config=model.config), ids, attention_mask=mask, max_new_tokens=60)
    ends = {token: (plain[:, 20:] == token).any(dim=1).sum() for token in plain[:, 25:].flatten().tolist()}
    eos = [token for token, num_rows in ends.items() if num_rows == 1][:2]
    settings = {"attention_mask": mask, "max_new_tokens": 60, "eos_token_id": eos}
    expected = generate(model, "sdpa", DynamicCache(config=model.config), ids, **settings)
    finished = torch.isin(expected[:, 20:], torch.tensor(eos)).any(dim=1)
    assert 0 < finished.sum() < 4
    cache = PagedCache.from_model(model, page_size=16)
    tokens = generate(model, attention, cache, ids, stopping_criteria=[ReleaseFinished(cache, eos)], **settings)
    assert torch.equal(tokens, expected)
    assert [length == 0 for length in cache.lengths] == finished.tolist()
    cache.pool.check_integrity()


def test_other_criteria_finish_rows_too(model):
    ids = random_ids(2, 20)
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    generate(
        model, "paged_flex", cache, ids, stopping_criteria=[ReleaseFinished(cache, criteria=[MaxLengthCriteria(30)])]
    )
    assert cache.lengths == [0, 0]
    assert num_active(cache) == 0


def test_released_pages_make_room_for_the_rows_that_go_on(model):
    ids = random_ids(2, 40)
    pool = PagePool(model.config, num_pages=7, page_size=16)
    cache = PagedCache(pool=pool)
    model.set_attn_implementation("paged_flex")
    run(model, cache, ids, [40])
    cache.release([1])
    run(model, cache, random_ids(2, 60, seed=1), [1] * 60)
    assert cache.lengths == [100, 0]


def test_a_released_row_cannot_be_continued_by_a_new_prompt(model):
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    run(model, cache, random_ids(2, 20), [20])
    cache.release([1])
    with pytest.raises(
        ValueError, match=r"Rows \[1\] of this cache were released and have no tokens to continue from"
    ):
        run(model, cache, random_ids(2, 5), [5])
    cache.batch_select_indices(torch.tensor([0]))
    run(model, cache, random_ids(1, 5), [5])
    assert cache.lengths == [25]


def test_a_reset_forgets_that_rows_were_released(generator):
    cache = PagedCache(tiny_config(), page_size=16)
    filled(cache, generator, 2, 5)
    cache.release([0])
    cache.reset()
    assert_same(cache, filled(cache, generator, 2, 7))


def test_a_fork_is_not_released_with_its_parent(generator):
    cache = PagedCache(tiny_config(), page_size=16)
    reference = filled(cache, generator, 2, 20)
    fork = cache.fork()
    cache.release([0, 1])
    assert_same(fork, reference)
    forward(cache, random_layers(2, 1, generator))
    assert cache.lengths == [0, 0]


def test_release_finished_says_what_it_lacks(model):
    cache = PagedCache.from_model(model)
    with pytest.raises(ValueError, match="neither eos_token_id nor criteria"):
        ReleaseFinished(cache)
    with pytest.raises(ValueError, match=r"asked about 8 rows, but its cache holds 4.*sampling only"):
        model.generate(
            random_ids(1, 5),
            generation_config=GenerationConfig(num_beams=4, max_new_tokens=4, eos_token_id=2, pad_token_id=0),
            past_key_values=cache,
            stopping_criteria=[ReleaseFinished(cache, 2)],
        )
