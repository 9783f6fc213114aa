"""A pass that is made before it is known whether it is needed, and taken back if it is not."""

import math
from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import Tensor
from transformers import Cache, PreTrainedModel

from hf_paged.batch.sequences import Sequences

_NUM_POSITIONS = "max_position_embeddings", "max_target_positions"


def runs_beside(tensor: Tensor) -> bool:
    """Whether the device of a tensor computes while the host goes on, and has streams and events."""
    return tensor.device.type == "cuda"


class Surplus:
    """The pass that may turn out to be behind the last token, as its cache sees it.

    A context: Transformers' own caches keep more within it than the next pass needs.

    Args:
        cache: what the passes fill; None without.
        is_returned: whether `generate()` returns it.
        model: makes the passes.
        input_ids: `(num_rows, num_columns)`, the prompt, which has been computed.
    """

    def __init__(self, cache: Any, is_returned: bool, model: PreTrainedModel, input_ids: Tensor) -> None:
        decoder = getattr(cache, "self_attention_cache", cache)
        self._sequences = sequences_of(cache)
        is_kept = is_returned or getattr(cache, "_is_user_defined", False) or self._sequences is not None
        self._kept: Any = decoder if is_kept else None
        self._recording: list[Any] = []
        # In training mode a pass draws random numbers, which can't be put back.
        can_be_taken_back = self._kept is None or getattr(self._kept, "is_croppable", False)
        is_possible = runs_beside(input_ids) and can_be_taken_back and not model.training
        self._num_left = _room(decoder, model, input_ids) if is_possible else 0.0

    @property
    def is_possible(self) -> bool:
        """Whether the next pass may be made before it is known to be needed."""
        return self._num_left > 0

    def __enter__(self) -> "Surplus":
        if self.is_possible and self._kept is not None and self._sequences is None:
            layers = [layer for layer in self._kept.layers if getattr(layer, "record_past", True) is False]
            self._kept.activate_past_recording()
            self._recording = layers
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for layer in self._recording:
            layer.record_past = False

    def decide(self, is_surplus: Callable[[], bool]) -> bool:
        """Take the pass back that was made last if it was behind the last token, or if that can't be found out.

        Args:
            is_surplus: finds it out.

        Returns:
            Whether it was.
        """
        self._num_left -= 1
        found = True
        sequences = self._sequences
        recorded_before = sequences is not None and sequences.records_past
        if sequences is not None:
            sequences.records_past = True  # what leaves a window by this pass may be seen again
        try:
            found = is_surplus()
        finally:
            if found and self._kept is not None:
                self._kept.crop(-1)
            elif self._recording:
                self._kept.crop(0)
            if sequences is not None:
                sequences.records_past = recorded_before
        return found

    def forget(self) -> bool:
        """Forget a pass that failed and was not needed; return whether the cache is as before."""
        if self._sequences is not None:
            self._sequences.roll_back()
        return self._sequences is not None or self._kept is None


def sequences_of(cache: Any) -> Sequences | None:
    """The rows of a cache over pages, or of the one that an encoder-decoder has for its decoder."""
    sequences = getattr(getattr(cache, "self_attention_cache", cache), "_sequences", None)
    return sequences if isinstance(sequences, Sequences) else None


def _room(cache: Any, model: PreTrainedModel, input_ids: Tensor) -> float:
    """Passes for which the cache and the embeddings of positions have room: one too many would fail on the device."""
    config = model.config.get_text_config(decoder=True)
    limits = [getattr(config, name, None) for name in _NUM_POSITIONS]
    num_columns = input_ids.shape[1]
    if isinstance(cache, Cache) and not all(cache.is_linear):  # those count no tokens
        num_columns = max(num_columns, int(cache.get_seq_length()))
        # That of a pool is noticed on the host.
        limits.append(cache.get_max_length() if sequences_of(cache) is None else None)
    return min((limit for limit in limits if limit is not None and limit > 0), default=math.inf) - num_columns
