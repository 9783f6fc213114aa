"""Logits processors, applied to several positions of rows that are not equally far."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import LogitsProcessorList

from hf_paged.batch.padding import Counts
from hf_paged.decoding.speculate.text import Text


def _classes(*names: str) -> frozenset[type]:
    return frozenset(getattr(transformers, name) for name in names if hasattr(transformers, name))


_OF_SCORES = _classes(
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TopHLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
    "SuppressTokensLogitsProcessor",
)
"""What these return for a row depends on its scores alone."""

_OF_ROWS = _classes(
    "RepetitionPenaltyLogitsProcessor",
    "NoRepeatNGramLogitsProcessor",
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "NoBadWordsLogitsProcessor",
    "SequenceBiasLogitsProcessor",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "SuppressTokensAtBeginLogitsProcessor",
    "ExponentialDecayLengthPenalty",
)
"""And of these on its ids, too, whatever other rows there are, and in whatever order they are called."""


def takes_rows_apart(processors: Any) -> bool:
    """Whether processors may be called for some of the rows, and for positions that turn out not to be wanted."""
    return all(type(one) in _OF_SCORES | _OF_ROWS for one in processors)


def of_scores(processors: Any) -> LogitsProcessorList:
    """Those that look at scores alone."""
    return LogitsProcessorList([one for one in processors if type(one) in _OF_SCORES])


def by_length(rows: Counts, lengths: Counts) -> Iterator[tuple[Counts, int]]:
    """Give places of `rows` that are equally long, and their length.

    Args:
        rows: `(n,)`.
        lengths: `(n,)`.
    """
    for length in np.unique(lengths).tolist():
        yield np.flatnonzero(lengths == length), length


def process(processors: Any, text: Text, rows: Counts, lengths: Counts, logits: Tensor) -> Tensor:
    """Return the scores of tokens behind beginnings of rows, as `generate()` has them of these.

    Args:
        processors: for which `takes_rows_apart`.
        text: of the rows.
        rows: `(n,)`.
        lengths: `(n,)` columns of each beginning.
        logits: `(n, vocab_size)`, float32; may be changed.
    """
    if all(type(one) in _OF_SCORES for one in processors):
        ids = text.up_to(1, rows)
        for processor in processors:
            logits = processor(ids, logits)
        return logits
    scores = logits
    for places, length in by_length(rows, lengths):
        ids, own = text.up_to(length, rows[places]), logits[places]
        for processor in processors:
            own = _for_rows(processor, rows[places])(ids, own)
        scores[places] = own
    return scores


def _for_rows(processor: Any, rows: Counts) -> Any:
    """A processor that knows something of each row, for some of them."""
    ignored = getattr(processor, "prompt_ignore_length", None)
    if not isinstance(ignored, Tensor):
        return processor
    chosen = copy.copy(processor)
    chosen.prompt_ignore_length = ignored[torch.from_numpy(rows).to(ignored.device)]
    return chosen
