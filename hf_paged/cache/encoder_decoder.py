"""The cache of a decoder that also attends to an encoder."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from hf_paged.batch.handed_on import RepeatedRows
from hf_paged.cache.paged import PagedCache
from hf_paged.cache.prompt.checks import encoder_refused
from hf_paged.pages.pool import PagePool
from hf_paged.pages.stats import MemoryStats
from hf_paged.pages.views.memory_map import MemoryMap

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class EncoderLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """What one layer attends to of an encoder: of rows that are alike, as beams and samples are, it holds one."""

    _held: tuple[Tensor | None, Tensor | None] = (None, None)
    _repeated: RepeatedRows | None = None

    @property
    def keys(self) -> Tensor | None:
        """The keys, `(num_rows, num_heads, num_columns, head_dim)`; None when empty. See `PagedLayer.keys`."""
        return self._read(0)

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._hold((keys, self._by_row()[1]))

    @property
    def values(self) -> Tensor | None:
        """The values, like `keys`."""
        return self._read(1)

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._hold((self._by_row()[0], values))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take keys and values, once; arguments and result are those of `PagedLayer.update`."""
        if self.is_initialized or torch.compiler.is_dynamo_compiling():
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            return keys, values
        self.lazy_initialization(key_states, value_states)
        alike = [(states[1:] == states[:-1]).flatten(1).all(1) for states in (key_states, value_states)]
        is_new = torch.nn.functional.pad(~(alike[0] & alike[1]), (1, 0), value=True).cpu()
        self._hold_some(key_states, value_states, is_new.nonzero()[:, 0], is_new.long().cumsum(0) - 1)
        return key_states, value_states

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row `i` be what row `beam_idx[i]` was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self.batch_select_indices(torch.arange(self._num_rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows; a bool mask or indices."""
        if self.get_seq_length() == 0:
            return
        repeated = self._noted()
        rows = torch.arange(self._num_rows)[indices.cpu()]
        if repeated is not None:
            rows = repeated.rows[rows]
            if torch.equal(rows, repeated.rows):
                return
        sources, rows = torch.unique(rows, return_inverse=True)
        if len(sources) == len(rows):
            sources, rows = sources[rows], torch.arange(len(rows))
        keys, values = self._held
        assert keys is not None
        assert values is not None
        if torch.equal(sources, torch.arange(len(keys))):
            self._repeated = _repeated((keys, values), rows)
        else:
            self._hold_some(keys, values, sources, rows)

    def get_seq_length(self) -> int:
        """Columns of the encoder's output."""
        keys = self._held[0]
        return 0 if keys is None or keys.ndim < 2 else keys.shape[-2]

    @property
    def num_bytes(self) -> int:
        """Bytes of what is held."""
        return sum(tensor.nbytes for tensor in self._held if tensor is not None)

    @property
    def _num_rows(self) -> int:
        keys, repeated = self._held[0], self._noted()
        return len(repeated.rows) if repeated is not None else 0 if keys is None else len(keys)

    def _noted(self) -> RepeatedRows | None:
        """What is repeated, with what others have made of a copy of it."""
        if self._repeated is not None and self._repeated.are_changed:
            self._hold(self._repeated.copies())
        return self._repeated

    def _hold(self, held: tuple[Tensor | None, Tensor | None]) -> None:
        self._held, self._repeated = held, None

    def _hold_some(self, keys: Tensor, values: Tensor, sources: Tensor, rows: Tensor) -> None:
        """Hold copies of some rows, `sources`, and repeat them: row `i` is number `rows[i]` of them."""
        index = sources.to(keys.device)
        held = keys.index_select(0, index), values.index_select(0, index)
        self._held, self._repeated = held, _repeated(held, rows)

    def _by_row(self) -> tuple[Tensor | None, Tensor | None]:
        repeated = self._noted()
        return self._held if repeated is None else repeated.copies()

    def _read(self, which: int) -> Tensor | None:
        if torch.compiler.is_dynamo_compiling():
            held, repeated = self._held[which], self._repeated
            if held is None or repeated is None:
                return held
            if len(held) == 1:
                return held.expand(len(repeated.rows), -1, -1, -1)
            return held.index_select(0, repeated.index)
        repeated = self._noted()
        return self._held[which] if repeated is None else repeated.tensors()[which]


def _repeated(held: tuple[Tensor, Tensor], rows: Tensor) -> RepeatedRows | None:
    return RepeatedRows(held, rows) if len(held[0]) < len(rows) else None


class EncoderCache(DynamicCache):
    """What the layers attend to of an encoder.

    Args:
        config: not looked at: its windows are over the decoder's tokens. T5Gemma passes one.
        **options: of `DynamicCache`.
    """

    def __init__(self, config: PreTrainedConfig | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.layer_class_to_replicate = EncoderLayer


class PagedEncoderDecoderCache(EncoderDecoderCache):
    """A cache for an encoder-decoder: the decoder's own keys and values in pages, the encoder's beside them.

    `PagedCache.from_model(model)` makes it for every model with an encoder. It does what a `PagedCache` does, for both
    parts; pages, lengths and statistics are those of the decoder. What the decoder attends to of the encoder is
    written once and has one length for all rows, so it is contiguous; beams and samples of an input share it.

    Args:
        config: the model's configuration.
        num_pages: as for `PagedCache`.
        page_size: as for `PagedCache`.
        pool: as for `PagedCache`.

    Attributes:
        self_attention_cache: keys and values of the decoder's own tokens, in pages.
        cross_attention_cache: keys and values of the encoder's output.

    Raises:
        ValueError: as for `PagedCache`.
    """

    self_attention_cache: PagedCache  # type: ignore[assignment]  # Transformers has no annotation, so a narrow one
    cross_attention_cache: EncoderCache
    is_updated: dict[int, bool]

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        num_pages: int | None = None,
        page_size: int | None = None,
        *,
        pool: PagePool | None = None,
    ) -> None:
        decoder = PagedCache._of_decoder(config, num_pages, page_size, pool)
        super().__init__(decoder, EncoderCache())

    def __copy__(self) -> "PagedEncoderDecoderCache":
        return self.fork()

    def __deepcopy__(self, memo: dict[int, Any]) -> "PagedEncoderDecoderCache":
        return self.fork()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: only its two parts have layers."""
        raise ValueError(
            f"Keys of layer {layer_idx} were given to a {type(self).__name__} instead of one of its two parts. Pass "
            "the cache to a model with an encoder, as it is: it needs no EncoderDecoderCache around it."
        )

    @property
    def _is_user_defined(self) -> bool:
        return self.self_attention_cache._is_user_defined

    @_is_user_defined.setter
    def _is_user_defined(self, value: bool) -> None:
        self.self_attention_cache._is_user_defined = value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the decoder before the forward pass under way, padding included."""
        length = self.self_attention_cache.get_seq_length(layer_idx)
        # A pass begins with the first layer; T5 asks again in each.
        if length == 0 and layer_idx == 0 and any(self.is_updated.values()):
            self._forget_encoder()  # the first pass failed half-way or was taken back: the next may have another input
        return length

    # The decoder's part

    @property
    def pool(self) -> PagePool:
        """Where the pages of the decoder are."""
        return self.self_attention_cache.pool

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row of the decoder, padding excluded."""
        return self.self_attention_cache.lengths

    @property
    def batch_size(self) -> int:
        """Rows; -1 as long as there are none."""
        return self.self_attention_cache.batch_size

    @property
    def is_initialized(self) -> bool:
        """Whether the storage of every layer of the decoder exists."""
        return self.self_attention_cache.is_initialized

    def is_recording_past(self, layer_idx: int) -> bool:
        """Whether tokens that have left a window are kept until the next `crop`."""
        return self.self_attention_cache.is_recording_past(layer_idx)

    def stats(self) -> MemoryStats:
        """Account for the pages and bytes of the decoder; what is kept of the encoder is not counted."""
        return self.self_attention_cache.stats()

    def memory_map(self, width: int = 64) -> MemoryMap:
        """Draw the decoder's pages; see `PagedCache.memory_map`."""
        return self.self_attention_cache.memory_map(width)

    def plot(self) -> "Figure":
        """Draw the decoder's pages with matplotlib; see `PagedCache.plot`."""
        return self.self_attention_cache.plot()

    def gather(self, layer_idx: int) -> tuple[Tensor | None, Tensor | None]:
        """Copy the decoder's keys and values of a layer; see `PagedCache.gather`."""
        return self.self_attention_cache.gather(layer_idx)

    def release(self, rows: Sequence[int] | Tensor) -> None:
        """Give back the pages of rows that are finished; see `PagedCache.release`."""
        self.self_attention_cache.release(rows)

    def swap_out(self) -> None:
        """Move the content of the decoder's pages to the host; see `PagedCache.swap_out`. The encoder's part stays."""
        self.self_attention_cache.swap_out()

    def swap_in(self) -> None:
        """Bring back what was swapped out; see `PagedCache.swap_in`."""
        self.self_attention_cache.swap_in()

    def set_idle(self) -> None:
        """Let the pool swap the decoder's part out; see `PagedCache.set_idle`."""
        self.self_attention_cache.set_idle()

    def prefill(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: `generate()` computes the encoder's part of a prompt."""
        raise encoder_refused(model)

    def set(self, layer_idx: int, keys: Tensor, values: Tensor) -> None:
        """Put other keys and values into a layer of the decoder; see `PagedCache.set`."""
        self.self_attention_cache.set(layer_idx, keys, values)

    # Both parts

    def roll_back(self) -> None:
        """Forget a forward pass that failed in mid-way; see `PagedCache.roll_back`."""
        self.self_attention_cache.roll_back()

    def reset(self) -> None:
        """Release all pages, and forget the encoder; the cache is as new."""
        self.self_attention_cache.reset()
        self._forget_encoder()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the decoder's last columns; see `PagedCache.crop`. What is kept of the encoder stays.

        Raises:
            ValueError: if they can't be taken back; nothing has changed.
        """
        self.self_attention_cache.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row `i` be what row `beam_idx[i]` was; see `PagedCache.reorder_cache`."""
        rows: Any = beam_idx.cpu()  # once for all layers
        self.self_attention_cache.reorder_cache(rows)
        self.cross_attention_cache.reorder_cache(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row; the copies of a row follow one another."""
        self.self_attention_cache.batch_repeat_interleave(repeats)
        self.cross_attention_cache.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows; see `PagedCache.batch_select_indices`.

        Raises:
            ValueError: if a row does not exist, or the mask has another length; nothing has changed.
        """
        self.self_attention_cache.batch_select_indices(indices)
        self.cross_attention_cache.batch_select_indices(indices)

    def fork(self) -> "PagedEncoderDecoderCache":
        """Return a cache of its own that holds the same; pages are shared until written, the encoder's part copied."""
        fork = PagedEncoderDecoderCache(pool=self.pool)
        fork.self_attention_cache = self.self_attention_cache.fork()
        fork.cross_attention_cache = copy.deepcopy(self.cross_attention_cache)
        fork.is_updated = dict(self.is_updated)
        return fork

    def _forget_encoder(self) -> None:
        self.cross_attention_cache = EncoderCache()
        self.is_updated = {}
