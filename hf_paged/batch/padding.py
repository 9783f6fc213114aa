"""The padded view that Transformers has of rows whose padding is never stored."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hf_paged.pages.block_table import BlockTable
from hf_paged.pages.storage import LayerStorage

BoolMatrix = npt.NDArray[np.bool_]
BoolVector = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]


class Columns:
    """The padded view that Transformers has of a batch whose padding is never stored.

    Transformers counts in columns: every row of a batch is as wide as the widest. The pages hold tokens only. This
    record says which is which. It does not change; the next step has the next record.

    Args:
        count: columns so far, padding included: what Transformers calls the sequence length of the cache.
        real: `(num_rows, count)`, True where a row has a token; None: everywhere.
        released: `(num_rows,)`, True for rows that were finished and hold nothing any more; None: no such row.
    """

    def __init__(self, count: int = 0, real: BoolMatrix | None = None, released: BoolVector | None = None) -> None:
        self.count = count
        self.real = None if real is None or real.all() else real
        self.released = None if released is None or not released.any() else released

    def split(self, mask: BoolMatrix | None, num_rows: int, num_new: int) -> tuple[BoolMatrix | None, bool]:
        """Compare a 2-D attention mask with the record.

        Args:
            mask: `(num_rows, count + num_new)`, True for tokens; None if there is no padding.
            num_rows: rows of the batch.
            num_new: new columns.

        Returns:
            The new columns of the mask, `(num_rows, num_new)` or None if they are all tokens, and whether every
            token that is stored may still be seen.

        Raises:
            ValueError: if the mask has another shape, or wants a token where padding was not stored or in a row that
                was released.
        """
        if mask is None:
            if self.real is not None and not self.real[~self._is_released(num_rows)].all():
                raise ValueError(
                    f"This cache holds a batch with padding, so attention_mask is needed to continue it: "
                    f"shape ({num_rows}, {self.count + num_new}), 0 where the padding was."
                )
            return self.without_released(None, num_rows, num_new), True
        if mask.shape != (num_rows, self.count + num_new):
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}, but {num_rows} rows with {self.count} cached and "
                f"{num_new} new columns need ({num_rows}, {self.count + num_new})."
            )
        past, new = mask[:, : self.count], mask[:, self.count :]
        if self.released is not None:
            past = past & ~self.released[:, None]
        stored = self.without_released(new, num_rows, num_new)
        stored = None if stored is None or stored.all() else stored
        if self.real is None:
            return stored, bool(past.all())
        unknown = past & ~self.real
        if unknown.any():
            row, column = np.argwhere(unknown)[0].tolist()
            raise ValueError(
                f"attention_mask wants a token in row {row}, column {column}, but that column was padding when the "
                "cache was filled, and padding is not stored. Pass the mask that the cache was filled with."
            )
        return stored, np.array_equal(past, self.real)

    def without_released(self, new: BoolMatrix | None, num_rows: int, num_new: int) -> BoolMatrix | None:
        """Take the rows that were released out of `new` `(num_rows, num_new)`, which columns are tokens.

        Raises:
            ValueError: if such a row is given more than the one token that `generate()` fills it up with.
        """
        if self.released is None:
            return new
        if new is None:
            new = np.ones((num_rows, num_new), dtype=bool)
        if num_new > 1 and new[self.released].any():
            rows = np.flatnonzero(self.released).tolist()
            raise ValueError(
                f"Rows {rows} of this cache were released and have no tokens to continue from, but {num_new} new "
                "columns were given for them. Keep the others with batch_select_indices(), or mask the new columns."
            )
        return new & ~self.released[:, None]

    def extended(self, new: BoolMatrix | None, num_rows: int, num_new: int) -> "Columns":
        """Return the record with `num_new` columns appended; `new` is as returned by `split`."""
        if new is None and self.real is None:
            return Columns(self.count + num_new)
        past = np.ones((num_rows, self.count), dtype=bool) if self.real is None else self.real
        added = np.ones((num_rows, num_new), dtype=bool) if new is None else new
        return Columns(self.count + num_new, np.concatenate([past, added], axis=1), self.released)

    def num_tokens_before(self, columns: Counts, num_rows: int) -> Counts:
        """`(num_rows, n)` tokens of each row before `columns`, `(n,)` or `(num_rows, n)`, between 0 and `count`."""
        columns = np.clip(columns, 0, self.count)
        if self.real is None:
            return np.broadcast_to(columns, (num_rows, columns.shape[-1]))
        if columns.shape == (1,):
            return np.asarray(self.real[:, : int(columns[0])].sum(axis=1, dtype=np.int64))[:, None]
        running = np.zeros((num_rows, self.count + 1), dtype=np.int64)
        self.real.cumsum(axis=1, out=running[:, 1:])
        return np.take_along_axis(running, np.broadcast_to(columns, (num_rows, columns.shape[-1])), axis=1)

    def truncated(self, count: int) -> "Columns":
        """Return the record of the first `count` columns."""
        return Columns(count, None if self.real is None else self.real[:, :count], self.released if count else None)

    def ends_of(self, lengths: Counts) -> Counts:
        """`(num_rows,)` the column behind the first `lengths[row]` tokens of each row, which has as many."""
        if self.real is None:
            return lengths
        is_kept = self.real & (self.real.cumsum(axis=1) <= lengths[:, None])
        return np.asarray((is_kept * np.arange(1, self.count + 1)).max(axis=1, initial=0))

    def cut(self, ends: Counts) -> "Columns":
        """Return the record of the columns of each row before its one of `ends`, `(num_rows,)`."""
        columns = self.truncated(int(ends.max(initial=0)))
        if (ends < columns.count).any():
            is_kept = np.arange(columns.count) < ends[:, None]
            columns.real = is_kept if columns.real is None else columns.real & is_kept
        return columns

    def extended_from(self, ends: Counts, counts: Counts) -> "Columns":
        """Return the record with `counts[row]` tokens in the columns from `ends[row]` on, which hold none so far."""
        count = max(self.count, int((ends + counts).max()))
        if self.real is None and (ends + counts == count).all():
            return Columns(count)
        column = np.arange(count)
        real = (column >= ends[:, None]) & (column < (ends + counts)[:, None])
        real[:, : self.count] |= True if self.real is None else self.real
        return Columns(count, real, self.released)

    def selected(self, indices: Sequence[int]) -> "Columns":
        """Return the record where row `i` is what row `indices[i]` is here."""
        real, released = (None if array is None else array[list(indices)] for array in (self.real, self.released))
        return Columns(self.count, real, released)

    def without_first(self, count: int) -> "Columns":
        """Return the record without its first `count` columns."""
        return Columns(self.count - count, None if self.real is None else self.real[:, count:], self.released)

    @staticmethod
    def joined(parts: Sequence[tuple["Columns", int]]) -> "Columns":
        """Return the record of several batches, one below the other, the shorter ones padded on the left.

        Args:
            parts: for each its record, and its number of rows.
        """
        count = max(columns.count for columns, _ in parts)
        real, released = [], []
        for columns, num_rows in parts:
            part = np.ones((num_rows, columns.count), dtype=bool) if columns.real is None else columns.real
            real.append(np.pad(part, ((0, 0), (count - columns.count, 0))))
            released.append(columns._is_released(num_rows))
        return Columns(count, np.concatenate(real), np.concatenate(released))

    def without(self, rows: Sequence[int], num_rows: int) -> "Columns":
        """Return the record where `rows` are released."""
        released = self._is_released(num_rows).copy()
        released[list(rows)] = True
        real = np.ones((num_rows, self.count), dtype=bool) if self.real is None else self.real.copy()
        real[released] = False
        return Columns(self.count, real, released)

    def _is_released(self, num_rows: int) -> BoolVector:
        return np.zeros(num_rows, dtype=bool) if self.released is None else self.released


def gather_columns(
    storage: LayerStorage, table: BlockTable, columns: Columns, first_column: int = 0
) -> tuple[Tensor, Tensor]:
    """Copy a layer.

    Args:
        storage: of the layer.
        table: the rows, with pages for all tokens that `columns` counts.
        columns: the padded view.
        first_column: leave out the columns before.

    Returns:
        Keys and values, each `(num_rows, num_kv_heads, columns.count - first_column, head_dim)`, 0 where there was
        padding and where tokens were dropped.
    """
    positions, absent = token_places(table, columns, first_column)
    shape, page_size = positions.shape, table.group.page_size
    width = table.block_table.shape[1]
    pages = table.block_table[np.arange(shape[0])[:, None], np.minimum(positions // page_size, width - 1)]
    pages = np.where(absent, 0, pages)  # a row of padding alone has no page to read
    slots = torch.from_numpy((pages.astype(np.int64) * page_size + positions % page_size).ravel())
    gathered = []
    for tensor in storage.gather(slots.to(storage.device)):
        if absent.any():
            tensor.masked_fill_(torch.from_numpy(absent).reshape(1, -1, 1).to(storage.device), 0)
        gathered.append(tensor.view(tensor.shape[0], *shape, -1).transpose(0, 1).contiguous())
    return gathered[0], gathered[1]


def token_places(table: BlockTable, columns: Columns, first_column: int) -> tuple[Counts, BoolMatrix]:
    """Say which token of its row each column is, from `first_column` on.

    Returns:
        `(num_rows, columns.count - first_column)` places in the rows, and like it True where there is no token, which
        was padding or has been dropped.
    """
    shape = (table.num_rows, columns.count - first_column)
    if columns.real is None:
        positions = np.broadcast_to(np.arange(first_column, columns.count), shape)
    else:
        positions = np.maximum(columns.real.cumsum(axis=1) - 1, 0)[:, first_column:]
    absent = positions < table.starts[:, None]
    if columns.real is not None:
        absent |= ~columns.real[:, first_column:]
    return positions, absent
