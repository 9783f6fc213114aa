"""Keys and values that attention reads as they are held, and anybody else as a copy.

Models whose later layers read what earlier ones were handed keep it in a dictionary, which their caller may get too:
a small model drafts from it, for one. In pages that would be the whole pool, other requests' tokens included.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from hf_paged.batch.padding import gather_columns
from hf_paged.batch.steps.step import Step
from hf_paged.pages.block_table import BlockTable
from hf_paged.pages.storage import LayerStorage

_NOTHING = torch.empty(0)
_OF_SHAPE = {Tensor.shape.__get__, Tensor.size}  # type: ignore[attr-defined]
_ALIKE = {getattr(Tensor, name).__get__ for name in ("dtype", "device", "ndim", "layout", "is_cuda", "requires_grad")}


class HandedOn:
    """What the layers of the last pass were handed, as long as somebody holds it."""

    def __init__(self) -> None:
        self._states: WeakSet[HandedOnStates] = WeakSet()

    def hand_out(
        self, step: Step, table: BlockTable, storage: LayerStorage, pages: tuple[Tensor, Tensor]
    ) -> tuple["HandedOnTensor", "HandedOnTensor"]:
        """Return what stands for pages, and for a copy where need be; arguments as for `HandedOnStates`."""
        states = HandedOnStates(step, table, storage, pages)
        self._states.add(states)
        return states.tensors()

    @property
    def is_held(self) -> bool:
        """Whether somebody does."""
        return bool(self._states)

    def unshare(self) -> None:
        """Copy what is still shared, as pages are about to change."""
        if self._states:
            for states in list(self._states):
                states.unshare()
            self._states.clear()


class HandedOnStates:
    """What one layer was handed in one forward pass: pages for attention, a padded copy for anybody else.

    Args:
        step: the forward pass, which has written the layer and reads its pages.
        table: the rows of the layer's group.
        storage: of the layer.
        pages: its keys and values as attention reads them.
    """

    def __init__(self, step: Step, table: BlockTable, storage: LayerStorage, pages: tuple[Tensor, Tensor]) -> None:
        self._step: Step | None = step
        self._source = table, storage
        self._pages = pages
        self._copies: tuple[Tensor, Tensor] | None = None
        self._versions: tuple[int, int] | None = None

    def tensors(self) -> tuple["HandedOnTensor", "HandedOnTensor"]:
        """Return keys and values to hand out."""
        return _standing_for(self)

    def copies(self) -> tuple[Tensor, Tensor]:
        """Copy the rows, as of this pass: each `(num_rows, num_kv_heads, num_columns, head_dim)`.

        The columns are those that a query of this pass sees, as other attention functions are handed them.
        """
        if self._copies is None:
            assert self._step is not None
            table, storage = self._source
            first_column = self._step.first_column(table.group.window)
            with torch.inference_mode(False), torch.no_grad():
                keys, values = gather_columns(storage, table, self._step.next_columns, first_column)
            self._copies, self._versions = (keys, values), (keys._version, values._version)
        return self._copies

    def unshare(self) -> None:
        """Be copies alone: the pages are about to change."""
        self._pages = self.copies()
        self._step = None
        del self._source

    def shape(self, which: int) -> torch.Size:
        """The shape of the copy of the keys (0) or values (1), which is not made for it."""
        if self._copies is not None or self._step is None:
            return self.copies()[which].shape
        table, _ = self._source
        num_columns = self._step.next_columns.count - self._step.first_column(table.group.window)
        _, num_kv_heads, _, head_dim = self._pages[which].shape
        return torch.Size((table.num_rows, num_kv_heads, num_columns, head_dim))

    def example(self, which: int) -> Tensor:
        """Return a tensor of the same dtype, device and number of dimensions as the keys (0) or values (1)."""
        return self._pages[which]

    def for_attention(self, step: Step | None) -> tuple[Tensor, Tensor]:
        """Return what an attention function reads: pages in the pass itself, copies otherwise.

        Args:
            step: the pass that the mask belongs to; None with any other mask.

        Raises:
            ValueError: if the copies were changed, which the pages don't know.
        """
        if step is None or step is not self._step:
            return self.copies()
        if self._copies is not None and (self._copies[0]._version, self._copies[1]._version) != self._versions:
            raise ValueError(
                "Keys or values that PagedCache.update() returned were changed in place before attention, which reads "
                'them from pages. Load the model with attn_implementation="sdpa" or "eager"; PagedCache works with '
                "both."
            )
        return self._pages


class RepeatedRows:
    """Keys and values of rows of which some are alike: each held once for attention, a copy for anybody else.

    Args:
        held: keys and values, each `(num_held, num_kv_heads, num_columns, head_dim)`.
        rows: `(num_rows,)` int64, on the host, which of these each row is.
    """

    def __init__(self, held: tuple[Tensor, Tensor], rows: Tensor) -> None:
        self.held = held
        self.rows = rows
        repeats, num_missing = divmod(len(rows), len(held[0]))
        in_order = torch.arange(len(held[0])).repeat_interleave(repeats)
        self.index = rows.to(held[0].device)
        """`rows`, where the keys are."""
        self._are_in_order = not num_missing and torch.equal(rows, in_order)
        self._copies: tuple[Tensor, Tensor] | None = None
        self._versions = 0, 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "RepeatedRows":
        other = RepeatedRows(deepcopy(self.held, memo), self.rows)
        if self.are_changed:  # which versions of tensors that are copied don't show
            other._copies, other._versions = deepcopy(self._copies, memo), (-1, -1)
        return other

    def tensors(self) -> tuple["HandedOnTensor", "HandedOnTensor"]:
        """Return keys and values to hand out."""
        return _standing_for(self)

    def copies(self) -> tuple[Tensor, Tensor]:
        """Copy the rows: each `(num_rows, num_kv_heads, num_columns, head_dim)`."""
        if self._copies is None:
            with torch.inference_mode(False), torch.no_grad():
                keys, values = (tensor.index_select(0, self.index) for tensor in self.held)
            self._copies, self._versions = (keys, values), (keys._version, values._version)
        return self._copies

    @property
    def are_changed(self) -> bool:
        """Whether somebody has changed the copies, which are other rows then than those that are held."""
        return self._copies is not None and (self._copies[0]._version, self._copies[1]._version) != self._versions

    def shape(self, which: int) -> torch.Size:
        """The shape of the copy of the keys (0) or values (1), which is not made for it."""
        return torch.Size((len(self.rows), *self.held[which].shape[1:]))

    def example(self, which: int) -> Tensor:
        """Return a tensor of the same dtype, device and number of dimensions as the keys (0) or values (1)."""
        return self.held[which]

    def for_attention(self, step: Step | None) -> tuple[Tensor, Tensor]:
        """Return what an attention function reads: where each is equally often there, one after another, as held."""
        return self.held if self._are_in_order and not self.are_changed else self.copies()


def _standing_for(states: HandedOnStates | RepeatedRows) -> tuple["HandedOnTensor", "HandedOnTensor"]:
    keys, values = (_NOTHING.as_subclass(HandedOnTensor) for _ in range(2))
    keys.states, keys.which = states, 0
    values.states, values.which = states, 1
    return keys, values


class HandedOnTensor(Tensor):
    """Keys or values of a layer: for the attention of `"paged_flex"` what is held, in any other use a padded copy.

    Attributes:
        states: whose they are.
        which: 0 for keys, 1 for values.
    """

    states: HandedOnStates | RepeatedRows
    which: int

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Let torch have the copy."""
        kwargs = kwargs or {}
        shared = args[0] if args else None
        if isinstance(shared, HandedOnTensor) and (func is Tensor.to or func in _ALIKE):
            example = shared.states.example(shared.which)[:, :, :1]
            answer = func(example, *args[1:], **kwargs)
            if func is not Tensor.to:
                return answer
            if answer is example:
                return shared
        if isinstance(shared, HandedOnTensor) and func in _OF_SHAPE:
            return func(torch.empty(shared.states.shape(shared.which), device="meta"), *args[1:], **kwargs)
        return func(*_copied(args), **_copied(kwargs))


def _copied(value: Any) -> Any:
    match value:
        case HandedOnTensor():
            return value.states.copies()[value.which]
        case list() | tuple():
            return type(value)(map(_copied, value))
        case dict():
            return {key: _copied(item) for key, item in value.items()}
    return value
