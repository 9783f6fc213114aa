"""The number of drafted tokens follows from what came of the last ones."""

import numpy as np
import pytest
import torch

from hf_paged.decoding.speculate.budget import Budget

CPU, GPU = torch.device("cpu"), torch.device("cuda")
MANY = 100


def drafted(budget, num_rows, shares, num_passes, available=MANY):
    """How many tokens are drafted in each of some passes, of whose drafts `shares` are right."""
    found = []
    random = np.random.default_rng(0)
    for _ in range(num_passes):
        counts = budget.choose(np.full(num_rows, available), np.ones(num_rows, dtype=bool))
        right = [
            int(np.logical_and.accumulate(random.random(n) < p).sum()) for n, p in zip(counts, shares, strict=True)
        ]
        budget.note(counts, np.array(right), np.full(num_rows, np.nan))
        found.append(counts)
    return np.array(found)


@pytest.mark.parametrize("num_rows", [1, 8])
@pytest.mark.parametrize("device", [CPU, GPU], ids=["cpu", "gpu"])
def test_drafts_that_are_always_right_become_as_long_as_they_may(device, num_rows):
    budget = Budget(num_rows, 11, num_rows, device, 0.0)
    assert drafted(budget, num_rows, [1.0] * num_rows, 20)[-1].min() >= (5 if device is CPU and num_rows == 8 else 11)


@pytest.mark.parametrize("num_rows", [1, 8])
def test_a_draft_model_that_is_never_right_is_asked_now_and_then(num_rows):
    counts = drafted(Budget(num_rows, 10, num_rows, CPU, 0.05), num_rows, [0.0] * num_rows, 800)
    is_wide = counts.any(axis=1)
    assert 0.001 < is_wide[50:].mean() < 0.1
    assert counts[50:].sum(axis=1).max() <= 2 * num_rows


def test_what_costs_nothing_to_foresee_is_drafted_once_it_comes_true():
    budget, going = Budget(8, 10, 8, CPU, 0.0), np.ones(8, dtype=bool)
    drafted(budget, 8, [0.0] * 8, 10)
    for is_foreseen in [0.0] * 500 + [1.0] * 8:
        assert not budget.choose(np.full(8, MANY), going).any() or is_foreseen
        budget.note(np.zeros(8, dtype=int), np.zeros(8, dtype=int), np.full(8, is_foreseen))
    assert budget.choose(np.full(8, MANY), going).all()


def test_a_costly_draft_model_that_is_never_right_is_asked_less():
    cheap = drafted(Budget(8, 5, 8, CPU, 0.01), 8, [0.0] * 8, 500)
    costly = drafted(Budget(8, 5, 8, CPU, 0.3), 8, [0.0] * 8, 500)
    assert costly.any(axis=1).sum() < cheap.any(axis=1).sum()


def test_one_row_of_many_is_not_worth_the_width_of_all_on_a_cpu_but_on_a_gpu():
    available, going = np.array([MANY] + [0] * 7), np.ones(8, dtype=bool)
    assert not Budget(8, 10, 8, CPU, 0.0).choose(available, going).any()
    assert Budget(8, 10, 8, GPU, 0.0).choose(available, going)[0] > 0


def test_rows_that_have_ended_are_not_drafted_for():
    counts = Budget(3, 10, 3, GPU, 0.0).choose(np.full(3, MANY), np.array([True, False, True]))
    assert counts[1] == 0
    assert counts[0] == counts[2] > 0
