"""Tiles for one query per row on a GPU: one tile per row, whose tensors stay and whose contents change."""

import numpy as np
import torch

from hf_paged.attention.backends.block_lists import Layout, Tiles, listed, pages_in_window
from hf_paged.batch.columns import Counts
from hf_paged.pages.block_table import PageTable


class DecodeTiles:
    """The tensors for one number of rows, and how to fill them.

    All pages are partial, the sink page the first of them. The kernel is made for a number of tiles, so there are as
    many as the next power of two; those beyond the rows read nothing.

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
        with torch.inference_mode(False):  # they outlive the mode that they are made in
            self.tiles = self._allocate()

    def fit(self, table: PageTable, num_rows: int) -> bool:
        """Whether these can describe the step."""
        return (
            self._block_table is table.block_table
            and self._page_index is table.group.page_index(self._layout.device)
            and self._num_rows == num_rows
        )

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
        """Describe rows that see tokens from `firsts` to `limits`, both `(num_rows,)`; None: from the beginning."""
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
