"""Rows that hold the same tokens hold the same pages, until they differ."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache

from hf_paged import OutOfPagesError, PagedCache
from tests.models import generate, left_padded, plain, random_ids, run, tiny_llama
from tests.reference import (
    NUM_LAYERS,
    ReferenceCache,
    assert_same,
    filled,
    forward,
    random_layers,
    table_of,
    tiny_config,
)

FP32 = {"atol": 2e-4, "rtol": 1e-4}


@pytest.fixture
def model():
    return tiny_llama()


def paged(model):
    model.set_attn_implementation("paged_flex")
    return PagedCache.from_model(model, page_size=16)


def num_active(cache):
    return cache.pool.groups[0].allocator.num_active


def repeated_layers(num_rows, num_new, generator):
    return [
        (keys.expand(num_rows, -1, -1, -1).clone(), values.expand(num_rows, -1, -1, -1).clone())
        for keys, values in random_layers(1, num_new, generator)
    ]


@pytest.mark.parametrize("length", [1, 15, 16, 17, 40])
@pytest.mark.parametrize("attention", ["paged_flex", "sdpa"])
def test_a_repeated_prompt_is_held_once(model, attention, length):
    ids = random_ids(1, length).repeat(4, 1)
    expected = plain(model, ids, [length])
    cache = paged(model)
    model.set_attn_implementation(attention)
    torch.testing.assert_close(run(model, cache, ids, [length]), expected, **FP32)
    assert cache.lengths == [length] * 4
    # A single token is what a beam decodes: rows are compared where there is a prompt.
    assert num_active(cache) == (4 if length == 1 else -(-length // 16))
    cache.pool.check_integrity()


def test_only_equal_rows_share(model):
    ids = random_ids(5, 40)
    ids[3] = ids[0]
    ids[4] = ids[1]
    ids[2, 1:] = ids[0, 1:]
    splits = [33, 1, 1, 5]
    expected = plain(model, ids, splits)
    cache = paged(model)
    torch.testing.assert_close(run(model, cache, ids[:, :33], [33]), expected[:, :33], **FP32)
    assert num_active(cache) == 3 * 3
    assert table_of(cache).row_pages(3) == table_of(cache).row_pages(0)
    assert table_of(cache).row_pages(4) == table_of(cache).row_pages(1)
    torch.testing.assert_close(run(model, cache, ids[:, 33:], [1, 1, 5]), expected[:, 33:], **FP32)
    assert num_active(cache) == 3 * 3 + 2
    cache.pool.check_integrity()


def test_equal_tokens_behind_other_padding_are_held_once_if_the_padding_is_the_same(model):
    ids, mask = random_ids(1, 40).repeat(4, 1), left_padded(40, [40, 20, 20, 39])
    expected = plain(model, ids, [40], mask)
    cache = paged(model)
    logits = run(model, cache, ids, [40], mask)
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], **FP32)
    assert num_active(cache) == 3 + 2 + 3


@pytest.mark.parametrize("chunks", [[20, 20], [16, 16, 8], [5, 5, 30], [39, 1]], ids=str)
def test_a_repeated_prompt_in_chunks_is_held_once(model, chunks):
    ids = random_ids(1, 40).repeat(3, 1)
    expected = plain(model, ids, chunks)
    cache = paged(model)
    torch.testing.assert_close(run(model, cache, ids, chunks), expected, **FP32)
    # A chunk of one token is not compared, and its tail is copied for all but one.
    assert num_active(cache) == (3 if chunks[-1] > 1 else 3 + 2)
    cache.pool.check_integrity()


def test_rows_that_go_apart_in_a_later_layer_get_pages_of_their_own(generator):
    cache, reference = PagedCache(tiny_config(), page_size=16), ReferenceCache()
    for num_new in (20, 15):
        layers = repeated_layers(3, num_new, generator)
        layers[1][1][2, 1, -1, 3] += 1  # one number, in the values of the last row and layer
        forward(cache, layers)
        reference.append(layers)
        assert_same(cache, reference)
        cache.pool.check_integrity()
    assert num_active(cache) == 3 + 3


def test_a_pass_that_fails_between_twins_leaves_no_trace(generator):
    cache = PagedCache(tiny_config(), page_size=16)
    reference = ReferenceCache()
    layers = repeated_layers(3, 20, generator)
    forward(cache, layers)
    reference.append(layers)
    cache.get_mask_sizes(30, 0)
    cache.update(*repeated_layers(3, 30, generator)[0], 0)
    cache.roll_back()
    assert_same(cache, reference)
    assert num_active(cache) == 2
    layers = repeated_layers(3, 30, generator)
    forward(cache, layers)
    reference.append(layers)
    assert_same(cache, reference)
    assert num_active(cache) == 4
    cache.pool.check_integrity()


def test_twins_need_the_pages_of_one_row_only(generator):
    cache = PagedCache(tiny_config(), num_pages=3, page_size=16)
    forward(cache, repeated_layers(8, 40, generator))
    assert cache.stats().num_free_pages == 0
    with pytest.raises(OutOfPagesError, match="needs 7 more pages, but 0 of 3 are free"):
        forward(cache, random_layers(8, 1, generator))
    assert cache.lengths == [40] * 8
    cache.reset()
    with pytest.raises(OutOfPagesError, match="needs 24 more pages, but 3 of 3 are free"):
        forward(cache, random_layers(8, 40, generator))
    assert cache.lengths == []
    cache.pool.check_integrity()


def test_too_few_pages_for_twins_that_go_apart_leave_no_trace(generator):
    cache = PagedCache(tiny_config(), num_pages=3, page_size=16)
    layers = repeated_layers(2, 40, generator)
    layers[1][0][1] += 1
    with pytest.raises(OutOfPagesError, match="needs 3 more pages, but 0 of 3 are free"):
        forward(cache, layers)
    assert (cache.lengths, num_active(cache)) == ([], 0)
    assert_same(cache, filled(cache, generator, 1, 40))


# One row that becomes several


@pytest.mark.parametrize("length", [15, 16, 33])
@pytest.mark.parametrize("attention", ["paged_flex", "sdpa"])
def test_one_cached_row_fans_out_by_itself(model, attention, length):
    ids = random_ids(4, 50)
    ids[:, :length] = ids[0, :length]
    splits = [1, 1, 7, 50 - length - 9] if length < 41 else [50 - length]
    expected = plain(model, ids, [length, *splits])[:, length:]
    cache = paged(model)
    model.set_attn_implementation(attention)
    run(model, cache, ids[:1, :length], [length])
    torch.testing.assert_close(run(model, cache, ids[:, length:], splits), expected, **FP32)
    assert cache.lengths == [50] * 4
    cache.pool.check_integrity()


def test_a_row_with_padding_fans_out_with_it(model):
    ids, mask = random_ids(3, 30), left_padded(30, [21, 21, 21])
    ids[:, :20] = ids[0, :20]
    expected = plain(model, ids, [20, 10], mask)[:, 20:]
    cache = paged(model)
    run(model, cache, ids[:1, :20], [20], mask[:1, :20])
    with torch.no_grad():
        position_ids = torch.arange(11, 21).expand(3, -1)
        logits = model(ids[:, 20:], past_key_values=cache, attention_mask=mask, position_ids=position_ids).logits
    torch.testing.assert_close(logits, expected, **FP32)
    assert cache.lengths == [21] * 3


def test_a_pass_that_fails_leaves_the_one_row(generator):
    cache = PagedCache(tiny_config(), num_pages=4, page_size=16)
    reference = filled(cache, generator, 1, 20)
    with pytest.raises(OutOfPagesError, match="needs 4 more pages, but 2 of 4 are free"):
        forward(cache, random_layers(5, 1, generator))
    assert_same(cache, reference)
    cache.get_mask_sizes(1, 0)
    cache.update(*random_layers(3, 1, generator)[0], 0)
    assert_same(cache, reference)
    cache.roll_back()
    layers = random_layers(1, 1, generator)
    forward(cache, layers)
    reference.append(layers)
    assert_same(cache, reference)
    cache.pool.check_integrity()


@pytest.mark.parametrize("num_rows", [1, 2])
@pytest.mark.parametrize("is_padded", [False, True])
def test_after_too_few_pages_for_many_rows_fewer_are_tried(generator, num_rows, is_padded):
    cache = PagedCache(tiny_config(), num_pages=4, page_size=16)
    reference = filled(cache, generator, 1, 20, padding=[4] if is_padded else None)

    def mask(count, num_new):
        return [reference.mask[0] + [1] * num_new] * count if is_padded else None

    with pytest.raises(OutOfPagesError, match="are free"):
        forward(cache, random_layers(5, 12, generator), mask(5, 12))
    layers = random_layers(num_rows, 1, generator)
    forward(cache, layers, mask(num_rows, 1))
    reference.append(layers)
    assert_same(cache, reference)
    cache.pool.check_integrity()


def test_several_rows_do_not_fan_out(generator):
    cache = PagedCache(tiny_config(), page_size=16)
    filled(cache, generator, 2, 20)
    with pytest.raises(ValueError, match="holds 2 rows, but a batch of 4 was given"):
        forward(cache, random_layers(4, 1, generator))


@pytest.mark.parametrize("how", ["by itself", "batch_repeat_interleave"])
def test_samples_of_a_prefilled_prompt_are_those_of_a_prompt_read_for_each(model, how):
    ids = random_ids(1, 30)
    settings = {"do_sample": True, "num_return_sequences": 4, "max_new_tokens": 20}
    torch.manual_seed(1)
    expected = generate(model, "sdpa", DynamicCache(config=model.config), ids, **settings)
    cache = paged(model)
    run(model, cache, ids[:, :-1], [29])
    if how == "batch_repeat_interleave":
        cache.batch_repeat_interleave(4)
    assert num_active(cache) == 2
    torch.manual_seed(1)
    assert torch.equal(generate(model, "paged_flex", cache, ids, **settings), expected)
    assert cache.stats().num_shared_pages == 1


# Copies


def test_a_deep_copy_takes_no_page_until_it_is_written(generator):
    cache = PagedCache(tiny_config(), page_size=16)
    reference = filled(cache, generator, 2, 100)
    held = num_active(cache)
    copies = [copy.deepcopy(cache) for _ in range(3)]
    assert num_active(cache) == held
    layers = random_layers(2, 1, generator)
    forward(copies[0], layers)
    assert num_active(cache) == held + 2
    for untouched in (cache, *copies[1:]):
        assert_same(untouched, reference)
    reference.append(layers)
    assert_same(copies[0], reference)


@pytest.mark.parametrize("save", [pickle.dumps, lambda cache: torch.save(cache, "unused")], ids=["pickle", "torch"])
def test_saving_a_cache_raises(generator, save, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = PagedCache(tiny_config(), page_size=16)
    reference = filled(cache, generator, 1, 5)
    with pytest.raises(TypeError, match=r"can't be pickled: .*Write it to a file by cache.save\(path\)"):
        save(cache)
    assert_same(cache, reference)
    assert len(cache) == NUM_LAYERS
