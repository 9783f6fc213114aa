"""Drafts that are found in what a row has said before."""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np
import torch

from hf_paged.batch.padding import Counts
from hf_paged.decoding.many.row import Row
from hf_paged.decoding.speculate.lookup import Lookup, PromptLookup
from hf_paged.decoding.speculate.text import Text


class LookedUp:
    """Looks for the last tokens of each row further up.

    Args:
        lookup: how.
    """

    cost = 0.0

    def __init__(self, lookup: PromptLookup) -> None:
        self.num_tokens = lookup.num_tokens
        self._lookup = lookup
        self._said: WeakKeyDictionary[Row, tuple[Text, Lookup]] = WeakKeyDictionary()  # of rows that wait, too

    def available(self, rows: Sequence[Row]) -> Counts:
        """See `RowDrafter`."""
        return np.array([self._read(row).available()[0] for row in rows])

    def foreseen(self, rows: Sequence[Row]) -> Counts:
        """See `RowDrafter`."""
        return np.array([self._said[row][1].foreseen()[0] for row in rows])

    def draft(self, rows: Sequence[Row], counts: Counts) -> list[list[int]]:
        """See `RowDrafter`."""
        return [
            self._said[row][1].draft(counts[place : place + 1]).tokens[0].tolist() for place, row in enumerate(rows)
        ]

    def keep(self, rows: Sequence[Row]) -> None:
        """See `RowDrafter`."""

    def close(self) -> None:
        """See `RowDrafter`."""

    def _read(self, row: Row) -> Lookup:
        """Know what a row has said by now."""
        if row not in self._said:
            text = Text(torch.tensor([row.ids]))
            self._said[row] = text, self._lookup.of(text)
        text, found = self._said[row]
        new = np.array([row.ids[int(text.known[0]) :]], dtype=np.int64)
        text.add(new, np.array([new.shape[1]]))
        return found
