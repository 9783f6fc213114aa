"""Choices behind rows that are cached, computed packed, and the scores of their tokens."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

from hf_paged._transformers import CACHE
from hf_paged.batch.padding import Counts
from hf_paged.batch.prompt.packed_prompt import PackedPrompt
from hf_paged.batch.sequences import Sequences
from hf_paged.cache.layer import layers_over
from hf_paged.errors import OutOfPagesError

_LOGITS = 2**25  # of a pass: 128 MiB in float32, and some times as much while they are compared


class Score(NamedTuple):
    """What a model makes of a choice.

    Attributes:
        log_probability: of all its tokens behind its context, nats.
        is_greedy: whether each of its tokens is the likeliest one behind those before it.
    """

    log_probability: float
    is_greedy: bool


@dataclass(frozen=True)
class Choices:
    """Tokens behind rows.

    Attributes:
        rows: for each choice the row that it goes on from.
        tokens: of each choice, `(num_tokens,)`.
    """

    rows: list[int]
    tokens: list[Counts]

    def __len__(self) -> int:
        return len(self.rows)

    def halves(self) -> tuple["Choices", "Choices"]:
        """The first half of them, and the others."""
        middle = len(self) // 2
        return Choices(self.rows[:middle], self.tokens[:middle]), Choices(self.rows[middle:], self.tokens[middle:])


def score_behind(
    model: Any, sequences: Sequences, ids: Counts, mask: Counts, choices: Choices, max_tokens: int
) -> list[Score]:
    """Score choices behind rows, as many at once as there are pages for.

    Args:
        model: whose rows can be packed.
        sequences: the rows, of which all columns but the last one are cached; they stay as they are.
        ids: `(num_rows, num_columns)` their tokens.
        mask: like `ids`, 0 for padding, which is not in the last column.
        choices: at least one.
        max_tokens: that are computed at once.

    Raises:
        OutOfPagesError: if there are too few pages for one of the choices.
    """
    try:
        return _score_at_once(model, sequences, ids, mask, choices, max_tokens)
    except OutOfPagesError:
        if len(choices) == 1:
            raise
    return [
        score for half in choices.halves() for score in score_behind(model, sequences, ids, mask, half, max_tokens)
    ]


def _score_at_once(
    model: Any, sequences: Sequences, ids: Counts, mask: Counts, choices: Choices, max_tokens: int
) -> list[Score]:
    # What scores a choice's tokens is the token before each: the context's last one, and its own without the last.
    lengths = np.array([len(tokens) for tokens in choices.tokens])
    new_mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
    new_ids = np.zeros_like(new_mask)
    new_ids[:, 0] = ids[choices.rows, -1]
    for row, tokens in enumerate(choices.tokens):
        new_ids[row, 1 : len(tokens)] = tokens[:-1]
    whole_ids = torch.from_numpy(np.concatenate([ids[choices.rows, :-1], new_ids], axis=1))
    whole_mask = torch.from_numpy(np.concatenate([mask[choices.rows, :-1], new_mask], axis=1))
    chunk = min(max_tokens, max(1, _LOGITS // model.config.get_text_config(decoder=True).vocab_size))
    repeated = Sequences(sequences.pool)
    try:
        repeated.become_fork_of(sequences)
        repeated.select(choices.rows)
        packed = PackedPrompt(repeated, whole_ids, whole_mask, chunk)
        try:
            return _score_packed(model, packed, lengths, np.concatenate(choices.tokens), chunk)
        finally:
            packed.close()
    finally:
        repeated.clear()


def _score_packed(model: Any, packed: PackedPrompt, lengths: Counts, targets: Counts, chunk: int) -> list[Score]:
    """Compute the rows of a packed prompt, all in one wave, and score what follows each of their new tokens.

    Args:
        model: whose rows they are.
        packed: the rows.
        lengths: `(num_choices,)` new tokens of each row.
        targets: `(sum of lengths,)` what follows each of them.
        chunk: tokens that are computed at once.
    """
    packed.next_wave()
    computed = np.zeros(packed.stand_ins.max() + 1, dtype=np.int64)
    computed[packed.stand_ins] = lengths
    begins = (computed.cumsum() - computed)[packed.stand_ins]
    ends = lengths.cumsum()
    queries = np.repeat(begins - (ends - lengths), lengths) + np.arange(ends[-1])
    log_probabilities, are_greedy = np.empty(ends[-1]), np.empty(ends[-1], dtype=bool)
    cache = Cache(layers=layers_over(packed.sequences))
    for first in range(0, packed.num_tokens, chunk):
        logits = _logits(model, cache, packed, first, min(chunk, packed.num_tokens - first))
        scored = np.flatnonzero((queries >= first) & (queries < first + chunk))
        at = torch.from_numpy(queries[scored] - first).to(logits.device)
        expected = torch.from_numpy(targets[scored]).to(logits.device)
        log_probabilities[scored] = logits.log_softmax(-1, dtype=torch.float32)[at, expected].cpu().numpy()
        are_greedy[scored] = (logits.argmax(-1)[at] == expected).cpu().numpy()
    return [
        Score(float(log_probabilities[end - length : end].sum()), bool(are_greedy[end - length : end].all()))
        for end, length in zip(ends, lengths, strict=True)
    ]


def _logits(model: Any, cache: Cache, packed: PackedPrompt, first: int, num_tokens: int) -> Tensor:
    """Compute some tokens, and return `(num_tokens, vocab_size)`."""
    chunk = packed.begin(first, num_tokens)
    ids, positions = torch.from_numpy(np.stack([chunk.ids, chunk.places])).to(model.device)
    logits: Tensor = model(input_ids=ids[None], position_ids=positions[None], **{CACHE: cache}, use_cache=True).logits
    packed.end()
    return logits[0]
