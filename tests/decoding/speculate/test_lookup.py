"""Lookup drafts what followed the last tokens of a row where they stood before."""

import numpy as np
import pytest
import torch

from hf_paged.decoding.speculate.lookup import Lookup
from hf_paged.decoding.speculate.text import Text


def by_search(row, max_ngram):
    """Where the row goes on: behind the latest occurrence of its longest end, of two tokens or more."""
    for length in range(max_ngram, min(2, max_ngram) - 1, -1):
        for end in range(len(row) - 1, length - 1, -1):
            if len(row) > length and row[end - length : end] == row[-length:]:
                return end
    return len(row)


@pytest.mark.parametrize("max_ngram", [1, 2, 3, 5])
def test_the_longest_run_is_found_where_it_stood_last(max_ngram):
    random = np.random.default_rng(0)
    prompt = random.integers(3, 7, (4, 30))
    text = Text(torch.from_numpy(prompt))
    lookup = Lookup(text, None, max_ngram)
    for _ in range(40):
        available = lookup.available()
        drafts = lookup.draft(np.minimum(available, 5))
        for row in range(4):
            own = text.ids[row, : text.known[row]].tolist()
            place = by_search(own, max_ngram)
            assert available[row] == len(own) - place
            assert drafts.tokens[row, : drafts.counts[row]].tolist() == own[place : place + 5]
        text.add(random.integers(3, 7, (4, 3)), random.integers(0, 4, 4))


def test_padding_is_not_looked_for():
    ids = torch.tensor([[0, 0, 0, 0, 5], [5, 6, 7, 5, 6]])
    mask = np.array([[False] * 4 + [True], [True] * 5])
    lookup = Lookup(Text(ids), mask, 3)
    assert lookup.available().tolist() == [0, 3]
    assert lookup.draft(np.array([0, 3])).tokens[1].tolist() == [7, 5, 6]
