"""Tiles for one query per row, so one tile per row, whose tensors stay and whose contents change."""

from abc import ABC, abstractmethod

import numpy as np
import torch

from hf_paged.columns import Counts
from hf_paged.page_table import PageTable
from hf_paged.tiles import MIN_WIDTH, Layout, Tiles, listed, pages_in_window


class DecodeTiles(ABC):
    """The tensors for one number of rows, and how to fill them.

    Args:
        table: the rows.
        num_rows: how many they are.
        window: tokens that a query sees at most; None without a bound.
        layout: what the tiles are to be like.
    """

    def __init__(self, table: PageTable, num_rows: int, window: int | None, layout: Layout) -> None:
        self._table = table
        self._num_rows = num_rows
        self._block_table = table.block_table
        self._page_index = table.group.page_index(layout.device)
        self._window = window
        self._layout = layout
        self._rows = np.arange(num_rows)
        with torch.inference_mode(False):  # they outlive the mode that they are made in
            self.tiles = self._allocate()

    @staticmethod
    def of(table: PageTable, num_rows: int, window: int | None, layout: Layout) -> "DecodeTiles":
        """Make those that the layout wants; arguments as for the class."""
        kind = _TwoLists if layout.lists_full else _OneList
        return kind(table, num_rows, window, layout)

    def fit(self, table: PageTable, num_rows: int) -> bool:
        """Whether these can describe the step."""
        return (
            self._block_table is table.block_table
            and self._page_index is table.group.page_index(self._layout.device)
            and self._num_rows == num_rows
        )

    @abstractmethod
    def _allocate(self) -> Tiles:
        """Make the tensors, for tiles that see nothing."""

    @abstractmethod
    def fill(self, limits: Counts, firsts: Counts | None) -> None:
        """Describe rows that see tokens from `firsts` to `limits`, both `(num_rows,)`; None: from the beginning."""


class _TwoLists(DecodeTiles):
    """On a CPU, where the kernel reads what is filled in.

    Without a window `full` is the block table itself, and a row's only partial page is its last one. With a window
    `full` is a list of its own, and the page where the window begins may be partial too.
    """

    def _allocate(self) -> Tiles:
        num_rows, layout = self._num_rows, self._layout
        num_full, num_partial = torch.zeros((2, num_rows), dtype=torch.int32)
        partial = layout.empty_lists(num_rows, 3, len(self._page_index))  # where a window begins, the last, the sink
        seen = torch.zeros((num_rows, layout.group, 2), dtype=torch.int32)
        if self._window is None:
            full = torch.from_numpy(self._block_table)
        else:
            width = max(MIN_WIDTH, self._window // self._table.group.page_size)
            full = torch.zeros((num_rows, width), dtype=torch.int32)
        # Views of the same memory: to make them takes as long as to fill them.
        self._written = tuple(tensor.numpy() for tensor in (num_full, num_partial, partial, seen, full))
        return Tiles(
            num_full=num_full.view(-1, 1, 1),
            full=full.view(num_rows, 1, 1, -1),
            num_partial=num_partial.view(-1, 1, 1),
            partial=partial.view(num_rows, 1, 1, -1),
            page_index=self._page_index,
            seen=seen,
            tile_length=1,
            tiles_per_row=1,
            group=layout.group,
        )

    def fill(self, limits: Counts, firsts: Counts | None) -> None:
        """See `DecodeTiles`."""
        page_size, rows = self._table.group.page_size, self._rows
        to_num_full, to_num_partial, partial, seen, full = self._written
        last, in_last = np.divmod(limits, page_size)
        num_full, num_partial = last, (in_last > 0).astype(np.int64)
        partial[:, 0] = self._block_table[rows, np.minimum(last, self._block_table.shape[1] - 1)]
        if firsts is not None:
            begin = firsts // page_size
            begin_full = -(-firsts // page_size)
            num_full = np.maximum(last - begin_full, 0)
            full[:] = listed(self._block_table, begin_full[:, None] + np.arange(full.shape[1]))
            # The window begins inside of a page other than the last one, or inside of one that is full otherwise.
            begins_inside = (firsts % page_size > 0) & (begin < last)
            inside = rows[begins_inside]
            partial[inside, num_partial[inside]] = self._block_table[inside, begin[inside]]
            num_partial = num_partial + begins_inside
            seen[:, :, 1] = firsts[:, None]
        if self._layout.sink_page is not None:
            partial[rows, num_partial] = self._layout.sink_page
            num_partial = num_partial + 1
        to_num_full[:] = num_full
        to_num_partial[:] = num_partial
        seen[:, :, 0] = limits[:, None]


class _OneList(DecodeTiles):
    """Elsewhere: all pages are partial, the sink page the first of them.

    The kernel is made for a number of tiles, so there are as many as the next power of two; those beyond the rows
    read nothing.
    """

    def _allocate(self) -> Tiles:
        layout, num_tiles = self._layout, 1 << (self._num_rows - 1).bit_length()
        self._num_sinks = 0 if layout.sink_page is None else 1
        width = self._block_table.shape[1]
        if self._window is not None:
            width = min(width, pages_in_window(self._table, self._window))
        lists = layout.empty_lists(num_tiles, self._num_sinks + width, len(self._page_index))
        lists.fill_(layout.sink_page or 0)
        # What changes with every step lies together, to be sent together.
        small = torch.zeros(num_tiles * (1 + 2 * layout.group), dtype=torch.int32)
        self._num_pages = small.numpy()[: self._num_rows]
        self._seen = small.numpy()[num_tiles:].reshape(num_tiles, layout.group, 2)
        self._lists = lists.numpy()[: self._num_rows, self._num_sinks : self._num_sinks + width]
        self._version = -1
        small_there, lists_there = small.to(layout.device), lists.to(layout.device)
        self._small, self._lists_whole = (small_there, small), (lists_there, lists)
        return Tiles(
            num_full=None,
            full=None,
            num_partial=small_there[:num_tiles].view(-1, 1, 1),
            partial=lists_there.view(num_tiles, 1, 1, -1),
            page_index=self._page_index,
            seen=small_there[num_tiles:].view(num_tiles, layout.group, 2),
            tile_length=1,
            tiles_per_row=1,
            group=layout.group,
        )

    def fill(self, limits: Counts, firsts: Counts | None) -> None:
        """See `DecodeTiles`."""
        page_size, rows = self._table.group.page_size, slice(self._num_rows)
        begin = np.zeros_like(limits) if firsts is None else firsts // page_size
        self._num_pages[:] = np.maximum(-(-limits // page_size) - begin, 0) + self._num_sinks
        self._seen[rows, :, 0] = limits[:, None]
        changed = [self._small]
        if firsts is not None:
            self._seen[rows, :, 1] = firsts[:, None]
            self._lists[:] = listed(self._block_table, begin[:, None] + np.arange(self._lists.shape[1]))
            changed.append(self._lists_whole)
        elif self._version != self._table.version:
            self._lists[:] = self._block_table[:, : self._lists.shape[1]]
            self._version = self._table.version
            changed.append(self._lists_whole)
        for there, here in changed:
            if there is not here:
                # The memory here is not pinned, so it may be filled again as soon as this returns.
                there.copy_(here, non_blocking=True)
