"""The forward passes of one `generate()`."""

import logging
from contextlib import AbstractContextManager
from functools import cache as once
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_paged._torch.dynamo import let_vary
from hf_paged._transformers import cache_in, keeps_to
from hf_paged.batch.padding import BoolMatrix
from hf_paged.batch.prompt.prefixes import is_findable, let_be_found
from hf_paged.batch.sequences import Sequences
from hf_paged.batch.told import ToldPass
from hf_paged.compile.steady import SteadySteps
from hf_paged.decoding.inputs import StepInputs, inputs_after
from hf_paged.decoding.surplus import sequences_of

logger = logging.getLogger(__name__)


def shows_passes(config: Any) -> bool:
    """Whether `generate()` returns what each of its passes gives, and so must make them all as it does."""
    return bool(config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states))


class Passes:
    """The forward passes of one `generate()`, each made as `generate()` makes it.

    A cache over pages is told the ids of each pass, and what is in its attention mask, instead of finding out. What is
    the same in all decoding steps is prepared once.

    Args:
        model: makes them.
        config: how to generate.
        inputs: of the model, beside its ids; they are kept up to date.
        is_alone: whether nobody can change the model between two passes.
    """

    def __init__(self, model: Any, config: Any, inputs: dict[str, Any], *, is_alone: bool = False) -> None:
        self._model = model
        self._config = config
        self._inputs = inputs
        self._has_encoder = bool(model.config.is_encoder_decoder)
        self._mask_name = "decoder_attention_mask" if self._has_encoder else "attention_mask"
        is_compiled = model._valid_auto_compile_criteria(inputs, config)
        self._forward = model.get_compiled_call(config.compile_config) if is_compiled else model.__call__
        # For steps whose inputs are made of those of the step before, and so are like them.
        self._steady = SteadySteps(model, self._forward) if is_compiled and is_alone else self._forward
        self._num_new = 1 if inputs["use_cache"] else None
        self._step_inputs: StepInputs | None = None  # once they are known to be all that a step needs
        self._is_first_step = True
        self._rows_vary = False

    @property
    def cache(self) -> Any:
        """What the passes fill; None without."""
        return cache_in(self._inputs)

    @property
    def inputs(self) -> dict[str, Any]:
        """Of the model beside its ids, as they are now."""
        return self._inputs

    @property
    def forward(self) -> Any:
        """What computes a pass, compiled or not."""
        return self._forward

    def optimized(self) -> AbstractContextManager[None]:
        """A context in which the model is set up for single tokens."""
        context: AbstractContextManager[None] = self._model._optimize_model_for_decode()
        return context

    def first(self, input_ids: Tensor, *, packs: bool) -> Any:
        """Compute the prompt, `packs` it also without a prefix index if that pays; return what the model returns."""
        prefill = getattr(self.cache, "_prefill_prepared", None)
        if prefill is not None and not shows_passes(self._config):
            prefill(self._model, input_ids, self._inputs, packs=packs)
        before = sequences_of(self.cache)
        num_left = input_ids.shape[1] - (0 if before is None else before.rows.columns.count)
        is_first = not self._config.is_assistant
        outputs = self._model._prefill(input_ids, self._config, self._inputs, is_first_iteration=is_first)
        self._follow(cache_in(outputs), input_ids.shape[1])
        if num_left > 1:  # else the packed prompt is found already
            self._let_be_found(input_ids)
        return outputs

    def go_on(self, num_columns: int) -> None:
        """Begin with a cache that has all of `num_columns` columns but the last; `next` computes that one.

        It is one of several numbers of rows, for which a compiled model has one graph.
        """
        self._rows_vary = True
        self._follow(self.cache, num_columns)

    def update(self, outputs: Any) -> None:
        """Bring the inputs up to date, once the outputs of a pass are known to be wanted."""
        if self._step_inputs is not None:
            self._step_inputs.advance()
            return
        self._inputs = self._model._update_model_kwargs_for_generation(
            outputs, self._inputs, is_encoder_decoder=self._has_encoder
        )

    def next(self, input_ids: Tensor) -> Any:
        """Compute the last column of `input_ids`, `(num_rows, num_columns)`; return what the model returns."""
        if self._sequences is None:
            return self._forward(**self._prepare(input_ids), return_dict=True)
        on_host = None if self._mask is None else self._mask.up_to(input_ids.shape[1])
        told = self._sequences.told = ToldPass(input_ids, self._inputs.get(self._mask_name), on_host)
        try:
            is_steady = self._step_inputs is not None
            inputs = self._prepare_step(input_ids, self._sequences, told)
            forward = self._steady if is_steady and self._step_inputs is not None else self._forward
            return forward(**inputs, return_dict=True)
        finally:
            self._sequences.told = None

    def end(self, input_ids: Tensor) -> None:
        """Let later prompts find what was computed of `input_ids`, `(num_rows, num_columns)`."""
        if self._sequences is not None:
            self._sequences.end_step()
            self._let_be_found(input_ids)

    def _let_be_found(self, input_ids: Tensor) -> None:
        if self._sequences is not None and self._sequences.pool.prefix_index is not None:
            self._sequences.apply_edits()
            if is_findable(self._sequences.rows):
                let_be_found(self._sequences.rows, input_ids)

    def _follow(self, cache: Any, num_columns: int) -> None:
        self._sequences = sequences_of(cache)
        self._mask = None if self._sequences is None else self._known_mask(num_columns)

    def _prepare(self, input_ids: Tensor) -> dict[str, Any]:
        inputs: dict[str, Any] = self._model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=self._num_new, **self._inputs
        )
        return inputs

    def _prepare_step(self, input_ids: Tensor, sequences: Sequences, told: ToldPass) -> dict[str, Any]:
        token = input_ids[:, -1:].clone(memory_format=torch.contiguous_format)
        if self._step_inputs is not None:
            inputs = self._step_inputs.next(token, told.mask)
            if inputs is not None:
                return inputs
            self._stop_short_cut(sequences, told)
        inputs = self._prepare(input_ids)
        for name in ("input_ids", "position_ids") if self._rows_vary and len(token) > 1 else ():
            if inputs.get(name) is not None:
                let_vary(inputs[name], 0)
        if self._is_first_step and (told.mask is None or told.mask_on_host is not None):
            self._step_inputs = inputs_after(self._model, sequences, self._inputs, inputs, token)
        self._is_first_step = False
        return inputs

    def _stop_short_cut(self, sequences: Sequences, told: ToldPass) -> None:
        """Let Transformers prepare the inputs from now on, as something has changed about the rows."""
        assert self._step_inputs is not None
        if self._step_inputs.position_ids is not None:
            self._inputs["position_ids"] = self._step_inputs.position_ids + 1
        if told.mask is not None and told.mask_on_host is not None:
            mask = torch.from_numpy(told.mask_on_host).to(told.mask.device)
            self._inputs[self._mask_name] = mask
            sequences.told = ToldPass(told.ids, mask, told.mask_on_host)
        self._step_inputs = None

    def _known_mask(self, num_ids: int) -> "_GrowingMask | None":
        """Know the mask of all passes to come, if there is one and it is known what becomes of it."""
        mask = self._inputs.get(self._mask_name)
        if mask is None or mask.ndim != 2 or not self.cache.is_compileable:
            return None
        if not keeps_to(self._model, "prepare_inputs_for_generation", "_update_model_kwargs_for_generation"):
            _say(type(self._model).__name__)
            return None
        # What Transformers makes of it otherwise, in each pass; and another tensor would have to be looked into.
        self._inputs[self._mask_name] = mask = mask.bool()
        return _GrowingMask(mask.cpu().numpy(), num_ids)


class _GrowingMask:
    """A mask on the host, in which every new column is a token.

    Args:
        mask: `(num_rows, num_columns)`, of the prompt.
        num_ids: columns of its ids; there may be fewer, behind those that are cached.
    """

    def __init__(self, mask: BoolMatrix, num_ids: int) -> None:
        self._mask = mask
        self._num_before = mask.shape[1] - num_ids

    def up_to(self, num_ids: int) -> BoolMatrix:
        """The mask of a pass, up to the last of `num_ids` columns of ids."""
        num_columns = self._num_before + num_ids
        if num_columns > self._mask.shape[1]:
            self._mask = np.concatenate([self._mask, np.ones_like(self._mask)], axis=1)
        return self._mask[:, :num_columns]


@once
def _say(name: str) -> None:
    logger.warning(
        "hf_paged.sample reads the attention mask of a batch with padding in each step, since %s prepares its inputs "
        "in a way of its own.",
        name,
    )
