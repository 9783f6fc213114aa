"""Attention is bound once for all layers, to the tensors that it is then given, whatever happens meanwhile."""

import numpy as np
import pytest
import torch
from transformers import MistralConfig

from hf_paged import PagedCache, PagePool
from hf_paged.attention import interface
from hf_paged.attention.dispatch import Backend
from hf_paged.attention.interface import paged_flex_attention
from hf_paged.attention.mask import paged_flex_mask
from hf_paged.batch.steps.step import KVRanges
from hf_paged.pages.block_table import BlockTable
from tests.models import plain, random_ids, run, tiny_llama

FP32 = {"atol": 2e-4, "rtol": 1e-4}


@pytest.mark.parametrize(("num_rows", "backend"), [(1, None), (3, None), (3, Backend.FLEX)])
def test_the_pool_may_grow_while_attention_is_bound(num_rows, backend, monkeypatch):
    model = tiny_llama(num_layers=3)
    ids, splits = random_ids(num_rows, 24), [20] + [1] * 4
    expected = plain(model, ids, splits)
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    bind, others = interface.bind, []

    def grow_after(*arguments):
        bound = bind(*arguments)
        others.append(PagedCache(pool=cache.pool))  # what another thread may do
        states = torch.randn(1, 2, 16 * (cache.pool.num_pages + 1), 16)
        for layer in range(3):
            others[-1].update(states, states, layer)
        return bound

    if backend is not None:
        monkeypatch.setattr("hf_paged.attention.dispatch.choose_backend", lambda *_: backend)
    first = run(model, cache, ids[:, :21], splits[:2])
    with monkeypatch.context() as patch:
        patch.setattr(interface, "bind", grow_after)
        before = cache.pool.num_pages
        second = run(model, cache, ids[:, 21:22], [1])
        patch.undo()
    assert cache.pool.num_pages > before
    third = run(model, cache, ids[:, 22:], [1, 1])
    torch.testing.assert_close(torch.cat([first, second, third], dim=1), expected, **FP32)


@torch.no_grad()
def test_parts_of_a_pass_may_be_attended_to_in_turns():
    cache = PagedCache(tiny_llama(num_layers=2).config, page_size=16)
    random = torch.Generator().manual_seed(0)

    def states(num_new):
        return (torch.randn(2, 2, num_new, 16, generator=random) for _ in range(2))

    for layer in range(2):
        cache.update(*states(20), layer)
    length, _ = cache.get_mask_sizes(3, 0)
    mask = paged_flex_mask(2, 3, length, q_offset=20, config=cache.pool.config)
    parts = {number: mask[:, :, number : number + 1] for number in (0, 2, 1)}
    query = torch.randn(2, 6, 3, 16, generator=random)
    for layer in range(2):
        keys, values = cache.update(*states(3), layer)
        module = torch.nn.Module()
        module.layer_idx = layer
        whole, _ = paged_flex_attention(module, query, keys, values, mask)
        for number, part_of_mask in parts.items():
            queries = slice(number, number + 1)
            part, _ = paged_flex_attention(module, query[:, :, queries], keys, values, part_of_mask)
            torch.testing.assert_close(part, whole[:, queries], **FP32)


def test_several_queries_may_see_a_windowed_row_from_its_beginning_unless_that_is_dropped():
    table = BlockTable(PagePool(MistralConfig(sliding_window=24), page_size=16).groups[0])
    table.open_rows(2)
    table.reserve(np.array([40, 10]))
    table.commit(np.array([40, 10]))
    everything = KVRanges(np.array([[39, 40], [9, 10]]))
    everything.check_kept(table)
    table.drop(np.array([17, 0]))
    with pytest.raises(ValueError, match="that have left the window of 24 tokens and were dropped"):
        everything.check_kept(table)
