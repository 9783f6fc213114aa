"""One forward pass: which tokens are new, and where they go."""

import enum
from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from hf_paged.attention.backends.block_list_builder import BlockListBuilder
from hf_paged.attention.backends.block_lists import BlockLists, Layout
from hf_paged.attention.backends.kv_splits import KVSplits
from hf_paged.attention.backends.varlen_sdpa import VarlenRow
from hf_paged.batch.duplicates import Originals, confirmed_duplicates, parted_duplicates, possible_duplicates
from hf_paged.batch.padding import BoolMatrix, Columns, Counts, gather_columns
from hf_paged.errors import OutOfPagesError
from hf_paged.pages.block_table import BlockTable
from hf_paged.pages.storage import LayerStorage, Slots


class View(enum.Enum):
    """What the attention function of a step is handed as keys and values."""

    NEW = "the new keys and values as they came; enough when the cache was empty"
    PAGES = "the whole storage of the layer, to be read through block tables"
    DENSE = "a padded copy, `(num_rows, num_kv_heads, num_columns, head_dim)`, for any other attention"


class Step(ABC):
    """The plan of one forward pass, made before the first layer runs and used by all of them.

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

    def __init__(
        self, view: View, columns: Columns, next_columns: Columns, shape: tuple[int, int], past_is_visible: bool
    ) -> None:
        self.view = view
        self.columns = columns
        self.next_columns = next_columns
        self.num_rows, self.num_new = shape
        self.past_is_visible = past_is_visible
        self.is_cancelled = False
        self._handed: dict[int, tuple[Tensor, BlockTable, LayerStorage]] = {}

    @property
    def is_settled(self) -> bool:
        """Whether the pages are reserved, whatever the keys and values are."""
        return False

    @abstractmethod
    def matches(self, num_rows: int, num_new: int, new: BoolMatrix | None) -> bool:
        """Whether this is the plan for these new columns."""

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
    def block_lists(self, builder: BlockListBuilder, window: int | None, queries: slice, layout: Layout) -> BlockLists:
        """Make the block lists of queries that see their row up to themselves.

        Args:
            builder: of the layer's rows.
            window: tokens that a query sees, itself included; None: all before it.
            queries: which of the new columns ask.
            layout: how to stack them.

        Raises:
            ValueError: if a token is to be seen that was dropped.
        """

    def varlen_rows(self, table: BlockTable, window: int | None, queries: slice) -> list[VarlenRow] | None:
        """Cut queries that see their row up to themselves by their rows; arguments as for `block_lists`.

        Returns:
            The rows; None where queries don't come packed.

        Raises:
            ValueError: if a token is to be seen that was dropped.
        """
        return None

    def splits(self, builder: BlockListBuilder, window: int | None, queries: slice) -> KVSplits | None:
        """List the pages that the only query of each row reads; arguments as for `block_lists`.

        Returns:
            The splits; None where there are several queries of a row.

        Raises:
            ValueError: if a token is to be seen that was dropped.
        """
        return None

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
        window = table.group.window
        first_column = 0 if window is None else max(0, self.columns.count + 1 - window)
        return gather_columns(storage, table, self.next_columns, first_column)

    def hand_out(self, table: BlockTable, storage: LayerStorage) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a storage, and note that they stand for the pages of these rows."""
        keys, values = storage.tensors
        self._handed[keys.data_ptr()] = keys, table, storage
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
        if self.is_cancelled:
            raise RuntimeError("This mask belongs to a forward pass that was given up. Make a new one for each pass.")
        handed = self._handed.get(keys.data_ptr())
        if handed is not None:
            return handed[1:]
        if group is not None:
            table = self.placements[group].table
            if any(other is table and held.shape[2] == keys.shape[2] for held, other, _ in self._handed.values()):
                return table, None
        raise ValueError(
            f"Keys of shape {tuple(keys.shape)} were given to the attention function with the mask of a PagedCache "
            "that did not return them. In training mode Transformers takes the cache away from layers with gradient "
            "checkpointing: call model.eval() first. Otherwise pass on what cache.update() returned in this pass."
        )


class PaddedStep(Step):
    """A pass over the new columns of a padded batch.

    Args:
        tables: the rows, in each group of layers.
        columns: the padded view before this step.
        num_new: new columns.
        new: `(num_rows, num_new)` True for tokens; None if there is no padding among them.
        past_is_visible: whether every cached token may be seen.
        reads_pages: whether attention is to read pages, if any are filled.
        keeps_all: whether tokens that have left a window are stored, too.
    """

    def __init__(
        self,
        tables: list[BlockTable],
        columns: Columns,
        num_new: int,
        new: BoolMatrix | None,
        past_is_visible: bool,
        reads_pages: bool,
        keeps_all: bool,
    ) -> None:
        num_rows = tables[0].num_rows
        super().__init__(
            View.NEW if columns.count == 0 else View.PAGES if reads_pages else View.DENSE,
            columns,
            columns.extended(new, num_rows, num_new),
            (num_rows, num_new),
            past_is_visible,
        )
        self.new = new
        starts = tables[0].lengths[:, None]
        if new is None:
            self.counts = np.full(num_rows, num_new, dtype=np.int64)
            self.kv_stop: Counts = starts + np.arange(1, num_new + 1)
        else:
            self.counts = new.sum(axis=1, dtype=np.int64)
            # Padding sees what is before it, as with Transformers' own caches: at the end of a row generate() goes on
            # from what it gives.
            self.kv_stop = starts + new.cumsum(axis=1)
        self.placements = [Placement(table, None if keeps_all else self._unread(table)) for table in tables]
        self.originals: Originals | None = None
        self._possible_duplicates = possible_duplicates(tables, num_new, new)
        self._is_reserved = False
        if self._possible_duplicates is None:
            self._reserve()

    @property
    def is_settled(self) -> bool:
        """See `Step`."""
        return self._is_reserved and self.originals is None

    def matches(self, num_rows: int, num_new: int, new: BoolMatrix | None) -> bool:
        """See `Step`."""
        same = self.new is new if self.new is None or new is None else np.array_equal(self.new, new)
        return same and (self.num_rows, self.num_new) == (num_rows, num_new)

    def settle_duplicates(self, keys: Tensor, values: Tensor) -> None:
        """See `Step`."""
        if self.is_settled:
            return
        if not self._is_reserved:
            assert self._possible_duplicates is not None
            self.originals = confirmed_duplicates(self._possible_duplicates, keys, values)
            self._reserve()
        else:
            assert self.originals is not None
            for row in parted_duplicates(self.originals, keys, values):
                for placement in self.placements:
                    placement.table.part(row)
                self.originals[row] = row

    def stored(self, placement: "Placement") -> tuple[Counts, Counts, Counts | None]:
        """See `Step`."""
        stored, starts = self.new, placement.starts
        positions = placement.table.lengths[:, None] + np.arange(self.num_new) if stored is None else self.kv_stop - 1
        if starts is not None:
            is_kept = positions >= starts[:, None]
            stored = is_kept if stored is None else stored & is_kept
        if self.originals is not None:
            leads = np.broadcast_to((self.originals == np.arange(self.num_rows))[:, None], positions.shape)
            stored = leads if stored is None else stored & leads
        if stored is None:
            return np.arange(self.num_rows)[:, None], positions, None
        rows, new_columns = np.nonzero(stored)
        return rows, positions[rows, new_columns], rows * self.num_new + new_columns

    def block_lists(self, builder: BlockListBuilder, window: int | None, queries: slice, layout: Layout) -> BlockLists:
        """See `Step`."""
        return builder.causal(*self._seen(window, queries), window, layout)

    def splits(self, builder: BlockListBuilder, window: int | None, queries: slice) -> KVSplits | None:
        """See `Step`."""
        kv_stop, kv_start = self._seen(window, queries)
        if kv_stop.shape[1] > 1:
            return None
        return builder.splits(kv_stop[:, 0], None if kv_start is None else kv_start[:, 0], window)

    def _seen(self, window: int | None, queries: slice) -> tuple[Counts, Counts | None]:
        """`(num_rows, num_queries)` tokens of its row up to which each query sees, and from which, None for the first.

        Padding may stand so far behind the tokens of its row that it sees none of them through a window.
        """
        kv_stop = self.kv_stop[:, queries]
        if window is None:
            return kv_stop, None
        kv_start = self.kv_start(window)[:, queries]
        return np.where(kv_start < kv_stop, kv_stop, 0), kv_start

    def kv_start(self, window: int) -> Counts:
        """`(num_rows, num_new)` tokens of its row that each query no longer sees through a window."""
        queries = self.columns.count + np.arange(self.num_new)
        return self.next_columns.num_tokens_before(queries + 1 - window, self.num_rows)

    def by_token(self, mask: Tensor, first_column: int) -> BoolMatrix:
        """See `Step`. It has to be the same for all heads."""
        if mask.shape[1] != 1:
            raise ValueError(f"A mask of its own for each of {mask.shape[1]} heads is not supported over pages.")
        by_column = mask[:, 0].cpu().numpy()
        lengths = self.placements[0].table.lengths + self.counts
        page_size = self.placements[0].table.group.page_size
        max_tokens = -(-max(1, int(lengths.max())) // page_size) * page_size
        by_token = np.zeros((self.num_rows, self.num_new, max_tokens), dtype=bool)
        real = self.next_columns.real
        if real is None:
            by_token[:, :, first_column : self.next_columns.count] = by_column
        else:
            kv_start = real[:, :first_column].sum(axis=1)
            for row in range(self.num_rows):
                by_token[row, :, kv_start[row] : lengths[row]] = by_column[row][:, real[row, first_column:]]
        return by_token

    def _unread(self, table: BlockTable) -> Counts | None:
        """`(num_rows,)` new tokens at the beginning of each row that nobody reads from pages; None: none."""
        window, count = table.group.window, self.next_columns.count
        if self.view is not View.NEW or window is None or count < window:
            return None
        return self.next_columns.num_tokens_before(np.array([count + 1 - window]), self.num_rows)[:, 0]

    def _reserve(self) -> None:
        for done, placement in enumerate(self.placements):
            try:
                placement.table.reserve(self.counts, placement.starts, self.originals)
            except OutOfPagesError:
                for other in self.placements[:done]:
                    other.table.rollback()
                raise
        self._is_reserved = True


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
