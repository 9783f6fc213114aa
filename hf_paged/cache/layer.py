"""One layer of a cache over pages."""

from functools import cached_property
from typing import Any, Literal
from weakref import finalize

import torch
from torch import Tensor
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, CacheLayerMixin, LinearAttentionLayer

from hf_paged._torch.dynamo import autocast_dtype, outside_of_graphs
from hf_paged._torch.opaque import OPAQUE_INPUTS
from hf_paged._transformers import LayerSpec, expands_latents, has_latents, has_position_bias, num_unlisted_layers
from hf_paged.attention.marks import marked
from hf_paged.attention.mask import NAME, PastLength, PlannedLength
from hf_paged.batch.recurrent.layer_states import LayerStates
from hf_paged.batch.recurrent.states import State
from hf_paged.batch.sequences import Sequences
from hf_paged.batch.steps.padded import PaddedStep
from hf_paged.pages.storage import holds_pages


def layers_over(sequences: Sequences) -> list[Any]:
    """Make the layers of a cache, one for each layer of the model, over these rows."""
    config, specs = sequences.pool.config, sequences.pool.layers
    # Layers that store nothing read what others were handed; a newer configuration says which.
    modes = getattr(config, "kv_sharing_modes", None) or ["store"] * len(specs)
    # A position bias is made for as many columns as there are keys, which the storage of a layer has other numbers of.
    reads_shapes = has_position_bias(config)
    hands_on = num_unlisted_layers(config) or not all(spec.stores for spec in specs) or reads_shapes
    caches_latents = has_latents(config)
    is_shared = [mode == "store" and hands_on for mode in modes]
    return [
        _layer_class(spec, bool(shared), caches_latents)(sequences, index, spec)
        if spec.stores or spec.num_states
        else DYNAMIC_LAYER_TYPE_MAPPING[spec.kind]()
        for index, (spec, shared) in enumerate(zip(specs, is_shared, strict=True))
    ]


def _layer_class(spec: LayerSpec, is_shared: bool, caches_latents: bool) -> type[Any]:
    if spec.num_states:
        return HybridLayer if spec.stores else RecurrentLayer
    if is_shared:
        return HandingOnLayer
    return LatentLayer if caches_latents else PagedLayer


class _Owner:
    """Lives as long as one of the layers does that have it."""


def owned(layers: list[Any], sequences: Sequences) -> list[Any]:
    """Return the layers; once none of them is left, the rows give their pages back.

    Rows may live longer: torch.compile keeps the mask that a graph was captured with, and with it the rows.
    """
    owner = _Owner()
    for layer in layers:
        layer.owner = owner
    finalize(owner, _give_back, sequences).atexit = False
    return layers


def _give_back(sequences: Sequences) -> None:
    if not sequences.handed_on.is_held:  # else until that is freed, too
        sequences.rows.give_back()


class _Layer:
    """A layer of a `PagedCache`, of which rows and lengths are those of the cache.

    Args:
        sequences: the rows of the cache.
        index: which of its layers this is.
        spec: what the layer stores.
    """

    is_croppable = False  # not alone; the cache may be

    def __init__(self, sequences: Sequences, index: int, spec: LayerSpec) -> None:
        self._sequences = sequences
        self.index = index
        self.is_sliding = spec.window is not None
        self.number_of_states = spec.num_states

    @property
    def record_past(self) -> bool:
        """Whether what has left a window or a state is kept, so that `crop` can take back what came after."""
        return self._sequences.records_past

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self._sequences.records_past = value

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

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse, as `reorder_cache`."""
        self._refuse("crop")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refuse, as `reorder_cache`."""
        self._refuse("batch_repeat_interleave")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refuse, as `reorder_cache`."""
        self._refuse("batch_select_indices")

    def _refuse(self, method: str) -> None:
        raise ValueError(
            f"{method}() was called on layer {self.index} alone, but the layers of a PagedCache share their pages. "
            "Call it on the cache, if it has it."
        )


class PagedLayer(_Layer, CacheLayerMixin):  # type: ignore[no-untyped-call]
    """A layer whose keys and values are in pages."""

    is_compileable = True

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """Whether there are `keys` and `values`."""
        return self._sequences.pool.storage(self.index) is not None and self.get_seq_length() > 0

    @property
    def keys(self) -> Tensor | None:
        """The keys, `(num_rows, num_kv_heads, num_columns, head_dim)`, 0 where there was padding; None when empty.

        A padded copy, of the columns that the next query sees. What is changed in it, or in a view of it, goes into
        the pages before the next forward pass, `crop`, `reorder_cache`, `fork` or the like; pages that other caches or
        rows hold too are copied first. After that it is out of date, and its changes mean nothing, as with
        DynamicCache. Until then it is the same tensor at each reading and takes memory; `PagedCache.gather` returns
        copies that are kept by nobody. A change is noticed by torch's version of the tensor: what goes around it
        (`tensor.data`, `tensor.numpy()`) is not noticed, nor a change of an inference tensor that was assigned. Say it
        by `PagedCache.set`, or by assigning the tensor.

        Another tensor may be assigned. One with other rows or columns takes effect once keys and values of all layers
        have these, and all of its columns are tokens then; the attention mask of the next pass says which of them
        count.

        Raises:
            ValueError: for a tensor that can't be keys of this layer, for changes within a forward pass, or if they
                are read in one that has written them; nothing has changed.
                By the next use of the cache, if some layers were given other rows or columns than the others.
            OutOfPagesError: by the next use of the cache, if there are too few pages for what was changed. It is
                kept, and tried again at the use after that.
        """
        return self._sequences.edits.read(self._sequences, self.index)[0]

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._sequences.edits.assign(self._sequences, self.index, 0, keys)

    @property
    def values(self) -> Tensor | None:
        """The values, like `keys`."""
        return self._sequences.edits.read(self._sequences, self.index)[1]

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._sequences.edits.assign(self._sequences, self.index, 1, values)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the storage for keys and values like these, `(sequences, num_kv_heads, any, head_dim)`."""
        self._sequences.pool.open_storage(self.index, key_states, value_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new tokens into their slots.

        Args:
            key_states: `(num_rows, num_kv_heads, num_new, head_dim)`, rotary embedding applied.
            value_states: like `key_states`.
            *args: ignored.
            **kwargs: ignored.

        Returns:
            Keys and values for the attention function: the storage of the layer where the step was reserved by
            `paged_flex`, otherwise `(num_rows, num_kv_heads, num_columns, head_dim)`, from the first column that a
            query sees.

        Raises:
            OutOfPagesError: if the tokens don't fit; nothing is written.
            ValueError: if shapes, dtype or device don't fit, or gradients are wanted; nothing is written.
        """
        if key_states.requires_grad or value_states.requires_grad:
            if torch.is_grad_enabled():
                raise ValueError(
                    "Keys that require gradients were given to a PagedCache, which writes in place and can't be "
                    "differentiated. Run the model under torch.no_grad() or torch.inference_mode()."
                )
            key_states, value_states = key_states.detach(), value_states.detach()
        if key_states.dtype is not value_states.dtype:
            dtype = autocast_dtype(key_states)
            if dtype is not None:
                key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        if not torch.compiler.is_dynamo_compiling():
            return self._sequences.write(self.index, key_states, value_states)
        if _HAS_OPERATIONS and self._sequences.is_written_by_attention:
            return marked(key_states, self.index, True), marked(value_states, self.index, False)
        return _write(self._sequences, self.index, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that the next `query_length` queries see together, and the first of them."""
        if torch.compiler.is_dynamo_compiling():
            return self._mask_sizes_between_graphs(query_length)
        self._sequences.begin_pass(self.index, query_length)
        rows = self._sequences.rows
        first = rows.first_column(self.index)
        length = PlannedLength(rows.columns.count - first + query_length, self._sequences)
        # That one's mask function is compiled, and dynamo fails at an `int` that is more than an `int`.
        return (int(length) if self._sequences.pool.config._attn_implementation == "flex_attention" else length), first

    @outside_of_graphs
    def _mask_sizes_between_graphs(self, query_length: int) -> tuple[int, int]:
        length, first = self.get_mask_sizes(query_length)
        # Transformers' own mask functions are traced, and dynamo fails at an `int` that is more than an `int`.
        return (length if self._sequences.pool.config._attn_implementation == NAME else int(length)), first

    def get_seq_length(self) -> int:
        """Columns before the forward pass under way, padding included."""
        if torch.compiler.is_dynamo_compiling():
            sequences = self._sequences
            # Only states show that the pass before is over, and no graph looks at them.
            return _count(sequences, self.index) if sequences.pool.has_states else sequences.rows.columns.count
        return PastLength(self._sequences.edits.count(self._sequences, self.index))

    def get_max_length(self) -> int:
        """Tokens that fit into the pool; -1 without a bound."""
        pool = self._sequences.pool
        return -1 if pool.max_pages is None or self.is_sliding else pool.max_pages * pool.page_size


class HandingOnLayer(PagedLayer):  # type: ignore[no-untyped-call]
    """A layer of a model that may hand on what `update` returned to other layers, and to its caller."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new tokens into their slots; as `PagedLayer.update`, but pages are for attention only."""
        step = self._sequences.step
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if torch.compiler.is_dynamo_compiling() or not isinstance(step, PaddedStep) or not holds_pages(keys):
            return keys, values
        pool = self._sequences.pool
        storage = pool.storage(self.index)
        assert storage is not None
        table = step.placements[pool.group_of_layer[self.index]].table
        return self._sequences.handed_on.hand_out(step, table, storage, (keys, values))


class LatentLayer(PagedLayer):  # type: ignore[no-untyped-call]
    """A layer of a model that makes keys and values of whatever latents `update` returns."""

    @cached_property
    def _are_expanded_by_attention(self) -> bool:
        return expands_latents(self._sequences.pool.config)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new latents into their slots; as `PagedLayer.update`, but pages are left to attention.

        It needs none of those before from the model, which so makes keys and values of the new ones only.
        """
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if holds_pages(keys) and self._are_expanded_by_attention:
            return key_states, value_states
        return keys, values


class RecurrentLayer(_Layer, LinearAttentionLayer):
    """A layer that keeps a state of each row; how it changes is up to Transformers' layer."""

    device: Any = None
    dtype: Any = None

    @property
    def _states(self) -> LayerStates:
        return self._sequences.rows.states[self.index]

    @property
    def _is_in_graph(self) -> bool:
        return torch.compiler.is_dynamo_compiling() and self._sequences.rows.states.is_prepared

    @property
    def _states_to_change(self) -> LayerStates:
        return self._sequences.rows.states.in_graph(self.index) if self._is_in_graph else self._states

    @property
    def conv_states(self) -> dict[int, Tensor | None]:  # type: ignore[override]
        """The last inputs of each convolution, `(num_rows, ..., num_columns)`; None before the first."""
        return self._states_to_change.conv_states

    @property
    def recurrent_states(self) -> dict[int, Tensor | None]:  # type: ignore[override]
        """What each recurrence has come to, `(num_rows, ...)`; None before the first."""
        return self._states_to_change.recurrent_states

    @property
    def is_conv_states_initialized(self) -> dict[int, bool]:  # type: ignore[override]
        """Whether there is one."""
        return self._states.is_conv_states_initialized

    @property
    def is_recurrent_states_initialized(self) -> dict[int, bool]:  # type: ignore[override]
        """Whether there is one."""
        return self._states.is_recurrent_states_initialized

    @property
    def has_previous_state(self) -> dict[int, bool]:  # type: ignore[override]
        """Whether it has seen tokens."""
        return self._states.has_previous_state

    @property
    def conv_kernel_size(self) -> dict[int, int | None]:  # type: ignore[override]
        """Columns that each convolution needs."""
        return self._states.conv_kernel_size

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Make the tensors of a state."""
        LinearAttentionLayer.lazy_initialization(self, *args, **kwargs)
        # Transformers marks them as being at the only address that graphs are to know.
        for states in (self.conv_states, self.recurrent_states):
            states.update((index, None if state is None else state.detach()) for index, state in states.items())

    def update_conv_state(  # type: ignore[override]
        self, conv_states: Tensor, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """Take new inputs of a convolution; returns them behind those before, as Transformers' layer does."""
        self._open("conv", state_idx, updates=True)
        full: Tensor = super().update_conv_state(conv_states, state_idx, **kwargs)
        return full

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Take what a recurrence has come to, as Transformers' layer does."""
        self._open("recurrent", state_idx, updates=True)
        state: Tensor = super().update_recurrent_state(recurrent_states, state_idx, **kwargs)
        return state

    def hand_out(self, kind: Literal["conv", "recurrent"], state_idx: int) -> None:
        """Note that the model asks for a state, which it may change in place."""
        self._open(kind, state_idx, updates=False)

    def _open(self, kind: Literal["conv", "recurrent"], state_idx: int, *, updates: bool) -> None:
        if not self._is_in_graph:
            _open(self._sequences, State(self.index, kind, state_idx), updates=updates)


class HybridLayer(PagedLayer, RecurrentLayer):  # type: ignore[no-untyped-call]
    """A layer that attends, and keeps a state as well."""

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Make the storage of keys and values, which are given by place, or of a state, which is given by name."""
        (PagedLayer if args else RecurrentLayer).lazy_initialization(self, *args, **kwargs)

    def get_max_length(self) -> int:
        """Tokens that fit into the pool; -1 without a bound."""
        return PagedLayer.get_max_length(self)


_open = outside_of_graphs(Sequences.open_state)
_HAS_OPERATIONS = OPAQUE_INPUTS.is_on  # a constant in graphs
_write = outside_of_graphs(Sequences.write)


@outside_of_graphs
def _count(sequences: Sequences, layer: int) -> int:
    return sequences.edits.count(sequences, layer)
