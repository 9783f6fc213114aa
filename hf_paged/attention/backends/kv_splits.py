"""What one token of each row reads while decoding on a CPU, piece by piece.

A KV split is a piece of a page of one row. Threads get equal shares of the splits, whichever rows these are of, and
what they find in them is put together row by row afterwards. Pieces are small: what is read for one query head
is still at hand for the next one, and of the last page no more is read than is filled, about.
"""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from hf_paged.batch.padding import Counts
from hf_paged.batch.steps.step import KVRanges
from hf_paged.pages.block_table import BlockTable

_MAX_SIZE = 32  # tokens: with 64 values each, keys of a split take a quarter of a processor's first cache
_MIN_SPLITS = 2  # a size of 1 would need a kernel of its own


@dataclass
class KVSplits:
    """The pieces of pages that a step reads, on the CPU. A KV split that no row has may be among them.

    Attributes:
        size: tokens per split; a page has as many or a multiple.
        pieces: `(num_splits,)` int64, the slots of the pool in pieces of `size`, in ascending order: the next piece in
            memory is the next one to be read, and one that several rows share is read for all of them.
        rows: `(num_splits,)` int64, whose piece it is.
        kv_start: `(num_splits,)` int32, tokens at the beginning of the piece that are not seen.
        kv_stop: `(num_splits,)` int32, tokens of the piece before the first one behind those that are seen.
        by_row: `(num_places, num_rows)` int64, the splits of each row; any behind its last one.
        counts: `(num_rows,)` int64, splits of each row.
    """

    size: int
    pieces: Tensor
    rows: Tensor
    kv_start: Tensor
    kv_stop: Tensor
    by_row: Tensor
    counts: Tensor


_builders: WeakKeyDictionary[BlockTable, dict[int | None, "_Builder"]] = WeakKeyDictionary()


def kv_splits_of(table: BlockTable, ranges: KVRanges) -> KVSplits:
    """Cut what the only query of each row sees; the next step changes what this returned.

    Args:
        table: the rows whose pages are read.
        ranges: of one query for each row.
    """
    builders = _builders.setdefault(table, {})
    builder = builders.get(ranges.window)
    if builder is None:
        builder = builders[ranges.window] = _Builder(table.group.page_size)
    return builder.fill(table, ranges.kv_stop[:, 0], None if ranges.kv_start is None else ranges.kv_start[:, 0])


class _Builder:
    """Makes the splits of each step, anew only if a row reads other pieces than in the step before.

    It doesn't hold the rows, which are freed as soon as nobody else does.
    """

    def __init__(self, page_size: int) -> None:
        self._size = min(page_size, _MAX_SIZE)
        self._num_pieces = page_size // self._size
        self._state: tuple[int, bytes] = (-1, b"")

    def fill(self, table: BlockTable, kv_stop: Counts, kv_start: Counts | None) -> KVSplits:
        ends = -(-kv_stop // self._size)
        begins = np.zeros_like(ends) if kv_start is None else np.minimum(kv_start // self._size, ends)
        state = table.version, ends.tobytes() + begins.tobytes()
        if state != self._state:
            self._cut(table, begins, ends)
            self._state = state
        rows = self._read_rows
        self._kv_stop[self._last_splits] = (kv_stop - (ends - 1) * self._size)[rows]
        if kv_start is not None:
            self._kv_start[self._first_splits] = (kv_start - begins * self._size)[rows]
        return self._splits

    def _cut(self, table: BlockTable, begins: Counts, ends: Counts) -> None:
        counts = ends - begins
        num_splits, num_rows = int(counts.sum()), len(counts)
        rows = np.repeat(np.arange(num_rows), counts)
        offsets = np.arange(num_splits) - np.repeat(counts.cumsum() - counts, counts)
        pages, parts = np.divmod(offsets + begins[rows], self._num_pieces)
        pieces = table.block_table[rows, pages] * np.int64(self._num_pieces) + parts
        order = np.argsort(pieces, kind="stable")
        by_row = np.zeros((max(_MIN_SPLITS, int(counts.max(initial=0))), num_rows), dtype=np.int64)
        by_row[offsets[order], rows[order]] = np.arange(num_splits)
        self._read_rows = np.flatnonzero(counts)
        self._first_splits = by_row[0, self._read_rows]
        self._last_splits = by_row[counts[self._read_rows] - 1, self._read_rows]
        size = max(_MIN_SPLITS, num_splits)
        split_pieces, split_rows = np.zeros((2, size), dtype=np.int64)
        split_pieces[:num_splits], split_rows[:num_splits] = pieces[order], rows[order]
        self._kv_start = np.zeros(size, dtype=np.int32)
        self._kv_stop = np.full(size, self._size, dtype=np.int32)
        arrays = split_pieces, split_rows, self._kv_start, self._kv_stop, by_row, counts
        with torch.inference_mode(False):  # they outlive the mode that they are made in
            self._splits = KVSplits(self._size, *map(torch.from_numpy, arrays))
