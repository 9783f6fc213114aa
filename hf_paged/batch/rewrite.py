"""Other keys and values put into pages that hold some."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_paged.batch.padding import token_places
from hf_paged.batch.rows import Rows
from hf_paged.errors import OutOfPagesError
from hf_paged.pages.block_table import BlockTable
from hf_paged.pages.storage import LayerStorage

if TYPE_CHECKING:
    from hf_paged.batch.sequences import Sequences


@torch.no_grad()
def rewrite(rows: Rows, edited: dict[int, tuple[Tensor, Tensor]]) -> None:
    """Write padded keys and values of some layers into their pages, as far as they differ.

    Raises:
        OutOfPagesError: if pages are shared and there are too few to copy them; nothing has changed.
    """
    changes = [
        change
        for index, table in enumerate(rows.tables)
        if (layers := {layer: pair for layer, pair in edited.items() if rows.pool.group_of_layer[layer] == index})
        and (change := _change(rows, table, layers)) is not None
    ]
    if changes:
        rows.origin = None
        rows.is_plain = False
    shared = [change.shared_pages() for change in changes]
    taken: list[list[int]] = []
    try:
        for change, (places, _) in zip(changes, shared, strict=True):
            taken.append(change.table.group.take(len(places)) if places else [])
    except OutOfPagesError:
        for change, pages in zip(changes, taken, strict=False):
            change.table.group.allocator.release(pages)
        raise
    for change, (places, sharing), pages in zip(changes, shared, taken, strict=True):
        if places:
            change.table.replace(places, sharing, pages)
        change.write()


def _change(held: Rows, table: BlockTable, edited: dict[int, tuple[Tensor, Tensor]]) -> _Change | None:
    """Find the tokens of a group's layers that differ from what the pages hold; None if there are none."""
    first_column = held.first_column(next(iter(edited)))
    positions, absent = token_places(table, held.columns, first_column)
    rows, columns = np.nonzero(~absent)
    positions = positions[rows, columns]
    page_size = table.group.page_size
    slots = table.block_table[rows, positions // page_size].astype(np.int64) * page_size + positions % page_size
    token_index = torch.from_numpy(rows * absent.shape[1] + columns)
    is_new = np.zeros(len(rows), dtype=bool)
    tokens: list[tuple[LayerStorage, Tensor, Tensor]] = []
    for layer, pair in edited.items():
        storage = held.pool.storage(layer)
        assert storage is not None
        index = token_index.to(storage.device)
        keys, values = (tensor.transpose(0, 1).flatten(1, 2).index_select(1, index) for tensor in pair)
        stored = storage.gather(torch.from_numpy(slots).to(storage.device))
        for given, other in zip((keys, values), stored, strict=True):
            is_new |= (_bits(given) != _bits(other)).any(dim=2).any(dim=0).cpu().numpy()
        tokens.append((storage, keys, values))
    if not is_new.any():
        return None
    chosen = torch.from_numpy(np.flatnonzero(is_new))
    for place, (storage, keys, values) in enumerate(tokens):
        index = chosen.to(storage.device)
        tokens[place] = storage, keys.index_select(1, index), values.index_select(1, index)
    return _Change(table, rows[is_new], positions[is_new], tokens)


def replace(sequences: Sequences, states: dict[int, tuple[Tensor, Tensor]], num_rows: int, count: int) -> None:
    """Let sequences hold other keys and values; rows that were released stay so.

    Args:
        sequences: the cache's, between two steps.
        states: for each layer keys and values, each `(num_rows, num_kv_heads, num_columns, head_dim)`, the last
            columns of `count` or all of them.
        num_rows: rows from now on.
        count: columns from now on, all of them tokens.

    Raises:
        OutOfPagesError: if they don't fit into the pool beside what is held; nothing has changed.
        ValueError: if rows were released and their number changes; nothing has changed.
    """
    released = sequences.rows.columns.released
    if released is not None and len(released) != num_rows:
        raise ValueError(
            f"Keys and values of {num_rows} rows were assigned to a cache of {len(released)} rows, some of them "
            "released. Choose rows by batch_select_indices() first."
        )
    mask = None if released is None else torch.from_numpy(~released)[:, None].expand(-1, count)
    other = type(sequences)(sequences.pool)
    other.progress.num_layers = max(states) + 1
    try:
        other.reserve(num_rows, count, mask)
        for layer, pair in states.items():
            keys, values = (pad(tensor, (0, 0, count - tensor.shape[2], 0)) for tensor in pair)
            other.write(layer, keys, values)
        other.commit_first()
        sequences.exchange(other)
    finally:
        other.clear()
    if released is not None:
        sequences.rows.columns = sequences.rows.columns.without(np.flatnonzero(released).tolist(), num_rows)


@dataclass
class _Change:
    """What is to be written into the pages of one group of layers.

    Attributes:
        table: the rows.
        rows: `(num_tokens,)` row of each token, ascending, where some layer has something new.
        positions: `(num_tokens,)` its place in the row, ascending within a row.
        tokens: for each storage the keys and values, each `(num_kv_heads, num_tokens, head_dim)`.
    """

    table: BlockTable
    rows: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    tokens: list[tuple[LayerStorage, Tensor, Tensor]]

    def shared_pages(self) -> tuple[list[int], list[list[int]]]:
        """Pages that must be copied first, as somebody holds them too who is not to get the same.

        Returns:
            The place of each in its row, and the rows that get the same there.
        """
        page_size, allocator = self.table.group.page_size, self.table.group.allocator
        places = self.positions // page_size
        starts = np.flatnonzero(np.diff(self.rows, prepend=-1) | np.diff(places, prepend=-1))
        by_page: dict[int, list[slice]] = {}
        for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(places)], strict=True):
            page = int(self.table.block_table[self.rows[start], places[start]])
            by_page.setdefault(page, []).append(slice(start, stop))
        copied_places, sharing = [], []
        for page, pieces in by_page.items():
            parts: list[list[slice]] = []
            for piece in pieces:
                alike = next((part for part in parts if self._are_equal(part[0], piece)), None)
                if alike is None:
                    parts.append([piece])
                else:
                    alike.append(piece)
            keeps_page = allocator.ref_count(page) == len(pieces)
            for part in parts[1:] if keeps_page else parts:
                copied_places.append(int(places[part[0].start]))
                sharing.append([int(self.rows[piece.start]) for piece in part])
        return copied_places, sharing

    def write(self) -> None:
        """Store the tokens, all in pages that only rows which get the same hold."""
        page_size = self.table.group.page_size
        pages = self.table.block_table[self.rows, self.positions // page_size].astype(np.int64)
        slots, index = np.unique(pages * page_size + self.positions % page_size, return_index=True)
        for storage, keys, values in self.tokens:
            chosen, targets = (torch.from_numpy(array).to(storage.device) for array in (index, slots))
            storage.write(keys.index_select(1, chosen), values.index_select(1, chosen), targets)

    def _are_equal(self, piece: slice, other: slice) -> bool:
        if not np.array_equal(self.positions[piece], self.positions[other]):
            return False
        tensors = [tensor for _, *pair in self.tokens for tensor in pair]
        return all(torch.equal(_bits(tensor[:, piece]), _bits(tensor[:, other])) for tensor in tensors)


def _bits(tensor: Tensor) -> Tensor:
    """The bytes: every dtype can be compared by them, and NaN is what it is."""
    return tensor.contiguous().view(torch.uint8)
