"""A batch of prompts of different lengths, run under a memory audit."""

from collections.abc import Sequence
from typing import Any

from hf_paged._transformers import CACHE
from hf_paged.cache.paged import PagedCache
from hf_paged.tools.evaluation.audit import MemoryAudit
from hf_paged.tools.lab.candidate import candidates
from hf_paged.tools.lab.subject import Subject


def audit_batch(
    subject: Subject,
    prompt_lengths: Sequence[int],
    *,
    page_size: int,
    max_new_tokens: int,
    num_beams: int = 1,
    max_length: int | None = None,
) -> MemoryAudit:
    """Prefill the prompts packed, generate, then give all memory back, and account for every step of it.

    Args:
        subject: what is run.
        prompt_lengths: in tokens.
        page_size: tokens per page.
        max_new_tokens: that every row gets; no row ends early.
        num_beams: of each prompt; 1: greedy decoding.
        max_length: columns of the `StaticCache` to compare with; None: just those that are used.

    Raises:
        ValueError: for lengths below 1 or beyond what the model or `max_length` has room for, or fewer than 1 new
            token or beam; nothing was run.
    """
    if max_new_tokens < 1 or num_beams < 1 or not prompt_lengths or min(prompt_lengths) < 1:
        raise ValueError(
            f"max_new_tokens={max_new_tokens}, num_beams={num_beams} and prompt_lengths={list(prompt_lengths)} were "
            "asked for; there must be 1 new token, 1 beam, 1 prompt and 1 token in each, at least."
        )
    num_columns = max(prompt_lengths) + max_new_tokens
    room = subject.max_length if max_length is None else min(max_length, subject.max_length)
    if num_columns > room:
        raise ValueError(
            f"A prompt of {max(prompt_lengths)} tokens and {max_new_tokens} new ones need {num_columns} columns, but "
            f"there is room for {room}. Ask for less, or for a larger max_length up to {subject.max_length}."
        )
    (paged,) = candidates(subject.model, ["paged"], page_size)
    model: Any = paged.model
    cache = paged.new_cache(num_columns)
    assert isinstance(cache, PagedCache)
    ids, mask = subject.padded(prompt_lengths)
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
