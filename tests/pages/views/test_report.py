"""Statistics, as they are printed."""

import torch
from transformers import DynamicCache

from hf_paged import MemoryStats, PagedCache
from tests.models import generate, left_padded, paged_cache, random_ids, tiny_gemma
from tests.reference import tiny_config

MIB = 2**20


def stats(**changes):
    figures = {
        "num_pages": 1036,
        "num_free_pages": 776,
        "num_cached_pages": 0,
        "num_active_pages": 260,
        "num_shared_pages": 12,
        "num_copied_pages": 3,
        "num_tokens": 31000,
        "num_unique_tokens": 30000,
        "page_size": 128,
        "token_bytes": 2**14,
        "active_bytes": 520 * MIB,
        "live_bytes": 468 * MIB,
        "shared_bytes": 16 * MIB,
        "reserved_bytes": 2072 * MIB,
        "padded_bytes": 650 * MIB,
    }
    return MemoryStats(**(figures | changes))


def test_figures_are_laid_out_in_mib_and_per_cent_of_the_pages_held():
    assert str(stats()).splitlines() == [
        "pages held        520.00 MiB    100.0 %   260 pages of 128 tokens, 12 shared",
        "  tokens          468.00 MiB     90.0 %   31,000 in all rows, 30,000 stored",
        "  empty slots      52.00 MiB     10.0 %",
        "without pages     650.00 MiB    125.0 %   every row as wide as the longest, nothing shared",
        "whole pool      2,072.00 MiB    398.5 %   1,036 pages, 776 free",
    ]


def test_pages_whose_tokens_can_still_be_found_are_told_from_free_ones():
    assert str(stats(num_cached_pages=9)).endswith("1,036 pages, 776 free, 9 cached")


def test_what_a_prefix_index_has_found_is_told_where_it_was_asked():
    assert str(stats(num_looked_up_tokens=4000, num_hit_tokens=3000)).splitlines()[5:] == [
        "found again   3,000 of 4,000 tokens, 75.0 %"
    ]


def test_where_nothing_is_held_there_are_no_shares():
    printed = str(PagedCache(tiny_config(), num_pages=4, page_size=16).stats())
    assert "%" not in printed
    assert printed.splitlines()[0] == "pages held          0.00 MiB              0 pages of 16 tokens, 0 shared"


def test_without_pages_is_what_a_contiguous_cache_holds_with_windows_and_without():
    model = tiny_gemma(24)
    ids, mask = random_ids(3, 40), left_padded(40, [40, 17, 3])
    dynamic, paged = DynamicCache(config=model.config), paged_cache(model)
    generate(model, "sdpa", dynamic, ids, attention_mask=mask, max_new_tokens=4)
    generate(model, "sdpa", paged, ids, max_new_tokens=4)
    held = sum(tensor.nbytes for layer in dynamic.layers for tensor in (layer.keys, layer.values))
    assert paged.stats().padded_bytes == held
    forks = [paged.fork() for _ in range(2)]
    assert paged.pool.stats().padded_bytes == (1 + len(forks)) * held
    paged.batch_select_indices(torch.tensor([0]))
    assert paged.stats().padded_bytes == held // 3
