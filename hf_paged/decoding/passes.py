"""The forward passes of one `generate()`."""

import logging
from contextlib import AbstractContextManager
from functools import cache as once
from typing import Any

import numpy as np
from torch import Tensor

from hf_paged._transformers import cache_in, keeps_to
from hf_paged.batch.padding import BoolMatrix
from hf_paged.batch.told import ToldPass
from hf_paged.decoding.surplus import sequences_of

logger = logging.getLogger(__name__)


class Passes:
    """The forward passes of one `generate()`, each made as `generate()` makes it.

    A cache over pages is told the ids of each pass, and what is in its attention mask, instead of finding out.

    Args:
        model: makes them.
        config: how to generate.
        inputs: of the model, beside its ids; they are kept up to date.

    """

    def __init__(self, model: Any, config: Any, inputs: dict[str, Any]) -> None:
        self._model = model
        self._config = config
        self._inputs = inputs
        self._has_encoder = bool(model.config.is_encoder_decoder)
        self._mask_name = "decoder_attention_mask" if self._has_encoder else "attention_mask"
        is_compiled = model._valid_auto_compile_criteria(inputs, config)
        self._forward = model.get_compiled_call(config.compile_config) if is_compiled else model.__call__
        self._num_new = 1 if inputs["use_cache"] else None

    @property
    def cache(self) -> Any:
        """What the passes fill; None without."""
        return cache_in(self._inputs)

    def optimized(self) -> AbstractContextManager[None]:
        """A context in which the model is set up for single tokens."""
        context: AbstractContextManager[None] = self._model._optimize_model_for_decode()
        return context

    def first(self, input_ids: Tensor) -> Any:
        """Compute the prompt; return what the model returns."""
        is_first = not self._config.is_assistant
        outputs = self._model._prefill(input_ids, self._config, self._inputs, is_first_iteration=is_first)
        self._rows = sequences_of(cache_in(outputs))
        self._mask = None if self._rows is None else self._known_mask()
        return outputs

    def update(self, outputs: Any) -> None:
        """Bring the inputs up to date, once the outputs of a pass are known to be wanted."""
        self._inputs = self._model._update_model_kwargs_for_generation(
            outputs, self._inputs, is_encoder_decoder=self._has_encoder
        )

    def next(self, input_ids: Tensor) -> Any:
        """Compute the last column of `input_ids`, `(num_rows, num_columns)`; return what the model returns."""
        if self._rows is None:
            return self._run(input_ids)
        mask = self._inputs.get(self._mask_name)
        on_host = None if mask is None or self._mask is None else self._mask.up_to(mask.shape[1])
        rows = self._rows.rows
        rows.told = ToldPass(input_ids, mask, on_host)
        try:
            return self._run(input_ids)
        finally:
            rows.told = None

    def _run(self, input_ids: Tensor) -> Any:
        inputs = self._model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=self._num_new, **self._inputs
        )
        return self._forward(**inputs, return_dict=True)

    def _known_mask(self) -> "_GrowingMask | None":
        """Know the mask of all passes to come, if there is one and it is known what becomes of it."""
        mask = self._inputs.get(self._mask_name)
        if mask is None or mask.ndim != 2 or not self.cache.is_compileable:
            return None
        if not keeps_to(self._model, "prepare_inputs_for_generation", "_update_model_kwargs_for_generation"):
            _say(type(self._model).__name__)
            return None
        # What Transformers makes of it otherwise, in each pass; and another tensor would have to be looked into.
        self._inputs[self._mask_name] = mask = mask.bool()
        return _GrowingMask(mask.cpu().numpy())


class _GrowingMask:
    """A mask on the host, in which every new column is a token."""

    def __init__(self, mask: BoolMatrix) -> None:
        self._mask = mask

    def up_to(self, num_columns: int) -> BoolMatrix:
        """The mask of the first columns, new ones included."""
        missing = num_columns - self._mask.shape[1]
        if missing > 0:
            more = np.ones((len(self._mask), max(missing, self._mask.shape[1])), dtype=bool)
            self._mask = np.concatenate([self._mask, more], axis=1)
        return self._mask[:, :num_columns]


@once
def _say(name: str) -> None:
    logger.warning(
        "hf_paged.sample reads the attention mask of a batch with padding in each step, since %s prepares its inputs "
        "in a way of its own.",
        name,
    )
