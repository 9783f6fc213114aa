"""What one token of each row reads while decoding on a CPU, piece by piece.

A unit is a piece of a page of one row. Threads get equal shares of the units, whichever rows these are of, and what
they find in them is put together row by row afterwards. Pieces are small: what is read for one query head is still at
hand for the next one, and of the last page no more is read than is filled, about.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_paged.batch.columns import Counts
from hf_paged.pages.block_table import PageTable

_MAX_SIZE = 32  # tokens: with 64 values each, keys of a unit take a quarter of a processor's first cache
_MIN_UNITS = 2  # a size of 1 would need a kernel of its own


@dataclass
class Units:
    """The pieces of pages that a step reads, on the CPU. A unit that no row has may be among them.

    Attributes:
        size: tokens per unit; a page has as many or a multiple.
        pieces: `(num_units,)` int64, the slots of the pool in pieces of `size`, in ascending order: the next piece in
            memory is the next one to be read, and one that several rows share is read for all of them.
        rows: `(num_units,)` int64, whose piece it is.
        firsts: `(num_units,)` int32, tokens at the beginning of the piece that are not seen.
        limits: `(num_units,)` int32, tokens of the piece before the first one behind those that are seen.
        by_row: `(num_places, num_rows)` int64, the units of each row; any behind its last one.
        counts: `(num_rows,)` int64, units of each row.
    """

    size: int
    pieces: Tensor
    rows: Tensor
    firsts: Tensor
    limits: Tensor
    by_row: Tensor
    counts: Tensor


class DecodeUnits:
    """Makes the units of each step, anew only if a row reads other pieces than in the step before.

    Args:
        table: the rows.
    """

    def __init__(self, table: PageTable) -> None:
        self._table = table
        self._size = min(table.group.page_size, _MAX_SIZE)
        self._state: tuple[int, bytes] = (-1, b"")

    def fill(self, limits: Counts, firsts: Counts | None) -> Units:
        """Return the units of rows that see tokens from `firsts` to `limits`, both `(num_rows,)`; None: from 0."""
        ends = -(-limits // self._size)
        begins = np.zeros_like(ends) if firsts is None else np.minimum(firsts // self._size, ends)
        state = self._table.version, ends.tobytes() + begins.tobytes()
        if state != self._state:
            self._cut(begins, ends)
            self._state = state
        rows = self._read_rows
        self._limits[self._last_units] = (limits - (ends - 1) * self._size)[rows]
        if firsts is not None:
            self._firsts[self._first_units] = (firsts - begins * self._size)[rows]
        return self._units

    def _cut(self, begins: Counts, ends: Counts) -> None:
        counts = ends - begins
        num_units, num_rows = int(counts.sum()), len(counts)
        rows = np.repeat(np.arange(num_rows), counts)
        offsets = np.arange(num_units) - np.repeat(counts.cumsum() - counts, counts)
        num_pieces = self._table.group.page_size // self._size
        pages, parts = np.divmod(offsets + begins[rows], num_pieces)
        pieces = self._table.block_table[rows, pages] * np.int64(num_pieces) + parts
        order = np.argsort(pieces, kind="stable")
        by_row = np.zeros((max(_MIN_UNITS, int(counts.max(initial=0))), num_rows), dtype=np.int64)
        by_row[offsets[order], rows[order]] = np.arange(num_units)
        self._read_rows = np.flatnonzero(counts)
        self._first_units = by_row[0, self._read_rows]
        self._last_units = by_row[counts[self._read_rows] - 1, self._read_rows]
        size = max(_MIN_UNITS, num_units)
        unit_pieces, unit_rows = np.zeros((2, size), dtype=np.int64)
        unit_pieces[:num_units], unit_rows[:num_units] = pieces[order], rows[order]
        self._firsts = np.zeros(size, dtype=np.int32)
        self._limits = np.full(size, self._size, dtype=np.int32)
        arrays = unit_pieces, unit_rows, self._firsts, self._limits, by_row, counts
        with torch.inference_mode(False):  # they outlive the mode that they are made in
            self._units = Units(self._size, *map(torch.from_numpy, arrays))
