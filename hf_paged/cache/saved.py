"""A cache in a file: the tokens of its rows as they are, whatever pages they are in."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_paged._transformers import layer_devices, layer_specs, num_attention_layers
from hf_paged.batch.padding import Columns, Counts
from hf_paged.batch.sequences import Sequences
from hf_paged.cache.prompt.origin import origin_of
from hf_paged.cache.saved_states import described_states, hold_states, read_states
from hf_paged.cache.weights_digest import ModelDigest, model_digest
from hf_paged.pages.block_table import BlockTable
from hf_paged.pages.storage import LayerStorage
from hf_paged.pages.tiers.checked_file import read_tensors, remove_abandoned, write_tensors

_FORMAT = "hf-paged cache 1"
_UNFIT = "its parts don't belong together"
_REMEDY = "Pass what cache.save() has written, and the model that it was saved for; or compute the prompt anew."


def save(sequences: Sequences, path: str | os.PathLike[str], model: PreTrainedModel | None) -> None:
    """Write what sequences hold, in place of a file that may be there.

    Args:
        sequences: of a cache.
        path: of the file.
        model: that has computed it; None if that isn't known.

    Raises:
        OSError: if it can't be written; the old file is still there.
        ValueError: if a forward pass is under way, the model isn't known, has weights that aren't in memory or keeps
            positions to itself, or there is an encoder.
    """
    if sequences.pool.has_encoder:
        raise ValueError(
            "save() was called on the cache of an encoder-decoder, but what it keeps of the encoder is in no pages "
            "and would be missing. Save the tokens, and compute both anew."
        )
    if model is None:
        raise ValueError(
            "save() was called on a cache of which nothing says which model has computed it. Pass the model: "
            "cache.save(path, model)."
        )
    deltas = (getattr(module, "rope_deltas", None) for module in model.modules())
    if any(isinstance(delta, Tensor) and delta.any() for delta in deltas):
        raise ValueError(
            f"save() was called on the cache of a {type(model).__name__} that has been given images: it keeps the "
            "positions that follow them to itself (rope_deltas), and they would be missing. Save tokens and images."
        )
    sequences.end_step()
    tensors, numbers = _described(sequences)
    numbers["is_plain"] = sequences.rows.is_plain
    numbers["is_findable"] = sequences.rows.origin == origin_of(model, sequences)
    metadata = {
        "format": _FORMAT,
        "model": json.dumps({"class": type(model).__name__, **asdict(model_digest(model))}),
        "numbers": json.dumps(numbers),
    }
    remove_abandoned(Path(path))
    write_tensors(Path(path), tensors, metadata)


def load(sequences: Sequences, path: str | os.PathLike[str], model: PreTrainedModel) -> None:
    """Let empty sequences hold what is in a file.

    Args:
        sequences: of a new cache.
        path: of the file.
        model: that is to go on.

    Raises:
        FileNotFoundError: if there is none.
        OutOfPagesError: if it doesn't fit into the pool; nothing has changed.
        ValueError: if the file is not what `save` has written, or another model has computed it; nothing has changed.
    """
    if layer_specs(model.config.get_text_config(decoder=True)) != sequences.pool.layers:
        raise ValueError(
            f"load() was given a {type(model).__name__} with other layers than the model that the pool was made for. "
            "Pass a pool that was made for this model, or none."
        )
    try:
        tensors, metadata = read_tensors(Path(path))
        content = _Content(tensors, _numbers(metadata, model), sequences)
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:  # of parts that have been forged
        raise ValueError(f"{os.fspath(path)} can't be loaded: {_UNFIT} ({error!r}). {_REMEDY}") from error
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} can't be loaded: {error}. {_REMEDY}") from error
    try:
        layers = range(len(sequences.pool.layers))
        content.fill(sequences, {**dict.fromkeys(layers, model.device), **layer_devices(model)})
    except BaseException:
        sequences.clear()
        raise
    sequences.progress.num_layers = num_attention_layers(model, len(sequences.pool.layers))
    sequences.rows.is_plain = content.numbers["is_plain"] is True
    # A page whose beginning has left a window, as in pages of another size, must not be handed out as a whole one.
    begins_pages = all((table.starts % table.group.page_size == 0).all() for table in sequences.rows.tables)
    if content.numbers["is_findable"] and begins_pages:
        sequences.rows.origin = origin_of(model, sequences)


def _numbers(metadata: dict[str, str], model: PreTrainedModel) -> dict[str, Any]:
    """The numbers of a file that was saved for a model."""
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"it is a file of {metadata.get('format', 'something else')!r}, not of {_FORMAT!r}")
    saved = json.loads(metadata["model"])
    name = saved.pop("class")
    differences = model_digest(model).differences(ModelDigest(**saved))
    if differences:
        raise ValueError(
            f"it holds what another model has computed: {', '.join(differences)} of that {name} are not those of "
            f"this {type(model).__name__}"
        )
    numbers: dict[str, Any] = json.loads(metadata["numbers"])
    return numbers


def _described(sequences: Sequences) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What sequences hold, as tensors and numbers."""
    rows = sequences.rows
    numbers: dict[str, Any] = {
        "groups": _groups(sequences),
        "num_rows": rows.num_committed,
        "num_columns": rows.columns.count,
        "absent": sorted(rows.absent),
        "records_past": sequences.records_past,
    }
    if rows.columns.count == 0:
        return {}, numbers
    tensors, numbers["states"] = described_states(sequences)
    arrays: dict[str, npt.NDArray[Any] | None] = {"real": rows.columns.real, "released": rows.columns.released}
    if rows.known_ids.known is not None:
        tensors["ids"], numbers["first_known"] = rows.known_ids.known
    for index, table in enumerate(rows.tables):
        slots, tokens = np.unique(
            np.concatenate([_slots(table, row) for row in range(rows.count)]), return_inverse=True
        )
        arrays |= {f"starts.{index}": table.starts, f"tokens.{index}": tokens}
        for layer in table.group.layers:
            storage = sequences.pool.storage(layer)
            if storage is not None and layer not in rows.absent:
                gathered = storage.gather(torch.from_numpy(slots).to(storage.device))
                tensors[f"keys.{layer}"], tensors[f"values.{layer}"] = gathered
    tensors |= {name: torch.from_numpy(array.copy()) for name, array in arrays.items() if array is not None}
    return tensors, numbers


def _groups(sequences: Sequences) -> list[list[Any]]:
    """For each group of layers its window and which they are."""
    return [[group.window, list(group.layers)] for group in sequences.pool.groups]


def _slots(table: BlockTable, row: int) -> Counts:
    """The slots of the tokens that a row holds."""
    page_size = table.group.page_size
    places = np.arange(table.starts[row], table.lengths[row])
    pages = table.block_table[row, places // page_size].astype(np.int64)
    slots: Counts = pages * page_size + places % page_size
    return slots


@dataclass(frozen=True)
class _Piece:
    """What is in a page.

    Attributes:
        place: of the page in its row.
        first: the first of its slots that is used.
        tokens: which of the tokens in the file there are, from that slot on.
    """

    place: int
    first: int
    tokens: Counts

    @property
    def offsets(self) -> Counts:
        """The slots that are used."""
        return np.arange(self.first, self.first + len(self.tokens))


class _Content:
    """What a file holds.

    Args:
        tensors: of the file.
        numbers: of the file.
        sequences: that will hold it.

    Raises:
        KeyError: if a part is missing.
        ValueError: if the parts don't belong together, or not to the layers of the pool; as the end of a sentence.
    """

    def __init__(self, tensors: dict[str, Tensor], numbers: dict[str, Any], sequences: Sequences) -> None:
        self.numbers = numbers
        if numbers["groups"] != _groups(sequences):
            raise ValueError(f"its layers and windows are {numbers['groups']}, not {_groups(sequences)}")
        num_rows, num_columns = numbers["num_rows"], numbers["num_columns"]
        real, released, self.ids = (tensors.get(name) for name in ("real", "released", "ids"))
        is_whole = (real is None or (real.dtype, real.shape) == (torch.bool, (num_rows, num_columns))) and (
            released is None or (released.dtype, released.shape) == (torch.bool, (num_rows,))
        )
        if is_whole and self.ids is not None:
            num_known = num_columns - numbers["first_known"]
            is_whole = self.ids.ndim == 2 and len(self.ids) in (1, num_rows) and self.ids.shape[1] <= num_known
        if not is_whole:
            raise ValueError(_UNFIT)
        self.columns = Columns(num_columns, *(None if part is None else part.numpy() for part in (real, released)))
        self.lengths = self.columns.num_tokens_before(np.array([num_columns]), num_rows)[:, 0]
        self.groups = [
            _GroupContent(index, [layer for layer in group.layers if layer not in numbers["absent"]], tensors)
            for index, group in enumerate(sequences.pool.groups if num_columns else [])
        ]
        found = read_states(tensors, numbers.get("states", {}), num_rows, sequences) if num_columns else {}
        if found is None or not all(group.is_whole(self.lengths) for group in self.groups):
            raise ValueError(_UNFIT)
        self.states = found

    def fill(self, sequences: Sequences, devices: dict[int, torch.device]) -> None:
        """Let sequences hold it.

        Args:
            sequences: without rows.
            devices: of the layers, for those that the pool has no storage for yet.
        """
        rows = sequences.rows
        sequences.records_past = self.numbers["records_past"]
        if not self.columns.count:
            return
        for table, group in zip(rows.tables, self.groups, strict=True):
            table.open_rows(len(self.lengths))
            group.fill(table, self.lengths, sequences, devices)
        hold_states(sequences, self.states, devices)
        rows.absent = frozenset(self.numbers["absent"])
        rows.columns = self.columns
        if self.ids is not None:
            first = self.numbers["first_known"]
            ids = torch.nn.functional.pad(self.ids, (first, 0))
            rows.known_ids.note(ids, first, ids.shape[1])


class _GroupContent:
    """What a file holds of a group of layers.

    Args:
        index: of the group.
        layers: those that hold tokens.
        tensors: of the file.
    """

    def __init__(self, index: int, layers: list[int], tensors: dict[str, Tensor]) -> None:
        self.starts = tensors[f"starts.{index}"].numpy()
        self.tokens = tensors[f"tokens.{index}"].numpy()
        self.states = {layer: (tensors[f"keys.{layer}"], tensors[f"values.{layer}"]) for layer in layers}

    def is_whole(self, lengths: Counts) -> bool:
        """Whether its parts belong together, and to rows of these lengths."""
        states = [tensor for pair in self.states.values() for tensor in pair]
        return bool(
            {self.starts.dtype, self.tokens.dtype} == {np.dtype(np.int64)}
            and all(tensor.ndim == 3 for tensor in states)
            and self.starts.shape == lengths.shape
            and (self.starts >= 0).all()
            and (self.starts <= lengths).all()
            and self.tokens.shape == ((lengths - self.starts).sum(),)
            and (self.tokens >= 0).all()
            and (not states or (self.tokens < min(tensor.shape[1] for tensor in states)).all())
        )

    def fill(self, table: BlockTable, lengths: Counts, sequences: Sequences, devices: dict[int, torch.device]) -> None:
        """Let the empty rows of a table hold it; rows that have the same tokens in a page share the page."""
        group, page_size = table.group, table.group.page_size
        pieces, chosen = self._cut(lengths, page_size)
        pages = group.take(len(pieces), admit=True)
        group.place(pages, [piece.place for piece in pieces])
        held: set[int] = set()
        for row, indices in enumerate(chosen):
            own = [pages[index] for index in indices]
            group.allocator.retain([page for page in own if page in held])
            held.update(own)
            table.adopt(row, own, int(self.starts[row]), int(lengths[row]))
        storages: dict[int, LayerStorage] = {}
        for layer, pair in self.states.items():
            storage = sequences.pool.storage(layer)
            device = devices[layer] if storage is None else storage.device
            storages[layer] = sequences.pool.open_storage(layer, *(tensor[None, :, :0].to(device) for tensor in pair))
        if not pieces:
            return
        filled = list(zip(pages, pieces, strict=True))
        group.clear_values([page for page, piece in filled if len(piece.tokens) < page_size])
        slots = torch.from_numpy(np.concatenate([page * page_size + piece.offsets for page, piece in filled]))
        tokens = torch.from_numpy(np.concatenate([piece.tokens for piece in pieces]))
        for layer, storage in storages.items():
            there = tokens.to(storage.device)
            keys, values = (tensor.to(storage.device).index_select(1, there) for tensor in self.states[layer])
            storage.write(keys, values, slots.to(storage.device))

    def _cut(self, lengths: Counts, page_size: int) -> tuple[list[_Piece], list[list[int]]]:
        """Cut rows into pages.

        Returns:
            What is in each page, and for each row which of these pages it has.
        """
        found: dict[tuple[int, bytes], int] = {}
        pieces: list[_Piece] = []
        chosen: list[list[int]] = []
        ends = np.cumsum(lengths - self.starts)
        for start, length, stop in zip(self.starts.tolist(), lengths.tolist(), ends.tolist(), strict=True):
            chosen.append([])
            for place in range(start // page_size, -(-length // page_size)):
                first, end = max(start, place * page_size), min(length, (place + 1) * page_size)
                tokens = self.tokens[stop - length + first : stop - length + end]
                index = found.setdefault((first, tokens.tobytes()), len(pieces))
                if index == len(pieces):
                    pieces.append(_Piece(place, first - place * page_size, tokens))
                chosen[-1].append(index)
        return pieces, chosen
