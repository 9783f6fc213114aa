"""Which rows have ended, and where."""

import math
from typing import Any

import numpy as np
from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria

from hf_paged.batch.padding import BoolVector, Counts
from hf_paged.decoding.speculate.processing import by_length
from hf_paged.decoding.speculate.text import Text

_OF_ROWS = EosTokenCriteria, MaxLengthCriteria, StopStringCriteria


class Ends:
    """Where rows end.

    As in `generate()`, rows that have ended are filled up with padding where a token may end them; otherwise they go
    on until all have ended, and no further, since layers with a window could not take that back.

    Args:
        criteria: what ends rows.
        text: of the rows.
        pad_token: what fills up those that have ended; None without.

    Attributes:
        max_length: columns at which all rows end.
        pads: whether rows that have ended are filled up.
        have_ended: `(num_rows,)`.
    """

    def __init__(self, criteria: Any, text: Text, pad_token: Tensor | None) -> None:
        self._criteria = list(criteria)
        self._text = text
        self.max_length: float = min(
            (one.max_length for one in criteria if type(one) is MaxLengthCriteria), default=math.inf
        )
        eos = [one.eos_token_id.view(-1).cpu().numpy() for one in criteria if type(one) is EosTokenCriteria]
        self._eos = np.concatenate(eos) if eos else np.zeros(0, dtype=np.int64)
        self._strings = [one for one in criteria if type(one) is StopStringCriteria]
        self.pads = any(hasattr(one, "eos_token_id") for one in criteria)
        self.pad_token = 0 if pad_token is None else int(pad_token)
        self.have_ended: BoolVector = np.zeros(len(text.ids), dtype=bool)
        self._first_end = np.zeros(len(text.ids), dtype=np.int64)

    @property
    def are_of_rows(self) -> bool:
        """Whether it can be said of each row by itself, and of its tokens alone, whether it ends."""
        return all(type(one) in _OF_ROWS for one in self._criteria)

    @property
    def are_going(self) -> BoolVector:
        """`(num_rows,)` rows that go on."""
        has_room: BoolVector = self.room > 0
        return has_room & ~self.have_ended if self.pads else has_room

    @property
    def room(self) -> Counts:
        """`(num_rows,)` tokens that each row may still get, those that have ended if they are not filled up."""
        known, are_short = self._text.known, ~self.have_ended
        # The slowest of the others gets one in any case.
        length = known[are_short].min() + 1 if are_short.any() else self._first_end.max()
        limit = min(self.max_length, 2**62)
        room: Counts = np.where(are_short, limit, np.minimum(limit, length)).astype(np.int64) - known
        return np.maximum(room, 0)

    @property
    def length(self) -> int | None:
        """Columns of all rows once they have all ended, and are as long; None before."""
        if not self.have_ended.all():
            return None
        length = int(self._first_end.max())
        return length if self.pads or int(self._text.known.min()) >= length else None

    def add(self, tokens: Counts, counts: Counts) -> Counts:
        """Add tokens to the text, up to the end of each row; return `(num_rows,)` how many.

        Args:
            tokens: `(num_rows, any)`.
            counts: `(num_rows,)` how many there are of each.
        """
        text = self._text
        text.guess(tokens)
        order = np.arange(tokens.shape[1])
        lengths = text.known[:, None] + order + 1
        is_end = (np.isin(tokens, self._eos) | (lengths >= self.max_length)) & (order < counts[:, None])
        rows, columns = np.nonzero(order < counts[:, None])
        for places, length in by_length(rows, lengths[rows, columns]) if self._strings else ():
            ids = text.up_to(length, rows[places])
            for criterion in self._strings:
                is_end[rows[places], columns[places]] |= criterion(ids, None).cpu().numpy()
        ends: BoolVector = np.asarray(is_end.any(axis=1))
        kept = np.where(ends & self.are_going, np.minimum(counts, is_end.argmax(axis=1) + 1), counts)
        kept = np.where(self.have_ended, np.minimum(counts, self.room), kept)
        text.add(tokens, kept)
        self._end(ends)
        return kept

    def add_column(self, tokens: Counts, scores: Any) -> None:
        """Add one token to each of the rows, which are equally long, and ask all criteria, as `generate()` does.

        Args:
            tokens: `(num_rows,)`.
            scores: as criteria are given them.
        """
        text = self._text
        text.add(tokens[:, None], np.ones_like(tokens))
        ids = text.up_to(int(text.known[0]))
        is_end = np.zeros_like(self.have_ended)
        for criterion in self._criteria:
            is_end |= criterion(ids, scores).cpu().numpy()
        self._end(is_end)

    def _end(self, are_ending: BoolVector) -> None:
        are_new = are_ending & ~self.have_ended
        self._first_end[are_new] = self._text.known[are_new]
        self.have_ended |= are_new
