"""A batch of prompts of different lengths, run under a memory audit."""

from collections.abc import Sequence
from typing import Any

from hf_paged._transformers import CACHE
from hf_paged.cache.paged import PagedCache
from hf_paged.tools.evaluation.audit import MemoryAudit
from hf_paged.tools.lab.baselines import Paged
from hf_paged.tools.lab.model import MeasuredModel


def audit_batch(
    measured: MeasuredModel,
    prompt_lengths: Sequence[int],
    *,
    page_size: int,
    max_new_tokens: int,
    num_beams: int = 1,
    max_length: int | None = None,
) -> MemoryAudit:
    """Prefill the prompts packed, generate, then give all memory back, and account for every step of it.

    Args:
        measured: what is run.
        prompt_lengths: in tokens.
        page_size: tokens per page.
        max_new_tokens: that every row gets; no row ends early.
        num_beams: of each prompt; 1: greedy decoding.
        max_length: columns of the `StaticCache` to compare with; None: just those that are used.

    Raises:
        ValueError: for more columns than the model or `max_length` has room for.
    """
    num_columns = max(prompt_lengths) + max_new_tokens
    room = measured.max_length if max_length is None else min(max_length, measured.max_length)
    if num_columns > room:
        raise ValueError(
            f"A prompt of {max(prompt_lengths)} tokens and {max_new_tokens} new ones need {num_columns} columns, but "
            f"there is room for {room}. Ask for less, or for a larger max_length up to {measured.max_length}."
        )
    ids, mask = measured.padded(prompt_lengths)
    paged = Paged(measured.model, page_size)
    paged.prepare()
    model: Any = paged.model
    cache = paged.new_cache(num_columns)
    assert isinstance(cache, PagedCache)
    with MemoryAudit(model, cache, max_length or num_columns) as audit:
        cache.prefill(model, ids, mask)
        cache.batch_repeat_interleave(num_beams)
        model.generate(
            ids,
            attention_mask=mask,
            **{CACHE: cache},
            do_sample=False,
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            min_new_tokens=max_new_tokens,
        )
        cache.reset()
        cache.pool.trim()
        audit.observe("reset and trim")
    return audit
