"""Rows that turn out to hold the same tokens.

`generate()` repeats a prompt for every beam and every returned sequence before it is computed, and neither the cache
nor the mask function sees which tokens it is made of. But equal tokens have equal keys: rows whose first layer is
given the same keys are duplicates until a later layer tells them apart.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hf_paged.batch.padding import BoolMatrix
from hf_paged.pages.block_table import BlockTable

Originals = npt.NDArray[np.int64]
"""`(num_rows,)` for each row the first row that it is a duplicate of; itself if there is none."""


def possible_duplicates(tables: list[BlockTable], new: BoolMatrix | None) -> Originals | None:
    """Find rows that hold the same pages and get tokens in the same columns; None if there are none.

    Args:
        tables: the rows, in each group.
        new: `(num_rows, num_new)` True for tokens; None: everywhere.
    """
    num_rows = tables[0].num_rows
    if num_rows == 1:
        return None
    seen: dict[object, int] = {}
    originals = np.arange(num_rows)
    for row in range(num_rows):
        if new is not None and not new[row].any():
            continue
        held = [(int(table.lengths[row]), tuple(table.row_pages(row))) for table in tables]
        originals[row] = seen.setdefault((b"" if new is None else new[row].tobytes(), *held), row)
    return None if len(seen) == num_rows else originals


def confirmed_duplicates(originals: Originals, keys: Tensor, values: Tensor) -> Originals | None:
    """Keep those duplicates whose keys and values are the same, bit for bit; None if there are none.

    Args:
        originals: possible duplicates.
        keys: `(num_rows, num_kv_heads, num_new, head_dim)`, or anything else that is to be the same.
        values: like `keys`.
    """
    found: dict[int, list[int]] = {}
    confirmed = np.arange(len(originals))
    for row, original in enumerate(originals.tolist()):
        candidates = found.setdefault(original, [])
        confirmed[row] = next((other for other in candidates if _are_equal(row, other, keys, values)), row)
        if confirmed[row] == row:
            candidates.append(row)
    return None if (confirmed == np.arange(len(originals))).all() else confirmed


def equal_rows(tables: list[BlockTable], tokens: npt.NDArray[np.int64], new: BoolMatrix | None) -> Originals:
    """Find rows that hold the same pages and get the same tokens, where these are known.

    Args:
        tables: the rows, in each group.
        tokens: `(num_rows, num_new)`, 0 for padding.
        new: as for `possible_duplicates`.
    """
    originals = possible_duplicates(tables, new)
    if originals is not None:
        given = torch.from_numpy(tokens)
        originals = confirmed_duplicates(originals, given, given)
    return np.arange(len(tokens)) if originals is None else originals


def parted_duplicates(originals: Originals, keys: Tensor, values: Tensor) -> list[int]:
    """Return the rows that are not what their leader is in this layer, arguments as for `confirmed_duplicates`."""
    return [
        row
        for row, original in enumerate(originals.tolist())
        if row != original and not _are_equal(row, original, keys, values)
    ]


def _are_equal(row: int, other: int, keys: Tensor, values: Tensor) -> bool:
    if keys.is_meta:
        return False  # there is nothing to compare
    return torch.equal(keys[row], keys[other]) and torch.equal(values[row], values[other])
