"""The host's part, in pools of any size: taking and giving back pages, and what comes before the first layer."""

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.utils.benchmark import Timer
from transformers import LlamaConfig
from transformers.masking_utils import create_causal_mask

from hf_paged.attention.backends.split_kv.cpu import kv_splits_of
from hf_paged.attention.mask import NAME, PagedMask
from hf_paged.cache.paged import PagedCache
from hf_paged.pages.allocator import PageAllocator
from hf_paged.tools.bench.scenario import Scenario
from hf_paged.tools.bench.settings import Settings
from hf_paged.tools.progress import progress

ALLOCATED_POOLS = (10**3, 10**4, 10**5, 10**6)
PLANNED_POOLS = (100, 1000, 10**6)
NUM_THREADS = (1, 8)
NUM_ROWS = 16
_PAGES_PER_THREAD = 100  # eight threads share a pool of a thousand
_REPEATS = 100
_PAGE_SIZE = 16
_PROMPT_LENGTH = 56
_NUM_STEPS = 32  # with the prompt 88 tokens, 6 pages a row: 96 of the 100
_HEAD_DIM = 16


def allocate(settings: Settings, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Take pages one by one and give them back one by one.

    Args:
        settings: as given.
        rows: gets one for each number of pages and threads, with `us_per_page`: time per page to take it and give it
            back, as all threads together got on.
    """
    for num_pages in progress(ALLOCATED_POOLS, "allocator"):
        pool = PageAllocator(num_pages)
        # All pages have been held once, so that they come from the list of the released, as in a pool long in use.
        pool.release(pool.allocate(num_pages))
        for num_threads in NUM_THREADS:
            with ThreadPoolExecutor(num_threads) as threads:
                names = {"threads": threads, "churn": churn, "pools": [pool] * num_threads}
                timer = Timer("list(threads.map(churn, pools))", globals=names)
                seconds = timer.timeit(settings.rounds).mean / (num_threads * _PAGES_PER_THREAD * _REPEATS)
            rows.append({"num_pages": num_pages, "num_threads": num_threads, "us_per_page": 1e6 * seconds})
        pool.check_integrity({})
    return {}


def churn(pool: PageAllocator) -> None:
    """Take and give back pages of a pool."""
    for _ in range(_REPEATS):
        held = [pool.allocate(1) for _ in range(_PAGES_PER_THREAD)]
        for pages in held:
            pool.release(pages)


def plan(settings: Settings, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Plan steps of 16 rows.

    What is timed is what Transformers does with the cache before the first layer (its length, and the mask, which
    plans the step) and the list of pages that the first layer makes. Pages have room for one head of one layer, so
    that a pool of a million costs little memory, all of it untouched.

    Args:
        settings: as given.
        rows: gets one for each number of pages, with the median `us` of a step.
    """
    for num_pages in progress(PLANNED_POOLS, "plan"):
        seconds = statistics.median(step for _ in range(settings.rounds) for step in planned_steps(num_pages))
        rows.append({"num_pages": num_pages, "num_rows": NUM_ROWS, "us": 1e6 * seconds})
    return {}


def planned_steps(num_pages: int) -> list[float]:
    """Seconds to plan each of some decoding steps in a new pool."""
    config = LlamaConfig(
        hidden_size=_HEAD_DIM, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=_HEAD_DIM
    )
    config._attn_implementation = NAME
    cache = PagedCache(config, num_pages, _PAGE_SIZE)
    seconds = []
    for step in range(_NUM_STEPS + 1):
        num_new = 1 if step else _PROMPT_LENGTH
        embeddings = torch.zeros(NUM_ROWS, num_new, _HEAD_DIM)
        attention_mask = torch.ones(NUM_ROWS, _PROMPT_LENGTH + step, dtype=torch.long)
        start = time.perf_counter()
        cache.get_seq_length()
        mask = create_causal_mask(config, embeddings, attention_mask, cache)
        assert isinstance(mask, PagedMask)
        if step:
            (table,) = mask.metadata.sequences.rows.tables
            ranges = mask.metadata.ranges_of(table)
            assert ranges is not None
            kv_splits_of(table, ranges)
            seconds.append(time.perf_counter() - start)
        # Rows of one prompt would share its pages.
        tokens = torch.randn(NUM_ROWS, 1, num_new, _HEAD_DIM, generator=torch.Generator().manual_seed(step))
        cache.update(tokens, tokens, 0)
    return seconds


ALLOCATOR = Scenario(
    "allocator",
    "time to take and give back a page, in pools of any size, alone and among threads",
    allocate,
    ("num_pages", "num_threads", "us_per_page"),
    ("us_per_page",),
    by="num_threads",
)
PLAN = Scenario(
    "plan",
    "time on the host before the first layer of a decoding step, in pools of any size",
    plan,
    ("num_pages", "us"),
    ("us",),
    by="num_rows",
)
