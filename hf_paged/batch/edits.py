"""What callers do to the copies of keys and values that they were handed.

With Transformers' own caches `layer.keys` is what the cache holds, so that code steers, evicts or quantises by
changing it or by putting another tensor in its place. Here it is a copy. It is kept, so that a change of it is
noticed, by its version, and goes into the pages before anything else happens to the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_paged.batch.padding import Columns
from hf_paged.batch.rewrite import replace, rewrite
from hf_paged.pages.storage import LayerStorage

if TYPE_CHECKING:
    from hf_paged.batch.sequences import Sequences

_NAMES = ("keys", "values")
_ASSIGNED = -1  # no tensor has this version


class Copy:
    """Keys and values of a layer as a caller sees them.

    Args:
        columns: the record of the columns that they belong to; with another one they are out of date.
        keys: `(num_rows, num_kv_heads, num_columns, head_dim)`; None when empty.
        values: like `keys`.
    """

    def __init__(self, columns: Columns, keys: Tensor | None, values: Tensor | None) -> None:
        self.columns = columns
        self.tensors = [keys, values]
        self.note_unchanged()

    def note_unchanged(self) -> None:
        """Note that these are the keys and values that the pages hold."""
        self._versions = [_version(tensor) for tensor in self.tensors]

    def assign(self, which: int, tensor: Tensor | None) -> None:
        """Have another tensor for the keys (0) or the values (1)."""
        self.tensors[which], self._versions[which] = tensor, _ASSIGNED

    @property
    def is_changed(self) -> bool:
        """Whether they may not be what the pages hold."""
        return [_version(tensor) for tensor in self.tensors] != self._versions

    @property
    def is_watched(self) -> bool:
        """Whether changes are going to be noticed."""
        return not any(tensor is None or tensor.is_inference() for tensor in self.tensors)


class Edits:
    """The copies that a cache has handed out since it last changed, by layer."""

    def __init__(self) -> None:
        self.copies: dict[int, Copy] = {}

    def read(self, sequences: Sequences, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """Return keys and values of a layer, the same tensors until the cache changes; `(None, None)` when empty.

        Raises:
            ValueError: if a forward pass is under way that has written the layer.
        """
        keys, values = self._copy(sequences, layer).tensors
        return keys, values

    def assign(self, sequences: Sequences, layer: int, which: int, tensor: Tensor | None) -> None:
        """Have another tensor for the keys (0) or the values (1) of a layer.

        Raises:
            ValueError: if it can't be such a tensor, or a forward pass is under way; nothing has changed.
        """
        copy = self._copy(sequences, layer)
        if sequences.step is not None:
            raise _changed_in_a_pass(layer)
        _check(sequences.pool.storage(layer), layer, which, tensor)
        copy.assign(which, tensor)

    def set(self, sequences: Sequences, layer: int, keys: Tensor, values: Tensor) -> None:
        """Put keys and values into a layer; with other rows or columns than now, once all layers have been given them.

        Raises:
            OutOfPagesError: if there are too few pages; nothing has changed.
            ValueError: as for `assign`, or if keys and values don't belong together; nothing has changed.
        """
        sequences.commit_first()
        if sequences.step is not None:
            raise _changed_in_a_pass(layer)
        storage = sequences.pool.storage(layer)
        _check(storage, layer, 0, keys)
        _check(storage, layer, 1, values)
        if keys.shape[::2] != values.shape[::2]:
            raise ValueError(
                f"Layer {layer} was given values of shape {tuple(values.shape)} for keys of shape {tuple(keys.shape)}."
            )
        self._drop_old(sequences)
        num_rows, count = self._shape(sequences)
        if (num_rows, count) == _held_shape(sequences) and keys.shape[::2] == (
            num_rows,
            _width(sequences, layer, count),
        ):
            sequences.apply_edits()
            rewrite(sequences.rows, {layer: (keys.detach(), values.detach())})
            self.copies.pop(layer, None)
            return
        copy = self._copy(sequences, layer)
        copy.assign(0, keys)
        copy.assign(1, values)
        if not self._misfits(sequences, *self._shape(sequences)):
            sequences.apply_edits()

    def check_untouched(self, layer: int) -> None:
        """Raise ValueError if a layer was changed that the forward pass under way is about to write."""
        copy = self.copies.get(layer)
        if copy is not None and copy.is_changed:
            raise _changed_in_a_pass(layer)

    def count(self, sequences: Sequences, layer: int) -> int:
        """Columns before the step under way; of a layer alone, where not all have been assigned yet."""
        sequences.commit_first()
        if not self.copies or sequences.step is not None:
            return sequences.rows.columns.count
        self._drop_old(sequences)
        num_rows, count = self._shape(sequences)
        if not self._misfits(sequences, num_rows, count):
            return count
        keys = self.copies[layer].tensors[0] if layer in self.copies else None
        return sequences.rows.columns.count if keys is None or sequences.pool.layers[layer].window else keys.shape[2]

    def absorb(self, sequences: Sequences) -> None:
        """Let the pages hold what was changed.

        Args:
            sequences: the rows, between two forward passes.

        Raises:
            OutOfPagesError: if the pool has too few pages for those that somebody else holds, too, or for more
                columns; nothing has changed.
            ValueError: if some layers have other columns now, and not all; nothing has changed.
        """
        self._drop_old(sequences)
        changed = {layer: copy for layer, copy in self.copies.items() if copy.is_changed}
        if not changed:
            return
        for layer, copy in changed.items():
            for which, tensor in enumerate(copy.tensors):
                if tensor is not None:
                    _check(sequences.pool.storage(layer), layer, which, tensor)
        num_rows, count = self._shape(sequences)
        misfits = self._misfits(sequences, num_rows, count)
        if misfits:
            raise ValueError(
                f"Keys or values of {num_rows} rows and {count} columns were assigned to some layers of this cache, "
                f"but {', '.join(misfits)}. The layers of a PagedCache have their rows and columns in common: assign "
                "keys and values of every layer, or call cache.reset()."
            )
        if (num_rows, count) == _held_shape(sequences):
            rewrite(sequences.rows, {layer: _pair(copy) for layer, copy in changed.items()})
        elif sequences.pool.has_states:
            raise ValueError(
                f"Keys and values of {num_rows} rows and {count} columns were assigned to a cache of "
                f"{' rows and '.join(map(str, _held_shape(sequences)))} columns, whose recurrent layers have a state "
                "for each row, of all columns. Assign as many rows and columns as there are, or call cache.reset()."
            )
        else:
            replace(
                sequences,
                {layer: _pair(self.copies[layer]) for layer in sequences.rows.holding_layers},
                num_rows,
                count,
            )
        for layer, copy in list(self.copies.items()):
            copy.columns = sequences.rows.columns
            copy.note_unchanged()
            if not copy.is_watched or _pair(copy)[0].shape[2] != _width(
                sequences, layer, sequences.rows.columns.count
            ):
                del self.copies[layer]

    def truncated(self, sequences: Sequences, count: int) -> dict[int, tuple[Tensor, Tensor]]:
        """Return the keys and values of the copies that go on when only the first `count` columns are kept."""
        kept: dict[int, tuple[Tensor, Tensor]] = {}
        columns = sequences.rows.columns
        for layer, copy in self.copies.items():
            width = _width(sequences, layer, count)
            is_beginning = columns.count - _width(sequences, layer, columns.count) == count - width
            if copy.columns is columns and is_beginning and width and copy.tensors[0] is not None:
                keys, values = _pair(copy)
                kept[layer] = keys[:, :, :width], values[:, :, :width]
        return kept

    def hold(self, sequences: Sequences, copies: dict[int, tuple[Tensor, Tensor]]) -> None:
        """Have these keys and values as copies of what is cached now."""
        self.copies = {layer: Copy(sequences.rows.columns, *pair) for layer, pair in copies.items()}

    def _drop_old(self, sequences: Sequences) -> None:
        self.copies = {layer: copy for layer, copy in self.copies.items() if copy.columns is sequences.rows.columns}

    def _copy(self, sequences: Sequences, layer: int) -> Copy:
        sequences.commit_first()
        if sequences.step is not None and layer not in sequences.progress.missing | sequences.rows.absent:
            raise ValueError(
                f"Keys or values of layer {layer} were read in the middle of the forward pass that has written them, "
                "or after one that failed. A PagedCache shows them between two passes: read and change them then; "
                "after a pass that failed, call cache.roll_back() first."
            )
        copy = self.copies.get(layer)
        if copy is None or copy.columns is not sequences.rows.columns:
            # Inference tensors would have no version.
            with torch.inference_mode(False), torch.no_grad():
                copy = Copy(sequences.rows.columns, *sequences.rows.copied(layer))
            self.copies[layer] = copy
        return copy

    def _shape(self, sequences: Sequences) -> tuple[int, int]:
        """Rows and columns that the layers are to have: others than now if some layer has others."""
        num_rows, count = _held_shape(sequences)
        windows = sequences.pool.layers
        for layer in sorted(self.copies, key=lambda layer: windows[layer].window is not None):
            for tensor in self.copies[layer].tensors:
                if tensor is not None and tensor.shape[::2] != (num_rows, _width(sequences, layer, count)):
                    return tensor.shape[0], tensor.shape[2]
        return num_rows, count

    def _misfits(self, sequences: Sequences, num_rows: int, count: int) -> list[str]:
        """Say in words which layers don't have these rows and columns."""
        misfits = []
        is_new = (num_rows, count) != _held_shape(sequences)
        for layer in sequences.rows.holding_layers:
            copy = self.copies.get(layer)
            if copy is None:
                if is_new:
                    misfits.append(f"layer {layer} has what it had")
                continue
            for name, tensor in zip(_NAMES, copy.tensors, strict=True):
                if tensor is None:
                    misfits.append(f"layer {layer} has no {name}")
                elif tensor.shape[0] != num_rows or tensor.shape[2] not in (count, _width(sequences, layer, count)):
                    misfits.append(f"layer {layer} has {name} of {tensor.shape[0]} rows and {tensor.shape[2]} columns")
        return misfits


def _check(storage: LayerStorage | None, layer: int, which: int, tensor: Tensor | None) -> None:
    """Refuse what can't be the keys (0) or the values (1) of a layer."""
    name = _NAMES[which]
    if not isinstance(tensor, Tensor) or tensor.ndim != 4 or 0 in tensor.shape:
        found = f"a tensor {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else tensor
        raise ValueError(
            f"Layer {layer} was given {found} for its {name}. Give a tensor (num_rows, num_kv_heads, num_columns, "
            "head_dim) that has all of these, or call cache.reset() to have none."
        )
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"Layer {layer} was given {name} that require gradients, but a PagedCache can't be differentiated. "
            "Change it under torch.no_grad()."
        )
    if storage is None:
        return
    shape = storage.value_shape if which else storage.key_shape
    num_heads, head_dim = tensor.shape[1], tensor.shape[3]
    if ((num_heads, head_dim), tensor.dtype, tensor.device) != (shape, storage.dtype, storage.device):
        raise ValueError(
            f"Layer {layer} was given {name} of {num_heads} heads of {head_dim} in {tensor.dtype} on {tensor.device}, "
            f"but this cache holds {shape[0]} heads of {shape[1]} in {storage.dtype} on {storage.device}. Convert "
            "them first."
        )


def _changed_in_a_pass(layer: int) -> ValueError:
    return ValueError(
        f"Keys or values of layer {layer} were changed while a forward pass was under way, or after one that failed. "
        "Change them between two passes; after one that failed, call cache.roll_back() first."
    )


def _pair(copy: Copy) -> tuple[Tensor, Tensor]:
    keys, values = copy.tensors
    assert keys is not None
    assert values is not None
    return keys.detach(), values.detach()


def _version(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def _held_shape(sequences: Sequences) -> tuple[int, int]:
    return sequences.rows.count if sequences.rows.columns.count else 0, sequences.rows.columns.count


def _width(sequences: Sequences, layer: int, count: int) -> int:
    """Columns that a layer hands out of `count`."""
    window = sequences.pool.layers[layer].window
    return count if window is None else min(count, window - 1)
