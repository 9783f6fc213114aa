"""Which columns of a padded batch hold tokens."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

BoolMatrix = npt.NDArray[np.bool_]


class Columns:
    """The padded view that Transformers has of a batch whose padding is never stored.

    Transformers counts in columns: every row of a batch is as wide as the widest. The pages hold tokens only. This
    record says which is which. It does not change; the next step has the next record.

    Args:
        count: columns so far, padding included: what Transformers calls the sequence length of the cache.
        real: `(num_rows, count)`, True where a row has a token; None: everywhere.
    """

    def __init__(self, count: int = 0, real: BoolMatrix | None = None) -> None:
        self.count = count
        self.real = None if real is None or real.all() else real

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
            ValueError: if the mask has another shape, or wants a token where padding was not stored.
        """
        if mask is None:
            if self.real is not None:
                raise ValueError(
                    f"This cache holds a batch with padding, so attention_mask is needed to continue it: "
                    f"shape ({num_rows}, {self.count + num_new}), 0 where the padding was."
                )
            return None, True
        if mask.shape != (num_rows, self.count + num_new):
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}, but {num_rows} rows with {self.count} cached and "
                f"{num_new} new columns need ({num_rows}, {self.count + num_new})."
            )
        past, new = mask[:, : self.count], mask[:, self.count :]
        recorded = True if self.real is None else self.real
        if (past & ~np.asarray(recorded)).any():
            row, column = np.argwhere(past & ~np.asarray(recorded))[0].tolist()
            raise ValueError(
                f"attention_mask wants a token in row {row}, column {column}, but that column was padding when the "
                "cache was filled, and padding is not stored. Pass the mask that the cache was filled with."
            )
        return (None if new.all() else new), bool((past == recorded).all())

    def extended(self, new: BoolMatrix | None, num_rows: int, num_new: int) -> "Columns":
        """Return the record with `num_new` columns appended; `new` is as returned by `split`."""
        if new is None and self.real is None:
            return Columns(self.count + num_new)
        past = np.ones((num_rows, self.count), dtype=bool) if self.real is None else self.real
        added = np.ones((num_rows, num_new), dtype=bool) if new is None else new
        return Columns(self.count + num_new, np.concatenate([past, added], axis=1))

    def num_tokens_after(self, column: int, num_rows: int) -> npt.NDArray[np.int64]:
        """`(num_rows,)` tokens of each row from `column` on."""
        if self.real is None:
            return np.full(num_rows, self.count - column, dtype=np.int64)
        counts: npt.NDArray[np.int64] = self.real[:, column:].sum(axis=1, dtype=np.int64)
        return counts

    def truncated(self, count: int) -> "Columns":
        """Return the record of the first `count` columns."""
        return Columns(count, None if self.real is None else self.real[:, :count])

    def selected(self, indices: Sequence[int]) -> "Columns":
        """Return the record where row `i` is what row `indices[i]` is here."""
        return Columns(self.count, None if self.real is None else self.real[list(indices)])
