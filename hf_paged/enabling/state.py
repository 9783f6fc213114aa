"""What an enabled model generates with."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria

from hf_paged._torch.inductor import hindrance
from hf_paged._transformers import (
    CACHE,
    arguments_of_generate,
    cache_in,
    compile_obstacle,
    is_synced,
    recurrent_layer,
)
from hf_paged.cache.encoder_decoder import PagedEncoderDecoderCache
from hf_paged.cache.paged import PagedCache
from hf_paged.cache.prompt.fingerprint import fingerprint
from hf_paged.compile.api import compiled
from hf_paged.decoding.passes import shows_passes
from hf_paged.decoding.sample import sample
from hf_paged.decoding.stopping import ReleaseFinished
from hf_paged.pages.pool import PagePool, usual_page_size

_COMPILE_SECONDS = 30.0
"""What compiling takes about on a CPU. Whoever has decoded as long uncompiled will have lost at most as much again."""


class State:
    """What an enabled model generates with, and what the last `generate()` made of it.

    Args:
        attention_before: that of the model and of its parts, before it was enabled.
        compile: whether steps are compiled; `"auto"` where that pays.
        prefix_cache: whether prompts find what was computed of earlier ones.
        pool: for the caches; None: one is made for the first of them.
        page_size: of that pool; None: 32 tokens on a CPU, 128 elsewhere.
        memory_fraction: of the free memory, that the pool may take; None: it grows as needed.
    """

    def __init__(
        self,
        attention_before: dict[str, str],
        compile: bool | str,
        prefix_cache: bool,
        pool: PagePool | None,
        page_size: int | None,
        memory_fraction: float | None,
    ) -> None:
        self.notes: dict[str, str] = {}
        """Of the last `generate()`, for `explain`."""
        self.attention_before = attention_before
        self.pool = pool
        self._compile = compile
        self._prefix_cache = prefix_cache
        self._page_size = page_size
        self._memory_fraction = memory_fraction
        self._decoded_seconds = 0.0
        self._lock = threading.Lock()
        self._own: WeakSet[Any] = WeakSet()  # caches that nobody else has
        self._makers: WeakKeyDictionary[Any, bytes] = WeakKeyDictionary()  # what has computed those of others

    def give_cache(self, model: PreTrainedModel, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
        """Let `generate()` take a paged cache, where it was given none and may choose.

        Args:
            model: that generates.
            generation_config: how; this call's own.
            model_kwargs: what the model will be given.
        """
        given = cache_in(model_kwargs)
        is_other = isinstance(given, PagedCache) and self._resume(given, model, generation_config)
        is_custom = arguments_of_generate(model).get("custom_generate") is not None
        loop = "the custom_generate that it was given" if is_custom else "that of generate()"
        self.notes = {"loop": loop, "compiled": "no"}
        chosen = generation_config.cache_implementation
        if given is not None:
            self.notes["cache"] = f"the {type(given).__name__} that generate() was given"
            if is_other:
                self.notes["prompt"] = "another one than the cache held"
        elif generation_config.use_cache is False:
            self.notes["cache"] = "none, since use_cache=False"
        elif chosen is not None and chosen != getattr(model.generation_config, "cache_implementation", None):
            self.notes["cache"] = f"that of cache_implementation={chosen!r}, which generate() was given"
        else:
            generation_config.cache_implementation = None
            cache = self.new_cache(model)
            self._own.add(cache)
            model_kwargs[CACHE] = cache
            self.notes["cache"] = f"a new {type(cache).__name__}, in the pool of this model"

    def new_cache(self, model: PreTrainedModel) -> PagedCache | PagedEncoderDecoderCache:
        """Make an empty cache for a model."""
        if model.config.is_encoder_decoder:
            return PagedCache.from_model(model, page_size=self._size(model))
        with self._lock:
            if self.pool is None:
                self.pool = PagePool.from_model(
                    model,
                    page_size=self._size(model),
                    memory_fraction=self._memory_fraction,
                    prefix_cache=self._prefix_cache and recurrent_layer(model.config) is None,
                )
        return PagedCache(pool=self.pool)

    @contextmanager
    def decoding(self, model: PreTrainedModel, generation_config: Any) -> Iterator[list[StoppingCriteria]]:
        """A context in which steps are compiled where that pays; give criteria that must be asked in each step.

        Args:
            model: that generates.
            generation_config: how; this call's own.
        """
        reason = self._not_compiled(model)
        self.notes["compiled"] = f"no, {reason}" if reason else "yes"
        if reason:
            clock = _Clock()
            yield [clock]
            with self._lock:
                self._decoded_seconds += clock.seconds
            return
        with compiled(model):
            settings: Any = model.generation_config
            generation_config.compile_config = settings.compile_config
            yield []

    def _resume(self, cache: PagedCache, model: Any, generation_config: Any) -> bool:
        """Let a cache go on with the prompt that `generate()` is given; return whether it held another one.

        What it held is kept only if it is known that the model, as it is now, has computed it.
        """
        call = arguments_of_generate(model)
        loops = (type(model)._sample, type(model)._beam_search, sample)
        if call.get("decoding_method") not in loops or is_synced(model):
            return False
        ids, inputs = call["input_ids"], call["model_kwargs"]
        if ids.ndim != 2 or inputs.get("inputs_embeds") is not None:
            return False
        maker, rows = fingerprint(model), cache._sequences.rows
        is_known = rows.origin is not None or self._makers.get(cache) == maker
        keeps = is_known and not shows_passes(generation_config)
        is_empty = rows.columns.count == 0
        is_other = cache._resume_prepared(model, ids, inputs, generation_config, keeps=keeps)
        if is_empty or is_other:
            self._makers[cache] = maker
        return is_other

    def releasing(self, cache: Any, generation_config: Any, input_ids: Tensor) -> list[StoppingCriteria]:
        """Criteria that let rows give their pages back once they have ended, where nobody sees what becomes of them.

        Args:
            cache: that is decoded with.
            generation_config: how.
            input_ids: `(num_rows, num_columns)`.
        """
        ends: Tensor | None = generation_config._eos_token_tensor
        is_seen = cache not in self._own or generation_config.return_dict_in_generate
        if ends is None or len(input_ids) == 1 or is_seen:
            return []
        return [ReleaseFinished(cache, ends.tolist())]

    def _not_compiled(self, model: PreTrainedModel) -> str | None:
        if self._compile is False:
            return "since compile=False"
        if self._compile is True:
            return None
        if model.training:
            return "since the model is in training mode"
        if any(hasattr(module, "_hf_hook") for module in model.modules()):
            return "since accelerate moves tensors between its layers"
        if model.config.is_encoder_decoder:
            return "since it has an encoder"
        reason = compile_obstacle(model.config)
        if reason is not None:
            return f"since it {reason}"
        reason = hindrance(model.device)
        if reason is not None or model.device.type != "cpu":
            return reason
        if self._decoded_seconds < _COMPILE_SECONDS:
            return (
                f"{self._decoded_seconds:.1f} s were decoded so far; from {_COMPILE_SECONDS:.0f} s on it is, as "
                "compiling takes about as long"
            )
        return None

    def _size(self, model: PreTrainedModel) -> int:
        return self._page_size or usual_page_size(model.device)


class _Clock(StoppingCriteria):
    """Counts the seconds from the first token to the last; ends nothing."""

    def __init__(self) -> None:
        self._first = self._last = 0.0

    @property
    def seconds(self) -> float:
        """From the first token to the last."""
        return self._last - self._first

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self._last = time.perf_counter()
        self._first = self._first or self._last
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


STATES: WeakKeyDictionary[torch.nn.Module, State] = WeakKeyDictionary()
"""Of the models that are enabled."""
