"""Drafts that are found in what a row has said before."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from hf_paged.batch.padding import BoolMatrix, Counts
from hf_paged.decoding.speculate.drafts import Drafts, check_positive, prompt_mask
from hf_paged.decoding.speculate.loop import speculate
from hf_paged.decoding.speculate.text import Text

_LEAST = 2  # a single token says too little of what follows


class Lookup:
    """Looks for the last tokens of a row further up, and drafts what followed there.

    Each run of tokens is put into a dictionary once, so that a step looks into it at most `max_ngram` times for each
    row, however long the rows are.

    Args:
        text: of the rows.
        mask: `(num_rows, num_prompt)` which columns of the prompt are tokens; None: all.
        max_ngram: the longest run that is looked for; shorter ones if that is not there.

    Source:
        Prompt lookup decoding: Saxena, 2023; latest occurrence first, longest run first.
    """

    cost = 0.0

    def __init__(self, text: Text, mask: BoolMatrix | None, max_ngram: int) -> None:
        self._text = text
        self._lengths = range(max_ngram, min(_LEAST, max_ngram) - 1, -1)
        is_token = np.ones((len(text.ids), text.num_prompt), dtype=bool) if mask is None else mask
        prompts = [row[own] for row, own in zip(text.ids[:, : text.num_prompt], is_token, strict=True)]
        self._rows: list[list[int]] = [prompt.tolist() for prompt in prompts]
        self._read = [text.num_prompt] * len(self._rows)
        self._found: list[dict[tuple[int, ...], int]] = [{} for _ in self._rows]
        self._indexed = [0] * len(self._rows)
        self._places: list[int] = []

    def available(self) -> Counts:
        """See `Drafter`."""
        self._places = [self._look(row) for row in range(len(self._rows))]
        return np.array([len(own) - place for own, place in zip(self._rows, self._places, strict=True)])

    def foreseen(self) -> Counts:
        """See `Drafter`."""
        return np.array(
            [own[place] if place < len(own) else -1 for own, place in zip(self._rows, self._places, strict=True)]
        )

    def draft(self, counts: Counts) -> Drafts:
        """See `Drafter`."""
        tokens = np.zeros((len(counts), int(counts.max(initial=0))), dtype=np.int64)
        for row in np.flatnonzero(counts).tolist():
            place = self._places[row]
            tokens[row, : counts[row]] = self._rows[row][place : place + int(counts[row])]
        return Drafts(tokens, counts)

    def close(self) -> None:
        """See `Drafter`."""

    def _look(self, row: int) -> int:
        """Return where a row goes on that said the same before; its length if it did not."""
        own, found = self._rows[row], self._found[row]
        known = int(self._text.known[row])
        own.extend(self._text.ids[row, self._read[row] : known].tolist())
        self._read[row] = known
        # Runs that end before the last token, which is what is looked for.
        for end in range(self._indexed[row] + 1, len(own)):
            for length in self._lengths:
                if length <= end:
                    found[tuple(own[end - length : end])] = end
        self._indexed[row] = max(0, len(own) - 1)
        for length in self._lengths:
            place = found.get(tuple(own[-length:]))
            if place is not None and length <= len(own):
                return place
        return len(own)


def prompt_lookup(num_tokens: int = 10, max_ngram: int = 3) -> "PromptLookup":
    """Decode with drafts that are found in what each row has said: `generate(..., custom_generate=prompt_lookup())`.

    Where a row repeats its prompt or itself, one pass gives several of its tokens, in batches of any size: each row
    keeps what was right of its own drafts. Greedy decoding gives the tokens that it gives without drafts (as far as
    logits of several tokens in one pass round alike), and sampling draws from the same distribution. How many tokens
    are drafted follows from what came of the last ones; where nothing repeats hardly any are.

    The model is a decoder with `attn_implementation="paged_flex"` and a `PagedCache`, which afterwards holds the
    tokens that are returned, but for the last. Processors and criteria of your own are given what `generate()` gives
    them; then all rows go on by as many tokens as the slowest one, and a log message says so.

    Args:
        num_tokens: to draft at most for each row.
        max_ngram: last tokens of a row that are looked for further up, at most; runs of two at least.

    Returns:
        What `generate()` takes as `custom_generate`.

    Raises:
        ValueError: if one of them is less than 1. By `generate()`, before anything is computed: for what can't be done
            with drafts.
    """
    check_positive("num_tokens", num_tokens)
    check_positive("max_ngram", max_ngram)

    return PromptLookup(num_tokens, max_ngram)


@dataclass(frozen=True)
class PromptLookup:
    """What `prompt_lookup` returns, with its arguments."""

    num_tokens: int
    max_ngram: int

    def __call__(self, model: PreTrainedModel, input_ids: Tensor, **arguments: Any) -> Any:
        """Decode as `hf_paged.sample` does, with drafts."""
        return speculate(self._make, self.num_tokens, model, input_ids, **arguments)

    def of(self, text: Text) -> Lookup:
        """What drafts for rows without padding."""
        return Lookup(text, None, self.max_ngram)

    def _make(self, model: Any, text: Text, inputs: dict[str, Any], *args: Any) -> Lookup:
        return Lookup(text, prompt_mask(text, inputs), self.max_ngram)
