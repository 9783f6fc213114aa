"""What is in a cache, and what a person sees of it."""

from typing import TYPE_CHECKING

from torch import Tensor
from transformers import Cache

from hf_paged.batch.sequences import Sequences
from hf_paged.pages.pool import PagePool
from hf_paged.pages.stats import MemoryStats
from hf_paged.pages.views.memory_map import MemoryMap

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Contents(Cache):
    """A cache that can be looked into, and into whose layers other keys and values can be put."""

    pool: PagePool
    _sequences: Sequences

    def gather(self, layer_idx: int) -> tuple[Tensor | None, Tensor | None]:
        """Copy a layer into the layout of DynamicCache; `(None, None)` when empty.

        Returns:
            Keys and values, each `(num_rows, num_kv_heads, num_columns, head_dim)`, 0 where there was padding. Layers
            with a sliding window begin at the first column that the next query sees. Changes of them have no effect,
            see `set`.

        Raises:
            ValueError: if there is no such layer, or it stores nothing.
        """
        self._check_stores(layer_idx)
        self._sequences.apply_edits()
        return self._sequences.rows.copied(layer_idx)

    def set(self, layer_idx: int, keys: Tensor, values: Tensor) -> None:
        """Put other keys and values into a layer.

        Pages that other caches or rows hold too are copied first. Keys and values with other rows or columns than the
        cache has take effect once all layers have been given these, see `PagedLayer.keys`.

        Args:
            layer_idx: a layer that stores keys and values.
            keys: `(num_rows, num_kv_heads, num_columns, head_dim)`, rotary embedding applied, laid out as `gather`
                returns them. What stands in columns of padding is left out.
            values: like `keys`; the head size may differ.

        Raises:
            OutOfPagesError: if there are too few pages; nothing has changed.
            ValueError: if the layer can't hold these, or a forward pass is under way; nothing has changed.
        """
        self._check_stores(layer_idx)
        self._sequences.edits.set(self._sequences, layer_idx, keys, values)

    def _check_stores(self, layer_idx: int) -> None:
        if layer_idx not in self.pool.group_of_layer:
            raise ValueError(
                f"Layer {layer_idx} stores no keys and values; those that do: {sorted(self.pool.group_of_layer)}."
            )

    def stats(self) -> MemoryStats:
        """Account for the pages and bytes that this cache holds; `cache.pool.stats()` does so for all on the pool."""
        if not self._sequences.rows.are_out:
            self._sequences.drop_past()
        return self._sequences.rows.stats()

    def memory_map(self, width: int = 64) -> MemoryMap:
        """Draw the pages of each group of layers, and list the pages of each row.

        Args:
            width: pages to a line of text.

        Returns:
            What `print` shows as text and a notebook as a picture.
        """
        self._sequences.commit_first()
        return self._sequences.rows.memory_map(width)

    def plot(self) -> "Figure":
        """Draw each row as a bar of its pages, with matplotlib.

        Returns:
            A figure, with axes for each group of layers.

        Raises:
            ModuleNotFoundError: if matplotlib isn't installed.
        """
        return self.memory_map().plot()
