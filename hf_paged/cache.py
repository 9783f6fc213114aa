"""The Transformers Cache API over pages."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DummyLayer

from hf_paged.attention import NAME
from hf_paged.columns import Columns
from hf_paged.config import LayerSpec
from hf_paged.lengths import PastLength, PlannedLength
from hf_paged.memory_map import draw
from hf_paged.page_table import PageTable
from hf_paged.pool import PagePool
from hf_paged.stats import MemoryStats
from hf_paged.step import Step, gather_columns
from hf_paged.tiles import Tiling


class PagedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of a `PagedCache`. Its rows, lengths and pages are those of the cache.

    Args:
        cache: the cache.
        index: which of its layers this is.
        spec: what the layer stores.
    """

    is_compileable = True
    is_croppable = True
    # Transformers asks this before it rolls back: nothing is thrown away before `crop` may want it.
    record_past = True

    def __init__(self, cache: "PagedCache", index: int, spec: LayerSpec) -> None:
        self._cache = cache
        self.index = index
        self.is_sliding = spec.window is not None
        self.is_written = False
        """Whether the step under way has passed through this layer."""

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """Whether the storage of this layer exists."""
        return self._cache.pool.storage(self.index) is not None

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """A padded copy of the keys, `(num_rows, num_kv_heads, num_columns, head_dim)`; None when empty."""
        return self._cache.gather(self.index)[0]

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """A padded copy of the values, like `keys`."""
        return self._cache.gather(self.index)[1]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the storage for keys and values like these, `(batch, num_kv_heads, any, head_dim)`."""
        self._cache.pool.open_storage(self.index, key_states, value_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new tokens into their slots.

        Args:
            key_states: `(num_rows, num_kv_heads, num_new, head_dim)`, rotary embedding applied.
            value_states: like `key_states`.
            *args: ignored.
            **kwargs: ignored.

        Returns:
            Keys and values for the attention function: the storage of the layer where the step was planned by
            `paged_flex`, otherwise `(num_rows, num_kv_heads, num_columns, head_dim)`.

        Raises:
            OutOfPagesError: if the tokens don't fit; nothing is written.
            ValueError: if shapes, dtype or device don't fit, or gradients are wanted; nothing is written.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise ValueError(
                "Keys that require gradients were given to a PagedCache, which writes in place and can't be "
                "differentiated. Run the model under torch.no_grad() or torch.inference_mode()."
            )
        step = self._cache.step_for(self, key_states)
        storage = self._cache.pool.open_storage(self.index, key_states, value_states)
        step.write(storage, key_states, value_states)
        self.is_written = True
        return step.read(storage, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns after `query_length` new ones, and 0."""
        return self._cache.get_mask_sizes(query_length, self.index)

    def get_seq_length(self) -> int:
        """Columns so far, those that the step under way wrote into this layer included."""
        return self._cache.get_seq_length(self.index)

    def get_max_length(self) -> int:
        """Tokens that fit into the pool; -1 if it grows."""
        pool = self._cache.pool
        return pool.num_pages * pool.page_size if pool.is_bounded else -1

    def offload(self) -> None:
        """Refuse: pages of all layers stay where the model is."""
        self._refuse("offload")

    def prefetch(self) -> None:
        """Refuse, as `offload`."""
        self._refuse("prefetch")

    def reset(self) -> None:
        """Refuse: rows belong to the whole cache."""
        self._refuse("reset")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refuse: rows belong to the whole cache."""
        self._refuse("reorder_cache")

    def _refuse(self, method: str) -> None:
        raise ValueError(
            f"{method}() was called on layer {self.index} alone, but the layers of a PagedCache share their pages. "
            f"Call it on the cache, if it has it."
        )


class PagedCache(Cache):
    """A Transformers cache whose keys and values live in fixed-size pages of one pool.

    Pass it to `model.generate(past_key_values=...)` or to a forward pass. With `attn_implementation="paged_flex"`
    attention reads the pages in place; with `"sdpa"` or `"eager"` it is handed a copy. Padding is never stored.

    Args:
        config: the model's configuration.
        num_pages: at most so many pages, reserved at once. None: the pool grows by doubling.
        page_size: tokens per page: 16, 32, 64 or 128.
        pool: hold pages of this pool, which other caches may share, instead of one of its own.

    Raises:
        ValueError: for arguments that exclude each other, a page size that the kernel can't take, or a model whose
            layers keep another state than keys and values.

    Source:
        PagedAttention: Kwon et al., 2023. With FlexAttention: Joshi et al., 2025.
    """

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        num_pages: int | None = None,
        page_size: int | None = None,
        *,
        pool: PagePool | None = None,
    ) -> None:
        if (config is None) == (pool is None):
            raise ValueError("PagedCache needs either a model's config or a pool, not both and not neither.")
        if pool is None:
            assert config is not None
            pool = PagePool(config, num_pages, 128 if page_size is None else page_size)
        elif num_pages is not None or page_size is not None:
            raise ValueError(
                f"num_pages={num_pages} and page_size={page_size} were asked for beside a pool, which has "
                f"{pool.num_pages} pages of {pool.page_size} tokens. Give them to PagePool instead."
            )
        self.pool = pool
        self.table = PageTable(pool)
        self.tiling = Tiling(self.table)
        self._columns = Columns()
        self._step: Step | None = None
        super().__init__(
            layers=[
                PagedLayer(self, index, spec) if spec.stores else DummyLayer()  # type: ignore[no-untyped-call]
                for index, spec in enumerate(pool.layers)
            ]
        )
        self._paged_layers = [layer for layer in self.layers if isinstance(layer, PagedLayer)]

    @classmethod
    def from_model(cls, model: PreTrainedModel, num_pages: int | None = None, page_size: int = 128) -> "PagedCache":
        """Make a cache for a model.

        Args:
            model: a decoder.
            num_pages: as for the class.
            page_size: as for the class.

        Raises:
            ValueError: if the model can't run the attention that it is set to.
        """
        config = model.config.get_text_config(decoder=True)
        if config._attn_implementation == NAME and not model._supports_attention_backend:
            raise ValueError(
                f"{type(model).__name__} is set to attn_implementation={NAME!r}, but it computes attention by itself "
                "instead of through Transformers' attention interface. Load it with "
                'attn_implementation="eager" or "sdpa"; PagedCache works with both.'
            )
        return cls(config, num_pages, page_size)

    def __repr__(self) -> str:
        lengths = ", ".join(map(str, self.table.lengths))
        return (
            f"{type(self).__name__}({len(self)} layers, page_size={self.pool.page_size}, "
            f"num_pages={self.pool.num_pages}, lengths=[{lengths}])"
        )

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, None]]:
        """Give keys and values of each layer, padded copies, as DynamicCache does."""
        for layer in self.layers:
            yield (layer.keys, layer.values, None) if isinstance(layer, PagedLayer) else (None, None, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PagedCache":
        return self.fork()

    def __copy__(self) -> "PagedCache":
        return self.fork()

    # Planning and lengths

    def plan(self, num_rows: int, num_new: int, attention_mask: Tensor | None) -> Step:
        """Plan a forward pass: check it, reserve its pages, and say which slots its tokens go to.

        The plan becomes part of the cache when every layer was written. If the pass fails before, the next one starts
        from what there was.

        Args:
            num_rows: rows of the batch.
            num_new: new columns.
            attention_mask: `(num_rows, num_columns)`, 0 for padding; None without padding.

        Raises:
            OutOfPagesError: if the pool has too few pages; nothing has changed.
            ValueError: if rows or mask don't fit what is cached; nothing has changed.
        """
        self._settle()
        if num_new < 1:
            raise ValueError(f"A forward pass needs at least one new token, but was given {num_new}.")
        is_empty = self._columns.count == 0
        if not is_empty and num_rows != self.table.num_rows:
            raise ValueError(
                f"This cache holds {self.table.num_rows} rows, but a batch of {num_rows} was given. Use a new "
                "PagedCache, reset() this one, or batch_repeat_interleave() or batch_select_indices() its rows."
            )
        mask = None if attention_mask is None else attention_mask.bool().cpu().numpy()
        new, past_is_visible = self._columns.split(mask, num_rows, num_new)
        if self._step is not None:
            if self._step.matches(num_rows, num_new, new):
                return self._step
            self._abandon()
        if is_empty:
            self.table.open_rows(num_rows)
        counts = np.full(num_rows, num_new, dtype=np.int64) if new is None else new.sum(axis=1, dtype=np.int64)
        try:
            self.table.reserve(counts)
        except Exception:
            if is_empty:
                self.table.clear()
            raise
        self._step = Step(self.table, self._columns, num_new, new, past_is_visible)
        for layer in self._paged_layers:
            layer.is_written = False
        return self._step

    def step_for(self, layer: PagedLayer, key_states: Tensor) -> Step:
        """Return the step that a layer's new keys belong to, planning one if the mask function did not."""
        self._settle()
        num_rows, _, num_new, _ = key_states.shape
        step = self._step
        if step is None:
            return self.plan(num_rows, num_new, None)
        if layer.is_written:
            missing = [other.index for other in self._paged_layers if not other.is_written]
            raise ValueError(
                f"Layer {layer.index} was updated twice in one forward pass, but layers {missing} not yet. Update "
                "every layer once per pass; after a pass that failed, call cache.crop(0) first."
            )
        if (num_rows, num_new) != (step.num_rows, step.num_new):
            raise ValueError(
                f"Layer {layer.index} was given {num_new} tokens in {num_rows} rows, but this forward pass was "
                f"planned for {step.num_new} tokens in {step.num_rows} rows."
            )
        return step

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns so far, padding included; what a batch without padding holds per row.

        Args:
            layer_idx: a layer that the forward pass under way has been through counts its new columns.
        """
        self._settle()
        count = self._columns.count
        if self._step is not None and getattr(self.layers[layer_idx], "is_written", False):
            count += self._step.num_new
        return count if torch.compiler.is_compiling() else PastLength(count)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Columns after `query_length` new ones, and 0, the first column that a layer holds."""
        self._settle()
        if self._step is not None and getattr(self.layers[layer_idx], "is_written", False):
            self._abandon()  # a new forward pass begins, so the one that wrote this layer did not get to its end
        return PlannedLength(self._columns.count + query_length, self), 0

    def _settle(self) -> None:
        """Make a step that went through all layers part of the cache."""
        step = self._step
        if step is not None and self._paged_layers[-1].is_written and all(x.is_written for x in self._paged_layers):
            self.table.commit(step.counts)
            self._columns = self._columns.extended(step.new, step.num_rows, step.num_new)
            self._step = None

    def _abandon(self) -> None:
        """Forget a step that did not go through all layers."""
        if self._step is not None:
            self._step.is_cancelled = True
            self._step = None
            self.table.rollback()
            if self._columns.count == 0:
                self.table.clear()

    def _rest(self) -> None:
        """Come to a state between two forward passes."""
        self._settle()
        self._abandon()

    # What Transformers may do to a cache

    @property
    def batch_size(self) -> int:
        """Rows; -1 as long as there are none."""
        return self.table.num_rows or -1

    @property
    def is_compileable(self) -> bool:
        """Whether `generate()` plans each step outside of the forward pass: with `paged_flex` it does."""
        return bool(self.pool.config._attn_implementation == NAME)

    @property
    def is_initialized(self) -> bool:
        """Whether the storage of every layer exists."""
        return all(layer.is_initialized for layer in self._paged_layers)

    def reset(self) -> None:
        """Release all pages; the cache is as new."""
        self._rest()
        self.table.clear()
        self._columns = Columns()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last columns.

        Args:
            tokens_to_remove: 0 or negative, minus the number of columns.

        Raises:
            ValueError: for a positive number, or one that is larger than what is cached; nothing has changed.
        """
        self._rest()
        count = self._columns.count + tokens_to_remove
        if tokens_to_remove > 0 or count < 0:
            raise ValueError(
                f"crop({tokens_to_remove}) was called on a cache of {self._columns.count} tokens. Give 0 or a "
                f"negative number, not below {-self._columns.count}: the number of tokens to remove."
            )
        if tokens_to_remove < 0:
            self.table.truncate(self.table.lengths - self._columns.num_tokens_after(count, self.table.num_rows))
            self._columns.truncate(count)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row `i` be what row `beam_idx[i]` was; no token is copied."""
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows that `indices` or a bool mask names."""
        indices = torch.as_tensor(indices)
        self._select((indices.nonzero().flatten() if indices.dtype == torch.bool else indices).tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times, sharing its pages."""
        self._rest()
        self._select(np.repeat(np.arange(self.table.num_rows), repeats).tolist())

    def activate_past_recording(self) -> None:
        """Nothing to do: what `crop` may want back is always there."""

    def fork(self) -> "PagedCache":
        """Return a cache of its own that holds the same tokens and shares every page until one of them writes."""
        self._rest()
        fork = PagedCache(pool=self.pool)
        fork.table = self.table.fork()
        fork.tiling = Tiling(fork.table)
        fork._columns = copy.copy(self._columns)
        return fork

    def _select(self, indices: list[int]) -> None:
        self._rest()
        num_rows = self.table.num_rows
        wrong = [index for index in indices if not -num_rows <= index < num_rows]
        if wrong:
            raise ValueError(f"Rows {wrong} were asked for, but this cache holds {num_rows} rows.")
        indices = [index % num_rows for index in indices]
        self.table.select(indices)
        self._columns.select(indices)

    # Looking in

    def gather(self, layer_idx: int) -> tuple[Tensor | None, Tensor | None]:
        """Copy a layer into the layout of DynamicCache; `(None, None)` when empty.

        Returns:
            Keys and values, each `(num_rows, num_kv_heads, num_columns, head_dim)`, 0 where there was padding.
        """
        self._settle()
        storage = self.pool.storage(layer_idx)
        if storage is None or self._columns.count == 0:
            return None, None
        return gather_columns(storage, self.table, self._columns)

    def stats(self) -> MemoryStats:
        """Account for the pages and bytes that this cache holds."""
        self._settle()
        return self.pool.account([self.table])

    def memory_map(self, width: int = 64) -> str:
        """Draw the pages of the pool, `width` to a line, and the pages of each row."""
        self._settle()
        return draw(self.pool, self.table, width)
