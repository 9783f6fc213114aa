"""Storing new keys and values on a GPU; without one, by Triton's interpreter where Triton is installed."""

import pytest
import torch

from hf_paged.pages.storage import LayerStorage

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def states(num_rows, num_new, heads, dim, seed):
    """In the memory layout that models give them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, num_new, heads, dim, generator=generator).transpose(1, 2).to(DEVICE)


@pytest.mark.parametrize("heads", [(2, 2), (1, 3)], ids=str)
@pytest.mark.parametrize("dims", [(16, 16), (20, 8)], ids=str)
@pytest.mark.parametrize(("num_rows", "num_new"), [(1, 1), (3, 1), (1, 7), (2, 40)])
@pytest.mark.parametrize("is_padded", [False, True], ids=["", "padding"])
def test_every_token_is_in_its_slot_and_nothing_else_has_changed(heads, dims, num_rows, num_new, is_padded):
    keys, values = (states(num_rows, num_new, *shape) for shape in zip(heads, dims, (0, 1), strict=True))
    stored, expected = (LayerStorage(keys, values, 8, 16) for _ in range(2))
    token_index = torch.arange(0, num_rows * num_new, 2, device=DEVICE) if is_padded else None
    num_tokens = num_rows * num_new if token_index is None else len(token_index)
    slots = torch.randperm(8 * 16, generator=torch.Generator().manual_seed(2))[:num_tokens].to(DEVICE)
    stored.write_on_gpu(keys, values, slots, token_index)
    flat = [tensor.transpose(0, 1).flatten(1, 2) for tensor in (keys, values)]
    if token_index is not None:
        flat = [tensor[:, token_index] for tensor in flat]
    expected.write(*flat, slots)
    assert all(torch.equal(*pair) for pair in zip(stored.tensors, expected.tensors, strict=True))


def test_no_token_changes_nothing():
    keys = states(1, 1, 2, 16, 0)
    storage = LayerStorage(keys, keys, 1, 16)
    storage.write_on_gpu(keys, keys, torch.empty(0, dtype=torch.int64, device=DEVICE), None)
    assert not storage.keys.any()
