"""Attention of one token of each row over shuffled pages, by itself: a layer of 32/8 heads of 128."""

import random
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.masking_utils import create_causal_mask

from hf_paged.attention.backends.base import AttentionParams
from hf_paged.attention.dispatch import bind
from hf_paged.attention.mask import NAME, PagedMask
from hf_paged.cache.paged import PagedCache
from hf_paged.tools.bench.bandwidth import Bandwidth, seconds
from hf_paged.tools.bench.scenario import Scenario
from hf_paged.tools.bench.settings import Settings
from hf_paged.tools.progress import progress

_SEED = 0
_CHUNK = 512  # columns that are stored at once
_CACHED_BYTES = 2**28  # more than the processor's caches hold
_REPEATS = 20

_lengths = torch.Generator().manual_seed(3)
RAGGED, RAGGED_AND_LONG = (
    tuple(torch.randint(16, longest, (num_rows,), generator=_lengths).tolist())
    for num_rows, longest in ((32, 2048), (16, 32768))
)
"""Lengths of 32 rows of up to 2047 tokens, and of 16 of up to 32,767; the same in every run."""

CASES = {
    "32 rows to 2k": RAGGED,
    "1 x 32768": (32768,),
    "64 x 4096": (4096,) * 64,
    "16 rows to 32k": RAGGED_AND_LONG,
    "1 x 512": (512,),
}
"""Lengths of the rows by what a table calls them."""


@torch.no_grad()
def measure(settings: Settings, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Measure each case, or the rows that `prompt_lengths` asks for.

    Args:
        settings: as given.
        rows: gets one for each case: the median `us` of a layer, `limit_us` to read the keys and values of all tokens
            once, and `bandwidth_share`, the second by the first.
    """
    device = torch.device(settings.device)
    bandwidth, flush = Bandwidth(device), torch.empty(_CACHED_BYTES, dtype=torch.uint8, device=device)
    cases = CASES if settings.prompt_lengths is None else {"as asked": settings.prompt_lengths}
    for name, lengths in progress(cases.items(), "attention"):
        attend, num_bytes = decoding(lengths, settings.page_size, device, getattr(torch, settings.dtype))
        run = _captured(attend) if device.type == "cuda" else attend
        times = []
        for _ in range(_REPEATS):
            bandwidth.measure()
            flush.zero_()
            times.append(seconds(run, device))
        us, limit_us = 1e6 * statistics.median(times), 1e6 * num_bytes / bandwidth.take_median()
        rows.append({"context": name, "us": us, "limit_us": limit_us, "bandwidth_share": limit_us / us})
    return {}


def decoding(
    lengths: Sequence[int], page_size: int, device: torch.device, dtype: torch.dtype
) -> tuple[Callable[[], Tensor], int]:
    """Store rows of so many tokens in shuffled pages, and bind the attention of the last token of each.

    Returns:
        What computes it, and the bytes of the keys and values that it reads.
    """
    config = LlamaConfig(hidden_size=4096, num_hidden_layers=1, num_attention_heads=32, num_key_value_heads=8)
    config._attn_implementation = NAME
    cache = PagedCache(config, sum(-(-length // page_size) for length in lengths), page_size)
    (group,) = cache.pool.groups
    pages = group.allocator.allocate(group.num_pages)
    random.Random(_SEED).shuffle(pages)
    group.allocator.release(pages)
    num_rows, longest = len(lengths), max(lengths)
    is_token = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    generator = torch.Generator(device).manual_seed(_SEED)
    new = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    for start, stop in pairwise([*range(0, longest - 1, _CHUNK), longest - 1, longest]):
        cache.get_seq_length()
        mask = create_causal_mask(config, new((num_rows, stop - start, 1)), is_token[:, :stop].to(device), cache)
        shape = num_rows, 8, stop - start, 128
        keys, values = cache.update(new(shape), new(shape), 0)
    assert isinstance(mask, PagedMask)
    table, storage = mask.metadata.step.source_of(keys, 0)
    query, params = new((num_rows, 32, 1, 128)), AttentionParams(scale=128**-0.5)
    attention, keys, values = bind(mask.metadata, table, storage, query, keys, values, params)

    def attend(cache: PagedCache = cache) -> Tensor:  # which holds the pages
        return attention(query, keys, values, None)

    return attend, sum(lengths) * 2 * 8 * 128 * keys.element_size()


def _captured(attend: Callable[[], Tensor]) -> Callable[[], None]:
    """Record launches as a CUDA graph, so that none waits for the host."""
    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend()
    replay: Callable[[], None] = graph.replay
    return replay


ATTENTION = Scenario(
    "attention",
    "attention of one token of each row over shuffled pages, by itself",
    measure,
    ("context", "us", "limit_us", "bandwidth_share", "error"),
)
