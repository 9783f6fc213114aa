"""One forward pass: which tokens are new, and where they go."""

import enum

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hf_paged.columns import BoolMatrix, Columns
from hf_paged.page_table import Counts, PageTable
from hf_paged.storage import LayerStorage


class View(enum.Enum):
    """What the attention function of a step is handed as keys and values."""

    NEW = "the new keys and values as they came; enough when the cache was empty"
    PAGES = "the whole storage of the layer, to be read through block tables"
    DENSE = "a padded copy, `(num_rows, num_kv_heads, num_columns, head_dim)`, for any other attention"


class Step:
    """The plan of one forward pass, made before the first layer runs and used by all of them.

    Args:
        table: rows with room reserved for the new tokens.
        columns: the padded view before this step.
        num_new: new columns.
        new: `(num_rows, num_new)` True for tokens; None if there is no padding among them.
        past_is_visible: whether every cached token may be seen.
    """

    def __init__(
        self, table: PageTable, columns: Columns, num_new: int, new: BoolMatrix | None, past_is_visible: bool
    ) -> None:
        self.table = table
        self.num_rows = table.num_rows
        self.num_new = num_new
        self.new = new
        self.past_is_visible = past_is_visible
        self.is_first = columns.count == 0
        self.is_cancelled = False
        self.view = View.NEW if self.is_first and new is None else View.DENSE
        self.num_columns = columns.count + num_new
        self._columns = columns

        starts = table.lengths[:, None]
        if new is None:
            self.counts: Counts = np.full(self.num_rows, num_new, dtype=np.int64)
            positions = starts + np.arange(num_new)
            self.limits: npt.NDArray[np.int64] = positions + 1
            rows = np.arange(self.num_rows)[:, None]
            token_index = None
        else:
            self.counts = new.sum(axis=1, dtype=np.int64)
            self.limits = np.where(new, starts + new.cumsum(axis=1), 0)
            rows, new_columns = np.nonzero(new)
            positions = self.limits[rows, new_columns] - 1
            token_index = torch.from_numpy(rows * num_new + new_columns)
        page_size = table.pool.page_size
        pages = table.block_table[rows, positions // page_size].astype(np.int64)
        self._slots = {torch.device("cpu"): torch.from_numpy((pages * page_size + positions % page_size).ravel())}
        self._token_index = None if token_index is None else {torch.device("cpu"): token_index}

    def matches(self, num_rows: int, num_new: int, new: BoolMatrix | None) -> bool:
        """Whether this is the plan for these new columns."""
        same = self.new is new if self.new is None or new is None else np.array_equal(self.new, new)
        return same and (self.num_rows, self.num_new) == (num_rows, num_new)

    def by_token(self, mask: Tensor) -> BoolMatrix:
        """Turn a mask over columns into one over the tokens of each row.

        Args:
            mask: `(num_rows, 1, num_new, num_columns)` bool.

        Returns:
            `(num_rows, num_new, max_tokens)`, with `max_tokens` rounded up to whole pages.

        Raises:
            ValueError: if the mask is not the same for all heads.
        """
        if mask.shape[1] != 1:
            raise ValueError(f"A mask of its own for each of {mask.shape[1]} heads is not supported over pages.")
        by_column = mask[:, 0].cpu().numpy()
        lengths = self.table.lengths + self.counts
        page_size = self.table.pool.page_size
        max_tokens = -(-int(lengths.max()) // page_size) * page_size
        by_token = np.zeros((self.num_rows, self.num_new, max_tokens), dtype=bool)
        real = self._columns.extended(self.new, self.num_rows, self.num_new).real
        if real is None:
            by_token[:, :, : self.num_columns] = by_column
        else:
            for row in range(self.num_rows):
                by_token[row, :, : lengths[row]] = by_column[row][:, real[row]]
        return by_token

    def write(self, storage: LayerStorage, keys: Tensor, values: Tensor) -> None:
        """Store the new tokens of a layer, leaving out padding.

        Args:
            storage: of the layer.
            keys: `(num_rows, num_kv_heads, num_new, head_dim)`.
            values: like `keys`.
        """
        slots = _on(self._slots, storage.device)
        keys, values = keys.transpose(0, 1).flatten(1, 2), values.transpose(0, 1).flatten(1, 2)
        if self._token_index is not None:
            token_index = _on(self._token_index, storage.device)
            keys, values = keys.index_select(1, token_index), values.index_select(1, token_index)
        storage.write(keys, values, slots)

    def read(self, storage: LayerStorage, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the attention function is to be handed, as `view` says; arguments as for `write`."""
        if self.view is View.NEW:
            return keys, values
        if self.view is View.PAGES:
            return storage.tensors
        return gather_columns(storage, self.table, self._columns, self.num_new, self.new)


def gather_columns(
    storage: LayerStorage, table: PageTable, columns: Columns, num_new: int = 0, new: BoolMatrix | None = None
) -> tuple[Tensor, Tensor]:
    """Copy a layer into the padded layout of Transformers' own caches.

    Args:
        storage: of the layer.
        table: the rows; pages for `num_new` further tokens are reserved.
        columns: the padded view without those.
        num_new: columns that the view does not count yet.
        new: `(num_rows, num_new)`, True for tokens, or None.

    Returns:
        Keys and values, each `(num_rows, num_kv_heads, num_columns, head_dim)`, 0 where there was padding.
    """
    whole = columns.extended(new, table.num_rows, num_new)
    page_size = table.pool.page_size
    shape = (table.num_rows, whole.count)
    if whole.real is None:
        positions = np.broadcast_to(np.arange(whole.count), shape)
    else:
        positions = np.maximum(whole.real.cumsum(axis=1) - 1, 0)
    width = table.block_table.shape[1]
    pages = table.block_table[np.arange(shape[0])[:, None], np.minimum(positions // page_size, width - 1)]
    if whole.real is not None:
        pages = np.where(whole.real, pages, 0)  # a row of padding alone has no page to read
    slots = torch.from_numpy((pages.astype(np.int64) * page_size + positions % page_size).ravel())
    gathered = []
    for tensor in storage.gather(slots.to(storage.device)):
        if whole.real is not None:
            padding = torch.from_numpy(~whole.real).reshape(1, -1, 1).to(storage.device)
            tensor.masked_fill_(padding, 0)
        gathered.append(tensor.view(tensor.shape[0], *shape, -1).transpose(0, 1))
    return gathered[0], gathered[1]


def _on(copies: dict[torch.device, Tensor], device: torch.device) -> Tensor:
    if device not in copies:
        copies[device] = copies[torch.device("cpu")].to(device)
    return copies[device]
