"""`crop` with a number for each row takes back the last tokens of each."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models import left_padded, paged_cache, random_ids, run, tiny_gemma, tiny_llama


def filled(model, ids, mask, **arguments):
    kv_cache = paged_cache(model, **arguments)
    run(model, kv_cache, ids, [ids.shape[1]], mask)
    return kv_cache


@pytest.mark.parametrize("padding", ["left", "right", "none"])
def test_the_rows_go_on_as_rows_of_these_lengths_do(padding):
    model, ids = tiny_llama(), random_ids(3, 37)
    mask = left_padded(37, [37, 20, 33])
    mask = {"left": mask, "right": mask.flip(1), "none": torch.ones_like(mask)}[padding]
    kv_cache = filled(model, ids, mask)
    lengths = mask.sum(1)
    removed = torch.tensor([-1, -17, 0])
    kv_cache.crop(removed)
    assert kv_cache.lengths == (lengths + removed).tolist()
    kv_cache.pool.check_integrity()
    num_columns = kv_cache.get_seq_length()
    kept = mask * (mask.cumsum(1) <= (lengths + removed)[:, None])
    longer = torch.cat([kept[:, :num_columns], torch.ones(3, 2, dtype=torch.long)], dim=1)
    more = torch.cat([ids[:, :num_columns], random_ids(3, 2, seed=1)], dim=1)
    position = (longer.cumsum(1) - 1).clamp(min=0)[:, num_columns:]
    with torch.no_grad():
        actual = model(
            more[:, num_columns:], past_key_values=kv_cache, attention_mask=longer, position_ids=position
        ).logits
    expected = run(model, paged_cache(model), more, [more.shape[1]], longer)[:, num_columns:]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_the_same_number_for_all_rows_is_that_number():
    model, ids = tiny_llama(), random_ids(3, 37)
    one, other = (filled(model, ids, None) for _ in range(2))
    one.crop(-5)
    other.crop([-5, -5, -5])
    assert one.get_seq_length() == other.get_seq_length() == 32
    for mine, theirs in zip(one, other, strict=True):
        assert torch.equal(mine[0], theirs[0])


def test_a_fork_keeps_what_is_cropped():
    model = tiny_llama()
    kv_cache = filled(model, random_ids(2, 40), None)
    fork = kv_cache.fork()
    kept = fork.gather(1)[0].clone()
    kv_cache.crop([-30, -3])
    with torch.no_grad():
        model(random_ids(2, 3), past_key_values=kv_cache, attention_mask=_mask_behind(kv_cache, 3))
    assert fork.lengths == [40, 40]
    assert torch.equal(fork.gather(1)[0], kept)
    kv_cache.pool.check_integrity()


def _mask_behind(kv_cache, num_new):
    num_columns = kv_cache.get_seq_length()
    mask = torch.arange(num_columns)[None] < torch.tensor(kv_cache.lengths)[:, None]
    return torch.cat([mask, torch.ones(len(mask), num_new, dtype=torch.bool)], dim=1).long()


def test_tokens_that_have_left_a_window_are_not_given_back():
    model, ids = tiny_gemma(window=20), random_ids(2, 60)
    kv_cache = filled(model, ids, None)
    run(model, kv_cache, random_ids(2, 1), [1])
    with pytest.raises(ValueError, match="left the window of 20"):
        kv_cache.crop([0, -30])
    assert kv_cache.lengths == [61, 61]
    kv_cache.activate_past_recording()
    run(model, kv_cache, random_ids(2, 30), [30])
    kv_cache.crop([-30, 0])
    assert kv_cache.lengths == [61, 91]
    kv_cache.pool.check_integrity()


@pytest.mark.parametrize("numbers", [[1, 0], [-41, 0], [-1], [-1, -1, -1], []])
def test_numbers_that_fit_no_row_are_refused(numbers):
    kv_cache = filled(tiny_llama(), random_ids(2, 40), None)
    with pytest.raises(ValueError, match="a number for each row"):
        kv_cache.crop(numbers)
    assert kv_cache.lengths == [40, 40]


def test_what_is_no_whole_number_is_refused():
    kv_cache = filled(tiny_llama(), random_ids(2, 40), None)
    with pytest.raises(TypeError, match="float"):
        kv_cache.crop([-1.5, 0])


@settings(max_examples=30, deadline=None)
@given(data=st.data(), page_size=st.sampled_from([16, 32]))
def test_any_numbers_leave_the_pool_whole(data, page_size):
    lengths = data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=4))
    mask = left_padded(max(lengths), lengths)
    kv_cache = filled(tiny_llama(), random_ids(len(lengths), max(lengths)), mask, page_size=page_size)
    held = kv_cache.fork()
    for _ in range(2):
        removed = [-data.draw(st.integers(0, length)) for length in kv_cache.lengths]
        expected = [length + number for length, number in zip(kv_cache.lengths, removed, strict=True)]
        kv_cache.crop(removed)
        assert kv_cache.lengths == (expected if any(expected) else [])
        kv_cache.pool.check_integrity()
    assert held.lengths == lengths
