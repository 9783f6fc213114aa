"""The cache of a decoder that also attends to an encoder."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedConfig, PreTrainedModel

from hf_paged.cache.paged import PagedCache
from hf_paged.cache.prompt.checks import encoder_refused
from hf_paged.pages.pool import PagePool
from hf_paged.pages.stats import MemoryStats
from hf_paged.pages.views.memory_map import MemoryMap

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class PagedEncoderDecoderCache(EncoderDecoderCache):
    """A cache for an encoder-decoder: the decoder's own keys and values in pages, the encoder's beside them.

    `PagedCache.from_model(model)` makes it for every model with an encoder. It does what a `PagedCache` does, for both
    parts; pages, lengths and statistics are those of the decoder. What the decoder attends to of the encoder is
    written once and has one length for all rows, so it is kept as `DynamicCache` keeps it.

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
    cross_attention_cache: DynamicCache
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
        # Without a configuration, whose windows are over the decoder's tokens, not over the encoder's.
        super().__init__(decoder, DynamicCache())

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
        self.cross_attention_cache = DynamicCache()
        self.is_updated = {}
