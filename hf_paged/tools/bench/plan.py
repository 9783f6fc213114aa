"""Plan: time on the host before the first layer of a decoding step, in pools of any size."""

import statistics
import time
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.masking_utils import create_causal_mask

from hf_paged.attention.mask import NAME, PagedMask
from hf_paged.cache.paged import PagedCache
from hf_paged.tools.bench.settings import Settings
from hf_paged.tools.lab.progress import progress

POOL_SIZES = (100, 1000, 10**6)
NUM_ROWS = 16
_PAGE_SIZE = 16
_PROMPT_LENGTH = 56
_NUM_STEPS = 32  # with the prompt 88 tokens, 6 pages a row: 96 of the 100
_HEAD_DIM = 16


def measure(settings: Settings) -> dict[str, Any]:
    """Plan steps of 16 rows.

    What is timed is what Transformers does with the cache before the first layer (its length, and the mask, which
    plans the step) and the list of pages that the first layer makes. Pages have room for one head of one layer, so
    that a pool of a million costs little memory, all of it untouched.

    Returns:
        `rows` for each number of pages, with the median `us` of a step.
    """
    rows = []
    for num_pages in progress(POOL_SIZES, "plan"):
        seconds = [step for _ in range(settings.rounds) for step in steps(num_pages)]
        rows.append({"num_pages": num_pages, "num_rows": NUM_ROWS, "us": 1e6 * statistics.median(seconds)})
    return {"rows": rows}


def steps(num_pages: int) -> list[float]:
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
            mask.metadata.splits(mask.metadata.sequences.rows.tables[0])
            seconds.append(time.perf_counter() - start)
        # Rows of one prompt would share its pages.
        tokens = torch.randn(NUM_ROWS, 1, num_new, _HEAD_DIM, generator=torch.Generator().manual_seed(step))
        cache.update(tokens, tokens, 0)
    return seconds
