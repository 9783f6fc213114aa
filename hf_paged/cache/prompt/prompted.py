"""What a cache does with prompts."""

from typing import Any
from weakref import ref

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_paged.cache.prompt.known_prefix import commit
from hf_paged.cache.prompt.prefill import prefill, prefill_prepared
from hf_paged.cache.prompt.resume import is_other_than, is_plain_prompt
from hf_paged.cache.row_operations import RowOperations


class Prompted(RowOperations):
    """A cache that computes prompts, goes on with other versions of them, and lets others find them."""

    _model: "ref[PreTrainedModel] | None"

    def prefill(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Compute a prompt, so that `generate()` with the same arguments goes on from there.

        All columns are computed that are not cached yet, but for the last one, with which `generate()` begins. If it
        fails, nothing has changed. The tokens of all rows follow one another in chunks of `max_tokens`, without any
        padding; equal rows are computed once. That takes a decoder set to `"paged_flex"`, whose rows and columns are
        told apart by causality, positions and padding alone. For all other models (set to `"sdpa"` or `"eager"`, with
        images, hooks, recurrent layers, or adapters for each row, for example) the prompt is computed at once and
        padded, as `generate()` does, and one log line says why. With recurrent layers and a prefix index it is
        computed row by row.

        What was an input of the prompt alone, such as `pixel_values`, is to be left out of the `generate()` that
        follows.

        Args:
            model: a decoder, a model that has one, or a PEFT model of these.
            input_ids: `(num_rows, num_columns)`, those that are cached included.
            attention_mask: like `input_ids`, 0 for padding; None for what `generate()` makes of that.
            max_tokens: tokens that are computed at once; bounds the memory of the activations. None: 1536 on a CPU,
                4096 elsewhere. Below 128 no chunk is compiled. Padded prompts are not cut.
            **kwargs: what else the model is given, as to `generate()`: what a processor returned, or `adapter_names`,
                which a PEFT model with several adapters must be told, be it None.

        Raises:
            OutOfPagesError: if the prompt does not fit into the pool.
            ValueError: for arguments that don't fit what is cached, another prompt than the cached one, or a model
                that has an encoder, other layers than the cache, or columns that are no tokens of `input_ids`.
        """
        prefill(model, self, input_ids, attention_mask, max_tokens, kwargs)  # type: ignore[arg-type]
        self._model = ref(model)

    def resume(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Go on with another version of what is cached, so that `generate()` with the same arguments goes on from it.

        For conversations that were edited, for another try of an answer, and for the next turn of a batch, whose
        padding is another one. Each row keeps the tokens with which both versions begin, up to the first padding
        behind a token, whatever columns they stand in; the others are given back, and what is missing is computed as
        `prefill` does it. A row of which a window has dropped what the next token would see is computed anew. If it
        fails, nothing has changed.

        A prompt that can't be computed packed goes on from the first column in which any row has something new; with
        recurrent layers, whose states can't go back, it is computed anew.

        Args:
            model: the one that has computed what is cached.
            input_ids: `(num_rows, num_columns)`, of the whole history, longer or shorter than what is cached; as many
                rows as there are, or any number where there is one.
            attention_mask: as for `prefill`.
            max_tokens: as for `prefill`.
            **kwargs: as for `prefill`. If there are any, nothing is kept.

        Raises:
            OutOfPagesError: if the prompt does not fit into the pool beside what is cached.
            ValueError: if the tokens that are cached aren't known, or are not what ids make by themselves; or as for
                `prefill`.
        """
        prefill(model, self, input_ids, attention_mask, max_tokens, kwargs, resumes=True)  # type: ignore[arg-type]
        self._model = ref(model)

    def _prefill_prepared(
        self, model: PreTrainedModel, input_ids: Tensor, inputs: dict[str, Any], *, packs: bool
    ) -> None:
        """Compute a prompt within a loop that `generate()` calls, as far as the prefix index, or packing, helps."""
        prefill_prepared(model, self._sequences, input_ids, inputs, packs=packs)

    def _resume_prepared(
        self, model: PreTrainedModel, input_ids: Tensor, inputs: dict[str, Any], config: Any, *, keeps: bool
    ) -> bool:
        """Go on with another prompt, if `generate()` is about to go on with one, and return whether it is.

        Args:
            model: that generates.
            input_ids: `(num_rows, num_columns)`.
            inputs: what else it has prepared for the model.
            config: of the call.
            keeps: whether what both have in common may stay.
        """
        self._sequences.end_step()
        mask: Tensor | None = inputs.get("attention_mask")
        if not is_other_than(self._sequences, input_ids, mask, config):
            return False
        if keeps and is_plain_prompt(model, input_ids, inputs):
            self.resume(model, input_ids, torch.ones_like(input_ids) if mask is None else mask)
        else:
            self.reset()
        return True

    def commit(self, sequences: Tensor) -> None:
        """Let what was generated be found by later prompts, such as the next turn of a conversation.

        Full pages of the rows go into the prefix index of the pool; `prefill` has put those of the prompt there. They
        stay when this cache is reset or dropped, until pages run short.

        Args:
            sequences: `(num_rows, num_columns)` what `generate()` returned, or at least all columns that are cached.

        Raises:
            ValueError: if the pool has no prefix cache, if the rows were not begun by `prefill`, went on with another
                model, adapter, mask or positions, or were edited, or if these are other ids than those that were
                computed.
        """
        commit(self._sequences, sequences)
