"""Scores of choices behind contexts, each of which is computed once."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from hf_paged._transformers import CACHE, model_in
from hf_paged.batch.padding import Counts
from hf_paged.cache.layer import layers_over
from hf_paged.cache.paged import PagedCache
from hf_paged.cache.prompt.checks import check_rotary
from hf_paged.cache.prompt.packable import check_model, check_prompt
from hf_paged.cache.prompt.prefill import first_pass_settings, usual_chunk
from hf_paged.enabling.api import generating_model, pool_for_prompts
from hf_paged.errors import NotPackable, OutOfPagesError
from hf_paged.pages.pool import PagePool
from hf_paged.scoring.packed_choices import Choices, Score, score_behind

Tokens = Sequence[int]


def score_choices(
    model: torch.nn.Module,
    contexts: Sequence[Tokens],
    choices: Sequence[Sequence[Tokens]],
    pool: PagePool | None = None,
    *,
    max_tokens: int | None = None,
) -> list[list[Score]]:
    """Return the log-probability of each choice behind its context.

    A context is computed once, however many choices it has, and what it shares with those before it is taken from the
    prefix cache of the pool. Contexts are computed packed, some at a time, and then their choices, which share the
    pages of the context: with 4 choices of 8 tokens behind 500, 499 tokens are computed, and then 32. Equal choices
    are computed once, and so is the last token of a context whose choices have one token each.

    Args:
        model: a decoder set to `"paged_flex"`, as `hf_paged.enable` does it, or a PEFT model of one.
        contexts: token ids; at least one in each, behind which the first token of a choice is scored.
        choices: for each context the token ids of each choice, at least one in each.
        pool: where the pages are; None: that of the model if it is enabled, else one for this call.
        max_tokens: tokens that are computed at once, and the tokens of the contexts and choices whose pages are held
            at once, unless those of a single context are more. Fewer are held if pages run short. None: 1536 on a CPU,
            4096 elsewhere. Where a vocabulary is large, less of the choices is computed at once.

    Returns:
        For each context a `Score` for each of its choices.

    Raises:
        OutOfPagesError: if a context and one of its choices don't fit into the pool.
        ValueError: for what is no list of token ids, for empty ones, or a model whose rows can't be packed.
    """
    wholes = [_token_ids(context, f"Context {index}") for index, context in enumerate(contexts)]
    if len(wholes) != len(choices):
        raise ValueError(
            f"{len(wholes)} contexts were given, but choices for {len(choices)}. Give a list of choices for each."
        )
    answers = [
        [_token_ids(choice, f"Choice {number} of context {index}") for number, choice in enumerate(own)]
        for index, own in enumerate(choices)
    ]
    model = model_in(model, "score_choices()")
    inner = generating_model(model, "score_choices()")
    if inner.config.is_encoder_decoder:
        raise ValueError(
            f"{type(inner).__name__} has an encoder, but score_choices() scores what a decoder makes of a context and "
            "the choice behind it. Call the model with labels."
        )
    scores: list[list[Score]] = [[] for _ in wholes]
    asked = [index for index, own in enumerate(answers) if own]
    if not asked:
        return scores
    pool = pool_for_prompts(model) if pool is None else pool
    max_tokens = usual_chunk(inner.device) if max_tokens is None else max_tokens
    sizes = [len(wholes[index]) + sum(map(len, answers[index])) for index in asked]
    longest = max(len(wholes[index]) + max(map(len, answers[index])) for index in asked)
    begin, most = 0, len(asked)
    try:
        _check_packable(model, pool, np.append(wholes[asked[0]], answers[asked[0]][0][0]), longest)
        while begin < len(asked):
            num_fitting = int((np.cumsum(sizes[begin : begin + most]) <= max_tokens).sum())
            group = asked[begin : begin + max(1, num_fitting)]
            own = [wholes[index] for index in group], [answers[index] for index in group]
            try:
                found = _score_group(model, pool, *own, max_tokens)
            except OutOfPagesError as error:
                if len(group) > 1:
                    most = len(group) // 2
                    continue
                raise OutOfPagesError(
                    f"Context {group[0]}, of {len(own[0][0])} tokens, does not fit into the pool with one of its "
                    f"choices. {error}"
                ) from error
            for index, row in zip(group, found, strict=True):
                scores[index] = row
            begin += len(group)
    except NotPackable as reason:
        raise NotPackable(
            f"score_choices() computes contexts and choices packed, but those of {type(model).__name__} can't be, as "
            f'{reason}. Set a decoder to "paged_flex" by hf_paged.enable(model); others have to be called with each '
            "context and choice."
        ) from reason
    return scores


@torch.no_grad()
def _score_group(
    model: Any, pool: PagePool, contexts: list[Counts], choices: list[list[Counts]], max_tokens: int
) -> list[list[Score]]:
    """Compute some contexts packed, and then their choices."""
    inner = generating_model(model, "score_choices()")
    rows = [torch.from_numpy(context) for context in contexts]
    ids = pad_sequence(rows, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    with PagedCache(pool=pool) as cache:
        cache.prefill(model, ids.to(inner.device), mask.to(inner.device), max_tokens=max_tokens)
        behind = Choices(
            [index for index, own in enumerate(choices) for _ in own], [choice for own in choices for choice in own]
        )
        scores = iter(score_behind(inner, cache._sequences, ids.numpy(), mask.numpy(), behind, max_tokens))
    return [[next(scores) for _ in own] for own in choices]


def _check_packable(model: Any, pool: PagePool, ids: Counts, longest: int) -> None:
    """Let `generate()` prepare a prompt, and refuse a model that is told more than ids, their places and padding.

    Raises:
        NotPackable: if it is.
    """
    was_called = False

    def check(
        generating: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **inputs: Any,
    ) -> torch.Tensor:
        nonlocal was_called
        was_called = True
        check_rotary(check_model(generating), longest)
        check_prompt(generating, layers_over(cache._sequences), input_ids, inputs, 0)
        return input_ids

    cache = PagedCache(pool=pool)
    prompt = torch.from_numpy(ids)[None].to(model.device)
    given = {CACHE: cache, "attention_mask": torch.ones_like(prompt)}
    model.generate(prompt, generation_config=first_pass_settings(model, len(ids)), custom_generate=check, **given)
    if not was_called:
        raise NotPackable("it generates in a way of its own")


def _token_ids(values: Tokens, name: str) -> Counts:
    ids = np.asarray(values)
    if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
        raise ValueError(
            f"{name} is {values!r:.60}, but it has to be a list of token ids, such as tokenizer(text).input_ids."
        )
    if not len(ids):
        raise ValueError(
            f"{name} is empty, but a score takes a token in front, such as tokenizer.bos_token_id, and one to score."
        )
    return ids.astype(np.int64)
