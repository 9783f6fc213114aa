"""One forward pass: which tokens are new, and where they go."""

import enum
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from hf_paged._torch.surroundings import can_launch
from hf_paged._torch.tricks import Trick
from hf_paged.batch.padding import BoolMatrix, Columns, Counts, gather_columns
from hf_paged.pages.block_table import BlockTable
from hf_paged.pages.storage import LayerStorage, Slots
from hf_paged.pages.tiers.arrivals import Arrivals

GPU_WRITER = Trick(
    "gpu_writer",
    "a layer's new keys and values are stored by one kernel on a GPU",
    "they are gathered and stored by torch, one after the other",
    device_type="cuda",
)


_NO_MASK_YET = (None,)


class View(enum.Enum):
    """What the attention function of a step is handed as keys and values."""

    NEW = "the new keys and values as they came; enough when the cache was empty"
    PAGES = "the whole storage of the layer, to be read through block tables"
    DENSE = "a padded copy, `(num_rows, num_kv_heads, num_columns, head_dim)`, for any other attention"


@dataclass(frozen=True)
class KVRanges:
    """What each query sees of its row: the tokens from `kv_start` up to, not including, `kv_stop`.

    Of two rows that hold 5 and 2 tokens and get 2 more each, the queries see up to `[[6, 7], [3, 4]]`. Packed, with 2
    new tokens of the first row and one of the second, up to `[6, 7, 3]`, in rows `[0, 0, 1]`.

    Attributes:
        kv_stop: `(num_rows, num_queries)`, 0 for queries that see nothing; packed: `(num_tokens,)`.
        kv_start: like `kv_stop`; None: from the beginning.
        window: tokens that a query sees at most; None where `kv_start` is.
        rows: packed: `(num_tokens,)` the row of each query, ascending; None where queries come row by row.
        num_queries: packed: queries, of which those behind `num_tokens` belong to no row.
        is_whole: whether all new columns ask; parts of a pass may be attended to in turns.
    """

    kv_stop: Counts
    kv_start: Counts | None = None
    window: int | None = None
    rows: Counts | None = None
    num_queries: int = 0
    is_whole: bool = True

    def check_kept(self, table: BlockTable) -> None:
        """Raise ValueError if a token is to be seen that was dropped."""
        if table.group.window is not None:
            starts = table.starts[:, None] if self.rows is None else table.starts[self.rows]
            is_dropped = np.broadcast_to(starts > (0 if self.kv_start is None else self.kv_start), self.kv_stop.shape)
            if is_dropped[self.kv_stop > 0].any():
                raise _dropped(table)


def check_tokens_kept(table: BlockTable, visible: BoolMatrix) -> None:
    """Raise ValueError if a token is to be seen that was dropped.

    Args:
        table: the rows, in a group of layers.
        visible: `(num_rows, num_queries, max_tokens)` which tokens of its row each query sees.
    """
    starts = table.starts[:, None]
    if starts.any() and (visible.any(axis=1) & (np.arange(visible.shape[2]) < starts)).any():
        raise _dropped(table)


def _dropped(table: BlockTable) -> ValueError:
    return ValueError(
        f"The mask wants tokens to be seen that have left the window of {table.group.window} tokens and were dropped. "
        "Use a model whose configuration names the window of these layers as it is, or a mask within it."
    )


class Step(ABC):
    """One forward pass, laid out before the first layer runs and used by all of them.

    Args:
        view: what attention is handed.
        columns: the padded view before this step.
        next_columns: and after it.
        shape: rows of the pass, and its new columns.
        past_is_visible: whether every cached token may be seen.
    """

    counts: Counts
    """`(num_rows,)` new tokens of each row of the tables."""
    placements: list["Placement"]
    """Where they go, in each group of layers."""
    has_own_mask = False
    """Whether whoever begins it makes its mask, too."""
    arrivals: Arrivals | None = None
    """Of pages that attention is going to read, and that may still be on their way; None: they are all there."""

    def __init__(
        self, view: View, columns: Columns, next_columns: Columns, shape: tuple[int, int], past_is_visible: bool
    ) -> None:
        self.view = view
        self.columns = columns
        self.next_columns = next_columns
        self.num_rows, self.num_new = shape
        self.past_is_visible = past_is_visible
        self.hides_tokens = not past_is_visible
        """Whether queries are known not to see all tokens before them that are in the window of their layers."""
        self.is_cancelled = False
        self.handed: dict[int, tuple[Tensor, BlockTable, LayerStorage]] = {}
        """Keys that stand for pages, by their address, with the rows and the storage."""
        self.masks: Collection[object] = _NO_MASK_YET
        """What stands for it among the arguments of the model: empty as soon as its pass is over or was given up.

        A pass with a mask of its caller's own begins without asking for one, and is told by that from the one before.
        """

    @property
    def is_plain(self) -> bool:
        """Whether queries see all tokens before them, or those in the window of their layers, and no others."""
        return not self.hides_tokens and self.view is not View.DENSE

    def note_mask(self, mask: object) -> None:
        """Add one of `masks`."""
        if not isinstance(self.masks, WeakSet):
            self.masks = WeakSet()
        self.masks.add(mask)

    @property
    def is_settled(self) -> bool:
        """Whether the pages are reserved, whatever the keys and values are."""
        return False

    @abstractmethod
    def matches(self, num_rows: int, num_new: int, new: BoolMatrix | None) -> bool:
        """Whether this step is for these new columns."""

    @abstractmethod
    def settle_duplicates(self, keys: Tensor, values: Tensor) -> None:
        """Let rows share their pages as long as all layers are given the same for them.

        Args:
            keys: `(num_rows, num_kv_heads, num_new, head_dim)` of a layer that is about to be written.
            values: like `keys`.

        Raises:
            OutOfPagesError: if the pool has too few pages.
        """

    @abstractmethod
    def stored(self, placement: "Placement") -> tuple[Counts, Counts, Counts | None]:
        """Say which tokens a group of layers stores.

        Returns:
            Their rows and their places in these, in shapes that broadcast, and `(num_tokens,)` their indices among
            the new columns of all rows; None for all.
        """

    @abstractmethod
    def kv_ranges(self, window: int | None, queries: slice) -> "KVRanges":
        """Say which tokens queries see that see their row up to themselves.

        Args:
            window: tokens that a query sees, itself included; None: all before it.
            queries: which of the new columns ask.
        """

    @abstractmethod
    def by_token(self, mask: Tensor, first_column: int) -> BoolMatrix:
        """Turn a mask over columns into one over the tokens of each row.

        Args:
            mask: `(num_rows, 1, num_new, num_masked_columns)` bool.
            first_column: column that the mask begins with.

        Returns:
            `(num_rows, num_new, max_tokens)`, with `max_tokens` rounded up to whole pages.

        Raises:
            ValueError: if there is no such mask.
        """

    def first_column(self, window: int | None) -> int:
        """The first column that a query of this pass sees through a window; None: all before it."""
        return 0 if window is None else max(0, self.columns.count + 1 - window)

    @abstractmethod
    def columns_of_tokens(self) -> Counts:
        """Say which column each token of a row stands in, `(num_rows, max_tokens)`, any where it has no such token.

        `max_tokens` is rounded up to whole pages.

        Raises:
            ValueError: if there are no columns.
        """

    def write(self, group: int, storage: LayerStorage, keys: Tensor, values: Tensor) -> None:
        """Store the new tokens of a layer, leaving out padding.

        Args:
            group: index of the layer's group.
            storage: of the layer.
            keys: `(num_rows, num_kv_heads, num_new, head_dim)`.
            values: like `keys`.
        """
        placement = self.placements[group]
        slots, token_index = placement.slots(self, storage.device)
        if self.num_new == 1 and token_index is None and slots.device.type == "cpu":
            storage.write_one_each(keys, values, placement.written)
            return
        if GPU_WRITER.is_on and can_launch(slots.device):
            storage.write_on_gpu(keys, values, slots, token_index)
            return
        if self.num_rows == 1:
            keys, values = keys[0], values[0]
        else:
            keys, values = keys.transpose(0, 1).flatten(1, 2), values.transpose(0, 1).flatten(1, 2)
        if token_index is not None:
            keys, values = keys.index_select(1, token_index), values.index_select(1, token_index)
        storage.write(keys, values, slots)

    def read(self, group: int, storage: LayerStorage, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the attention function is to be handed, as `view` says; arguments as for `write`."""
        if self.view is View.NEW:
            return keys, values
        table = self.placements[group].table
        if self.view is View.PAGES:
            return self.hand_out(table, storage)
        return gather_columns(storage, table, self.next_columns, self.first_column(table.group.window))

    def hand_out(self, table: BlockTable, storage: LayerStorage) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a storage, and note that they stand for the pages of these rows."""
        keys, values = storage.tensors
        self.handed[keys.data_ptr()] = keys, table, storage
        return keys, values

    def source_of(self, keys: Tensor, group: int | None) -> tuple[BlockTable, LayerStorage | None]:
        """Return the rows and the storage of the layer that an attention function computes.

        Args:
            keys: what it was handed. Layers that share keys hand on those of another layer.
            group: of the layer, for models that make something else of the keys first; None if it stores nothing.

        Returns:
            The rows, and the storage unless the keys are something else by now.

        Raises:
            RuntimeError: if another pass has begun meanwhile.
            ValueError: if the keys did not come from this step.
        """
        self._check_under_way()
        handed = self.handed.get(keys.data_ptr())
        if handed is not None:
            return handed[1:]
        if group is not None:
            table = self.placements[group].table
            if any(other is table and held.shape[2] == keys.shape[2] for held, other, _ in self.handed.values()):
                return table, None
        raise _not_returned(keys)

    def rows_of(self, storage: LayerStorage | None, keys: Tensor) -> BlockTable:
        """Return the rows of a layer that has written this step, and read something else than its storage.

        Args:
            storage: of the layer; None if it has none yet.
            keys: what it read.

        Raises:
            RuntimeError: as `source_of`.
            ValueError: if it did not write this step.
        """
        self._check_under_way()
        table = next((table for _, table, held in self.handed.values() if held is storage), None)
        if table is None:
            raise _not_returned(keys)
        return table

    def _check_under_way(self) -> None:
        if self.is_cancelled:
            raise RuntimeError("This mask belongs to a forward pass that was given up. Make a new one for each pass.")


def _not_returned(keys: Tensor) -> ValueError:
    return ValueError(
        f"Keys of shape {tuple(keys.shape)} were given to the attention function with the mask of a PagedCache "
        "that did not return them. In training mode Transformers takes the cache away from layers with gradient "
        "checkpointing: call model.eval() first. Otherwise pass on what cache.update() returned in this pass."
    )


class Placement:
    """Where one step's tokens go in one group of layers.

    Args:
        table: the rows of the group, with room reserved for the new tokens when the first layer is written.
        starts: `(num_rows,)` tokens at the beginning of each row that are not stored; None: all are.
    """

    def __init__(self, table: BlockTable, starts: Counts | None) -> None:
        self.table = table
        self.starts = starts
        self._version = -1
        self._slots: dict[torch.device, Tensor] = {}
        self._token_index: dict[torch.device, Tensor] | None = None
        self.written: Slots | int = 0
        """As `slots`, for `LayerStorage.write_one_each`, once they are found."""

    def slots(self, step: Step, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Slots of the tokens that are stored, and their indices among the new columns of all rows, None for all."""
        if self._version != self.table.version:
            self._find(step)
        return _on(self._slots, device), None if self._token_index is None else _on(self._token_index, device)

    def send(self, step: Step, device: torch.device, there: tuple[Tensor, Tensor | None]) -> None:
        """Let `slots` return these tensors on `device`, and fill them."""
        here = self.slots(step, torch.device("cpu"))
        for copies, source, target in zip((self._slots, self._token_index), here, there, strict=True):
            if copies is not None and source is not None and target is not None:
                copies[device] = target.copy_(source, non_blocking=True)

    def _find(self, step: Step) -> None:
        rows, positions, token_index = step.stored(self)
        cpu, page_size = torch.device("cpu"), self.table.group.page_size
        self._token_index = None if token_index is None else {cpu: torch.from_numpy(token_index)}
        pages = self.table.block_table[rows, positions // page_size].astype(np.int64)
        slots = (pages * page_size + positions % page_size).ravel()
        self._slots = {cpu: torch.from_numpy(slots)}
        self.written = int(slots[0]) if len(slots) == 1 else slots
        self._version = self.table.version


def _on(copies: dict[torch.device, Tensor], device: torch.device) -> Tensor:
    if device not in copies:
        copies[device] = copies[torch.device("cpu")].to(device, non_blocking=True)
    return copies[device]
