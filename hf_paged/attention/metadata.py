"""What the layers of one forward pass are told, besides their queries."""

from typing import overload

import torch
from torch import Tensor

from hf_paged._torch.opaque import Opaque, opaque
from hf_paged.attention.backends.base import Attention
from hf_paged.attention.backends.block_list_builder import block_lists_of, block_lists_of_tokens
from hf_paged.attention.backends.block_lists import BlockLists, Layout
from hf_paged.attention.backends.latents import Asking, Sizes
from hf_paged.attention.backends.split_kv.gpu import DeviceSplits, SplitLayout, device_splits_of
from hf_paged.batch.padding import BoolMatrix
from hf_paged.batch.sequences import Sequences
from hf_paged.batch.steps.step import KVRanges, Step, View, check_tokens_kept
from hf_paged.pages.block_table import BlockTable


@opaque
class AttentionMetadata(Opaque):  # type: ignore[misc]
    """One step, and what its queries see.

    A compiled graph takes it as an input that it can't look into. So nothing that changes from pass to pass is
    guarded on, and nothing is recompiled for it.

    Args:
        sequences: the rows.
        step: the forward pass.
        by_column: without `View.PAGES`, `(num_rows, 1, num_queries, num_columns)`, the mask as `sdpa` wants it; None:
            causal.
        window: tokens that a query sees, itself included; None: all before it.
        visible: with `View.PAGES`, `(num_rows, num_new, max_tokens)` bool, what each query sees of its row instead;
            None: as above.
        queries: which of the new columns ask.
        is_by_range: whether they see all before them, or those in `window`; False: as the mask says.
    """

    def __init__(
        self,
        sequences: Sequences,
        step: Step,
        *,
        by_column: Tensor | None = None,
        window: int | None = None,
        visible: BoolMatrix | None = None,
        queries: slice = slice(None),
        is_by_range: bool = True,
    ) -> None:
        self.sequences = sequences
        self.step = step
        step.note_mask(self)
        self.by_column = by_column
        self.window = window
        self.visible = visible
        self.is_by_range = is_by_range
        self._queries = queries
        self.shape = step.num_rows, 1, len(range(step.num_new)[queries]), step.next_columns.count
        """`(num_rows, 1, num_queries, num_columns)`, the mask as Transformers would see it."""
        self.ranges = step.kv_ranges(window, queries) if is_by_range and step.view is View.PAGES else None
        """What each query sees of its row; None without `View.PAGES`, or where `visible` says it."""
        self.attentions: dict[tuple[object, ...], Attention] = {}
        """What attends to the pages, for each table, its version, and whatever else tells layers apart."""
        self.made_lists: dict[tuple[BlockTable, int, Layout | SplitLayout, int], BlockLists | DeviceSplits] = {}
        """What `device_lists` has returned, by the table, its version, and the other arguments."""

        self.asking: dict[tuple[BlockTable, int, torch.Size, Sizes], list[Asking]] = {}
        """What queries of a shape see of latents, by the table and its version, made once for all layers."""

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        # What torch.compile keeps on disk is found by the inputs, pickled. A graph is the same for all of it.
        return object, ()

    def __deepcopy__(self, memo: object) -> "AttentionMetadata":
        # torch.compile (seen in 2.11) copies examples of its inputs; this one stands for a pass, not for itself.
        return self

    @property
    def is_unwritten(self) -> bool:
        """Whether no layer has written the new tokens of this pass yet."""
        return self.sequences.step is self.step and self.sequences.has_written_nothing

    def of(self, queries: slice) -> "AttentionMetadata":
        """The same for some of these queries only."""
        chosen = range(self.step.num_new)[self._queries][queries]
        return AttentionMetadata(
            self.sequences,
            self.step,
            by_column=None if self.by_column is None else self.by_column[:, :, queries],
            window=self.window,
            visible=self.visible,
            queries=slice(chosen.start, chosen.stop, chosen.step),
            is_by_range=self.is_by_range,
        )

    def read(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `Sequences.write` has returned for these keys and values of a layer in this pass."""
        pool = self.sequences.pool
        return self.step.read(pool.group_of_layer[layer], pool.open_storage(layer, keys, values), keys, values)

    def ranges_of(self, table: BlockTable) -> KVRanges | None:
        """Return `ranges`, checked for a group of layers.

        Raises:
            ValueError: if a token is to be seen that was dropped.
        """
        if table.group.window is not None:
            if self.ranges is not None:
                self.ranges.check_kept(table)
            elif self.visible is not None:
                check_tokens_kept(table, self.visible)
        return self.ranges

    def bias_by_token(self, bias: Tensor, table: BlockTable) -> Tensor:
        """Turn a position bias over columns into one over the tokens of each row.

        Args:
            bias: `(num_rows, num_heads, num_queries, num_columns)`, or of one row for all; of the columns that layers
                of this group see.
            table: the rows, in the layers' group.

        Returns:
            `(num_rows, num_heads, num_queries, max_tokens)`, with `max_tokens` rounded up to whole pages.

        Raises:
            ValueError: if it is over something else, as where a model makes it of the size of the storage.
        """
        num_rows, _, num_queries, num_columns = self.shape
        first = self.step.first_column(table.group.window)
        if bias.shape[0] not in (1, num_rows) or bias.shape[2:] != (num_queries, num_columns - first):
            raise ValueError(
                f"A position_bias of shape {tuple(bias.shape)} was given for {num_rows} rows, {num_queries} new and "
                f'{num_columns - first} visible columns. Load the model with attn_implementation="eager" or "sdpa"; '
                "PagedCache works with both."
            )
        columns = torch.from_numpy(self.step.columns_of_tokens() - first).clamp_(0, num_columns - first - 1)
        index = columns.to(bias.device)[:, None, None].expand(-1, *bias.shape[1:3], -1)
        return bias.expand(num_rows, -1, -1, -1).gather(3, index)

    @overload
    def device_lists(self, table: BlockTable, layout: Layout, num_slots: int) -> BlockLists: ...

    @overload
    def device_lists(self, table: BlockTable, layout: SplitLayout, num_slots: int) -> DeviceSplits: ...

    def device_lists(
        self, table: BlockTable, layout: Layout | SplitLayout, num_slots: int
    ) -> BlockLists | DeviceSplits:
        """What a kernel is to read of the pages of `table`, made once for all layers of its group.

        They are made anew when rows turn out to be no duplicates, and when another thread lets the pool grow between
        two layers, to `num_slots` slots.

        Raises:
            ValueError: if a token is to be seen that was dropped.
        """
        key = (table, table.version, layout, num_slots)
        if key not in self.made_lists:
            self.made_lists[key] = self._lists_of(table, layout)
        return self.made_lists[key]

    def _lists_of(self, table: BlockTable, layout: Layout | SplitLayout) -> BlockLists | DeviceSplits:
        ranges = self.ranges_of(table)
        if isinstance(layout, SplitLayout):
            assert ranges is not None  # or another backend was chosen
            return device_splits_of(table, ranges, layout)
        if ranges is not None:
            return block_lists_of(table, ranges, layout)
        return block_lists_of_tokens(table, self.seen_tokens, layout)

    @property
    def seen_tokens(self) -> BoolMatrix:
        """`visible`, of the queries that ask."""
        assert self.visible is not None
        return self.visible[:, self._queries]
