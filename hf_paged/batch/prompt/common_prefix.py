"""What the rows of a cache have in common with another version of their history.

A token that stays must be what it would be in the new batch: behind the same tokens, at the same place, and as many
columns behind each of them. So only the tokens before the first padding behind a token are compared; left padding may
change, since it moves all columns of a row alike.
"""

import numpy as np

from hf_paged.batch.padding import BoolMatrix, Columns, Counts
from hf_paged.batch.rows import Rows


def is_continued(rows: Rows, ids: Counts, mask: BoolMatrix | None, *, may_hide: bool) -> bool:
    """Whether a prompt begins with the columns that are cached, and there is at least one more.

    Args:
        rows: of known ids.
        ids: `(num_rows, num_columns)`; as many rows as there are, or any number where there is one.
        mask: like `ids`, True for tokens; None for what is cached, and no padding behind it.
        may_hide: whether the mask may leave out tokens that are cached.
    """
    count = rows.columns.count
    if ids.shape[1] <= count:
        return False
    cached = real_columns(rows.columns, rows.count)
    given = np.broadcast_to(cached, (len(ids), count)) if mask is None else mask[:, :count]
    if rows.columns.released is not None and (mask is None or mask[rows.columns.released].any()):
        return False
    if (given & ~cached).any() or not (may_hide or np.array_equal(given, np.broadcast_to(cached, given.shape))):
        return False
    return not ((_known(rows) != ids[:, :count]) & given & cached).any()


def common_lengths(rows: Rows, ids: Counts, mask: BoolMatrix | None) -> Counts:
    """Count the first tokens of each row that stay; 0 where a window has dropped what the next one would see.

    Args:
        rows: of known ids.
        ids: `(num_rows, num_columns)`; as many rows as there are, or any number where there is one.
        mask: like `ids`, True for tokens; None without padding.
    """
    known, held = _known(rows), first_run(real_columns(rows.columns, rows.count))
    given = np.ones(ids.shape, dtype=bool) if mask is None else first_run(mask)
    lengths = np.zeros(len(ids), dtype=np.int64)
    for row in range(len(ids)):
        index = row if rows.count > 1 else 0
        old, new = known[index, held[index]], ids[row, given[row]]
        width = min(len(old), len(new))
        length = int(np.logical_and.accumulate(old[:width] == new[:width]).sum())
        windows = ((int(table.starts[index]), table.group.window) for table in rows.tables)
        if all(window is None or start <= max(0, length + 1 - window) for start, window in windows):
            lengths[row] = length
    return lengths


def common_columns(rows: Rows, lengths: Counts, mask: BoolMatrix) -> tuple[Counts, Columns]:
    """Take the most columns of a batch in which every token is one that stays.

    Args:
        rows: as for `common_lengths`.
        lengths: what that has returned.
        mask: `(num_rows, num_columns)`, True for tokens.

    Returns:
        The tokens of each row in these columns, and the record of them; none where a window has dropped what the next
        token would see.
    """
    num_before = np.pad(mask.cumsum(axis=1), ((0, 0), (1, 0)))
    count = int((num_before <= lengths[:, None]).all(axis=0).sum()) - 1
    kept = num_before[:, count]
    starts = {table.group.window: table.starts for table in rows.tables if table.group.window is not None}
    if any((start > np.maximum(0, kept + 1 - window)).any() for window, start in starts.items()):
        return np.zeros_like(kept), Columns()
    return kept, Columns(count, mask[:, :count])


def first_run(real: BoolMatrix) -> BoolMatrix:
    """The tokens before the first padding behind a token."""
    has_begun = np.maximum.accumulate(real, axis=1)
    return np.asarray(real & ~np.logical_or.accumulate(has_begun & ~real, axis=1))


def _known(rows: Rows) -> Counts:
    known = rows.known_ids.known
    assert known is not None
    ids: Counts = known[0][:, : rows.columns.count].cpu().numpy()
    return ids


def real_columns(columns: Columns, num_rows: int) -> BoolMatrix:
    """`(num_rows, count)` which columns are tokens, also where all are."""
    return np.ones((num_rows, columns.count), dtype=bool) if columns.real is None else columns.real
