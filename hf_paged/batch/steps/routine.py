"""Writing one token of each row: what is left to be done for a layer once another one like it was written."""

from torch import Tensor

from hf_paged.batch.steps.step import Step, View
from hf_paged.pages.storage import LayerStorage


class Routine:
    """Layers on a CPU that hold the same kind of keys and values, in a step that adds one token to each row.

    Between two layers their weights go through the processor's caches, so that each line of Python that has to be
    fetched again counts. Everything that the first layer has shown is taken from there.

    Args:
        step: the forward pass.
        group: index of the group of layers.
        storages: of the layers that are still to be written.
        keys: `(num_rows, num_kv_heads, 1, head_dim)` of the layer that was written.
        values: like `keys`.
    """

    def __init__(
        self, step: Step, group: int, storages: dict[int, LayerStorage], keys: Tensor, values: Tensor
    ) -> None:
        self._step = step
        self._table = step.placements[group].table
        self._slots = step.placements[group].written
        self._storages = storages
        self._shapes = keys.shape, values.shape
        self._dtype = keys.dtype

    @staticmethod
    def begins(step: Step, group: int, storage: LayerStorage) -> bool:
        """Whether what the layer of this storage has shown goes for others of its group."""
        if step.num_new > 1 or step.view is not View.PAGES or not step.is_settled or storage.device.type != "cpu":
            return False
        return step.placements[group].slots(step, storage.device)[1] is None

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor] | None:
        """Write the new tokens of a layer and return its storage; None if it is not one of these."""
        storage = self._storages.get(layer)
        if storage is None or (keys.shape, values.shape) != self._shapes:
            return None
        if keys.dtype is not self._dtype or values.dtype is not self._dtype or not (keys.is_cpu and values.is_cpu):
            return None
        storage.write_one_each(keys, values, self._slots)
        return self._step.hand_out(self._table, storage)
