"""Pages copied into the padded layout of Transformers' own caches."""

import numpy as np
import torch
from torch import Tensor

from hf_paged.batch.columns import BoolMatrix, Columns, Counts
from hf_paged.pages.block_table import PageTable
from hf_paged.pages.storage import LayerStorage


def gather_columns(
    storage: LayerStorage, table: PageTable, columns: Columns, first_column: int = 0
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


def token_places(table: PageTable, columns: Columns, first_column: int) -> tuple[Counts, BoolMatrix]:
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
