"""Keys that several rows have in common are attended to as if each row had its own."""

from copy import deepcopy

import pytest
import torch

from hf_paged.attention.interface import paged_flex_attention
from hf_paged.batch.handed_on import RepeatedRows

NUM_QUERIES, NUM_KEYS = 3, 9
MASKS = {
    "none": None,
    "bool": torch.rand(6, 1, NUM_QUERIES, NUM_KEYS) < 0.7,
    "of one row": torch.randn(1, 1, NUM_QUERIES, NUM_KEYS),
    "for all queries": torch.randn(6, 4, 1, NUM_KEYS),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("rows", [[0, 0, 1, 1, 2, 2], [0] * 6, [0, 1, 1, 0, 2, 2], [0, 0, 0, 0, 1, 1]], ids=str)
def test_rows_attend_to_what_they_share(rows, mask):
    torch.manual_seed(0)
    query, held = torch.randn(6, 4, NUM_QUERIES, 16), tuple(torch.randn(max(rows) + 1, 2, NUM_KEYS, 16) for _ in "kv")
    own = [tensor[torch.tensor(rows)] for tensor in held]
    module = torch.nn.Module()
    for module.is_causal in (False, True):
        for options in ({}, {"softcap": 2.0}, {"position_bias": torch.ones(1, 4, 3, 9).cumsum(3)}):
            shared = RepeatedRows(held, torch.tensor(rows)).tensors()
            found, _ = paged_flex_attention(module, query, *shared, MASKS[mask], **options)
            expected, _ = paged_flex_attention(module, query, *own, MASKS[mask], **options)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_copy_shares_its_rows_again_and_keeps_what_was_changed():
    held = tuple(torch.randn(2, 2, 5, 4) for _ in "kv")
    shared = RepeatedRows(held, torch.tensor([0, 0, 1]))
    keys, _ = shared.copies()
    for is_changed in (False, True):
        if is_changed:
            keys[1] = 0
        copy = deepcopy(shared)
        assert copy.are_changed is is_changed
        assert torch.equal(copy.copies()[0], keys)
        assert copy.held[0] is not held[0]
