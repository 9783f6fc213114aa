"""The Transformers Cache API over pages."""

from collections.abc import Iterator
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self
from weakref import ref

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_paged._transformers import compile_obstacle, model_in, num_attention_layers, obstacle
from hf_paged.attention.mask import NAME
from hf_paged.batch.sequences import Sequences
from hf_paged.cache.contents import Contents
from hf_paged.cache.layer import PagedLayer, RecurrentLayer, layers_over, owned
from hf_paged.cache.prompt.known_prefix import goes_on_alike
from hf_paged.cache.prompt.prompted import Prompted
from hf_paged.cache.prompt.resume import note_generating
from hf_paged.cache.saved import load, save
from hf_paged.pages.pool import PagePool, pool_for

if TYPE_CHECKING:
    from hf_paged.cache.encoder_decoder import PagedEncoderDecoderCache


class PagedCache(Prompted, Contents):
    """A Transformers cache whose keys and values live in fixed-size pages of one pool.

    Pass it to `model.generate(past_key_values=...)` or to a forward pass. With `attn_implementation="paged_flex"`
    attention reads the pages in place; with `"sdpa"` or `"eager"` it is handed a copy. Padding is never stored.

    A context: it is reset at the end.

    Args:
        config: the model's configuration.
        num_pages: at most so many pages, reserved at once. None: the pool grows as needed.
        page_size: tokens per page: 16, 32, 64, 128 or 256.
        pool: hold pages of this pool, which other caches may share, instead of one of its own.
        salt: keeps apart, in a pool with a prefix cache, what caches with another salt have computed: neither finds a
            page of the other, nor can tell by the time it takes whether there is one.

    Attributes:
        pool: where its pages are.

    Raises:
        ValueError: for arguments that exclude each other, a page size that the kernel can't take, or a model whose
            layers keep no keys and values.

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
        salt: str | None = None,
    ) -> None:
        self._hold(pool_for(config, num_pages, page_size, pool))
        if salt is not None and self.pool.prefix_index is None:
            raise ValueError(
                f"salt={salt!r} was given, but the pool has no prefix cache that it could divide. Make the pool by "
                "PagePool.from_model(model, num_pages=..., prefix_cache=True), or leave out the salt."
            )
        self._sequences.salt = salt
        if self.pool.has_encoder:
            raise ValueError(
                "PagedCache holds the keys and values of a decoder's own tokens, but this "
                f"{self.pool.config.model_type!r} model has an encoder, too, whose keys and values need a cache "
                "beside it. Use PagedCache.from_model(model), or PagedEncoderDecoderCache, which has both."
            )

    def _hold(self, pool: PagePool) -> None:
        self.pool = pool
        self._sequences = Sequences(pool)
        self._can_be_compiled = compile_obstacle(pool.config) is None
        self._was_given = False
        self._model: ref[PreTrainedModel] | None = None  # that computes it, as far as is known
        super().__init__(layers=owned(layers_over(self._sequences), self._sequences))

    @classmethod
    def _of_decoder(
        cls, config: PreTrainedConfig | None, num_pages: int | None, page_size: int | None, pool: PagePool | None
    ) -> "PagedCache":
        """Make a cache that is going to be one part of a cache for an encoder-decoder."""
        cache = cls.__new__(cls)
        cache._hold(pool_for(config, num_pages, page_size, pool))
        return cache

    @classmethod
    def from_model(
        cls, model: PreTrainedModel, num_pages: int | None = None, page_size: int = 128
    ) -> "PagedCache | PagedEncoderDecoderCache":
        """Make a cache for a model.

        Args:
            model: a decoder, or a model that has one; wrapped by DistributedDataParallel or the like, or not.
            num_pages: at most so many pages, reserved at once. None: the pool grows as needed.
            page_size: tokens per page, one of those that the class takes.

        Returns:
            A `PagedCache`; for a model with an encoder a `PagedEncoderDecoderCache`, which has one.

        Raises:
            ValueError: if the model can't run the attention that it is set to.
        """
        # Made of this class's module, and so imported after it.
        from hf_paged.cache.encoder_decoder import PagedEncoderDecoderCache

        model = model_in(model, "PagedCache.from_model()")
        config = model.config
        reason = config.get_text_config(decoder=True)._attn_implementation == NAME and obstacle(model)
        if reason:
            raise ValueError(
                f"{type(model).__name__} is set to attn_implementation={NAME!r}, but {reason}. Load it with "
                'attn_implementation="eager" or "sdpa"; PagedCache works with both.'
            )
        cache = (PagedEncoderDecoderCache if config.is_encoder_decoder else cls)(config, num_pages, page_size)
        decoder = cache if isinstance(cache, PagedCache) else cache.self_attention_cache
        decoder._sequences.progress.num_layers = num_attention_layers(model, len(decoder.layers))
        decoder._model = ref(model)
        decoder._sequences.rows.known_ids.offsets.watch(model)
        return cache

    def __repr__(self) -> str:
        lengths = ", ".join(map(str, self.lengths))
        return (
            f"{type(self).__name__}({len(self)} layers, page_size={self.pool.page_size}, "
            f"num_pages={self.pool.num_pages}, lengths=[{lengths}])"
        )

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """Give keys, values and window of each layer, as DynamicCache does; changes count, see `PagedLayer.keys`."""
        for spec, layer in zip(self.pool.layers, self.layers, strict=False):
            if isinstance(layer, PagedLayer):
                yield layer.keys, layer.values, None if spec.window is None else torch.tensor(spec.window)
            else:
                yield None, None, None

    def __deepcopy__(self, memo: dict[int, Any]) -> "PagedCache":
        return self.fork()

    def __copy__(self) -> "PagedCache":
        return self.fork()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "A PagedCache can't be pickled: its pages belong to a pool of this process, which other caches may share. "
            "Write it to a file by cache.save(path), and read that by PagedCache.load(path, model)."
        )

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, padding excluded."""
        lengths: list[int] = self._sequences.lengths.tolist()
        return lengths

    @property
    def batch_size(self) -> int:
        """Rows; -1 as long as there are none."""
        return len(self.lengths) or -1

    @property
    def is_compileable(self) -> bool:
        """Whether `generate()` prepares each step outside of the forward pass: with `paged_flex` it does.

        Not for models whose steps can't be compiled, as it would compile them on a GPU, nor while recurrent layers
        record their past, which grows from step to step.
        """
        grows = self.pool.has_states and self._sequences.records_past
        return self._can_be_compiled and not grows and bool(self.pool.config._attn_implementation == NAME)

    @property
    def is_linear(self) -> list[bool]:
        """Of each layer, whether it keeps a state and no keys."""
        return [spec.num_states > 0 and not spec.stores for spec in self.pool.layers]

    @property
    def is_initialized(self) -> bool:
        """Whether the storage of every layer exists."""
        return all(self.pool.storage(layer) is not None for layer in self.pool.group_of_layer)

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` puts the whole cache back as it was, though no layer alone can be cropped.

        With recurrent layers only where these do no more than convolve, and record their past.
        """
        return not self.pool.has_states or (self._sequences.records_past and self._sequences.rows.states.only_convolve)

    @property
    def _is_user_defined(self) -> bool:
        return self._was_given

    @_is_user_defined.setter
    def _is_user_defined(self, value: bool) -> None:
        # `generate()` sets this on a cache that it was given, once, before it computes anything.
        self._sequences.end_step()
        rows = self._sequences.rows
        generating = rows.known_ids.check(rows.columns)
        if generating is not None:
            self._model = ref(generating[0])
            note_generating(self._sequences, *generating)
            if rows.origin is not None and not goes_on_alike(self._sequences, *generating):
                rows.origin = None
        self._was_given = value

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.reset()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new tokens of a layer; called by its attention.

        Args:
            key_states: `(num_rows, num_kv_heads, num_new, head_dim)`, rotary embedding applied.
            value_states: like `key_states`.
            layer_idx: index of the layer.
            *args: ignored.
            **kwargs: ignored.

        Returns:
            Keys and values for the attention function.

        Raises:
            OutOfPagesError: if the tokens don't fit into the pool; nothing has changed.
            ValueError: if they don't fit what is cached; nothing has changed.
        """
        if layer_idx >= len(self.layers):
            self._sequences.take_back(key_states.shape[2])
            raise ValueError(
                f"Layer {layer_idx} was given to a PagedCache that was made for a model of {len(self.layers)} layers. "
                "Make a PagedCache for this model."
            )
        layer: Any = self.layers[layer_idx]
        keys, values = layer.update(key_states, value_states, *args, **kwargs)
        return keys, values

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return a state that a recurrent layer may change in place, until its pass is over; called by the layer."""
        self._hand_out(layer_idx, "conv", state_idx)
        state: Tensor | None = super().get_conv_state(layer_idx, state_idx)
        return state

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return a state, as `get_conv_state`."""
        self._hand_out(layer_idx, "recurrent", state_idx)
        state: Tensor | None = super().get_recurrent_state(layer_idx, state_idx)
        return state

    def _hand_out(self, layer_idx: int, kind: Literal["conv", "recurrent"], state_idx: int) -> None:
        layer = self.layers[layer_idx]
        if isinstance(layer, RecurrentLayer):
            layer.hand_out(kind, state_idx)

    def fork(self) -> "PagedCache":
        """Return a cache of its own that holds the same tokens and shares every page until one of them writes.

        States of recurrent layers are shared, too, until one of them goes on.
        """
        fork = PagedCache._of_decoder(None, None, None, self.pool)
        fork._sequences.become_fork_of(self._sequences)
        fork._model = self._model
        return fork

    # Files

    def save(self, path: str | PathLike[str], model: PreTrainedModel | None = None) -> None:
        """Write all rows to a file, in place of one that may be there, which stays until this is done.

        It has the tokens of each row without padding, those of shared pages once, and the ids, if they are known.

        Args:
            path: of the file, a safetensors file.
            model: that has computed the rows, as it is now. None: the one that the cache was made for, prefilled by or
                given to last.

        Raises:
            OSError: if it can't be written.
            ValueError: if the model isn't known, isn't all in memory or keeps positions of images to itself, or if
                the cache is that of an encoder-decoder.
        """
        save(self._sequences, path, model if model is not None or self._model is None else self._model())

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        model: PreTrainedModel,
        num_pages: int | None = None,
        page_size: int | None = None,
        *,
        pool: PagePool | None = None,
        salt: str | None = None,
    ) -> "PagedCache":
        """Make a cache of a file that `save` has written, in this process or another.

        Args:
            path: of the file.
            model: that goes on: with weights, configuration, settings and adapters of the one that it was saved for.
            num_pages: as for the class.
            page_size: as for the class; may be another than that of the cache that was saved.
            pool: as for the class.
            salt: as for the class.

        Raises:
            FileNotFoundError: if there is no such file.
            OutOfPagesError: if it doesn't fit into the pool; nothing has changed.
            ValueError: if the file is damaged, is none that `save` has written, or is of another model; or as for the
                class. Nothing has changed.
        """
        cache = cls(model.config if pool is None else None, num_pages, page_size, pool=pool, salt=salt)
        load(cache._sequences, path, model)
        cache._model = ref(model)
        return cache
