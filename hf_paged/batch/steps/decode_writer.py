"""Writing one token of each row, on a CPU."""

import torch
from torch import Tensor

from hf_paged._torch.tricks import Trick
from hf_paged.batch.steps.step import Step, View
from hf_paged.pages.pool import PagePool
from hf_paged.pages.storage import LayerStorage

DECODE_WRITER = Trick(
    "decode_writer",
    "what is the same for all layers of a decoding step on a CPU is found once, before the first",
    "each layer looks at its keys and values, and finds its slots",
    device_type="cpu",
)


class DecodeWriter:
    """Writes the tokens of a step into the layers of a group, all into the same slots.

    Between two layers their weights go through the processor's caches, so that each line of Python that has to be
    fetched again counts. Everything that is the same for all layers is found before the first one.

    Args:
        step: adds one token to each row, whose pages are reserved.
        group: index of the group of layers.
        storages: of its layers that have the head counts and sizes of the first of them.

    Attributes:
        step: as given.
    """

    def __init__(self, step: Step, group: int, storages: dict[int, LayerStorage]) -> None:
        first = next(iter(storages.values()))
        self.step = step
        self._table = step.placements[group].table
        self._slots = step.placements[group].written
        self._storages = storages
        (key_heads, key_dim), (value_heads, value_dim) = first.key_shape, first.value_shape
        self._shapes = (step.num_rows, key_heads, 1, key_dim), (step.num_rows, value_heads, 1, value_dim)
        self._dtype = first.dtype

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor] | None:
        """Write the new tokens of a layer and return its storage; None if they aren't as for the first layer."""
        storage = self._storages.get(layer)
        if storage is None or (keys.shape, values.shape) != self._shapes:
            return None
        if keys.dtype is not self._dtype or values.dtype is not self._dtype or not (keys.is_cpu and values.is_cpu):
            return None
        if type(keys) is not Tensor or type(values) is not Tensor or keys.layout is not torch.strided:
            return None
        storage.write_one_each(keys, values, self._slots)
        tensors = storage.tensors
        self.step.handed[tensors[0].data_ptr()] = tensors[0], self._table, storage
        return tensors


def decode_writers(step: Step, pool: PagePool) -> dict[int, DecodeWriter]:
    """Make the writers of a step, by the index of their group: none where tokens are written in another way."""
    writers: dict[int, DecodeWriter] = {}
    if not DECODE_WRITER.is_on or step.num_new > 1 or step.view is not View.PAGES or not step.is_settled:
        return writers
    for index, group in enumerate(pool.groups):
        storages = {layer: storage for layer in group.layers if (storage := group.storage(layer)) is not None}
        first = next(iter(storages.values()), None)
        if (
            first is None
            or first.device.type != "cpu"
            or step.placements[index].slots(step, first.device)[1] is not None
        ):
            continue
        alike = {layer: storage for layer, storage in storages.items() if storage.is_like(first)}
        writers[index] = DecodeWriter(step, index, alike)
    return writers
