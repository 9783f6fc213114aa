"""lm-eval's `--model hf-paged`: contexts are computed once for all of their choices, and answers generated from pages.

lm-eval knows its models by names that are registered as their modules are imported, and imports none but its own. So
importing this module registers one more, and running it (`python -m hf_paged.tools.lm_eval`) is lm-eval's command with
it.
"""

import logging
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from typing_extensions import override

from hf_paged.decoding.many.answers import generate_many
from hf_paged.enabling.api import enable
from hf_paged.enabling.state import STATES
from hf_paged.errors import NotPackable
from hf_paged.scoring.choices import score_choices

logger = logging.getLogger(__name__)

_CONTEXTS = 32  # scored between two steps of the progress bar
_BATCHES = 8  # batches' worth of prompts that are answered before lm-eval is given the answers

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""Context and continuation as text, None for a part of a text, and as token ids."""


@register_model("hf-paged")
class PagedLM(HFLM):  # type: ignore[misc]
    """A model of lm-eval that is enabled; it takes what `--model hf` takes.

    Args:
        *args: as for `HFLM`.
        **kwargs: as for `HFLM`. `batch_size`: rows that generate at once; for scores it means nothing.

    Raises:
        ValueError: for a model that can't be enabled, or is already.
    """

    _max_rows = 1  # that generate at once

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        enable(self.model)

    @override
    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if self.backend != "causal":
            return self._scored_one_by_one(requests, disable_tqdm, override_bs)
        by_context: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            by_context.setdefault(self._fitting(context, continuation), []).append(index)
        contexts = sorted(by_context)  # those that begin alike follow one another
        answers: dict[int, tuple[float, bool]] = {}
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        try:
            for first in range(0, len(contexts), _CONTEXTS):
                asked = [by_context[context] for context in contexts[first : first + _CONTEXTS]]
                choices = [[requests[index][2] for index in indices] for indices in asked]
                with torch.autocast(
                    self.device.type, self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
                ):
                    scores = score_choices(self.model, contexts[first : first + _CONTEXTS], choices)
                for indices, own in zip(asked, scores, strict=True):
                    for index, score in zip(indices, own, strict=True):
                        answers[index] = (score.log_probability, score.is_greedy)
                        if requests[index][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[index][0], answers[index])
                    bar.update(len(indices))
        except NotPackable as reason:
            logger.warning("Each context is computed anew for each of its choices, as by --model hf: %s", reason)
            return self._scored_one_by_one(requests, disable_tqdm, override_bs)
        finally:
            bar.close()
        return [answers[index] for index in range(len(requests))]

    @override
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        batch_size: Any = self.batch_size
        if self.backend == "causal":
            self._max_rows = self._detect_batch_size() if batch_size == "auto" else batch_size
            self.batch_size_per_gpu = _BATCHES * self._max_rows
        try:
            answers: list[str] = super().generate_until(requests, disable_tqdm)
            return answers
        finally:
            self.batch_size_per_gpu = batch_size

    @override
    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        if self.backend != "causal":
            return self._generated_as_by_hf(context, max_length, stop, generation_kwargs)
        mask: Tensor = generation_kwargs.pop("attention_mask")
        try:
            rows = self._generated_by_many(context, mask, max_length - context.shape[1], stop, generation_kwargs)
        except ValueError as error:
            logger.warning("Each batch waits for its longest answer, as by --model hf: %s", error)
            rows = []
            for first in range(0, len(context), self._max_rows):
                places = slice(first, first + self._max_rows)
                settings = generation_kwargs | {"attention_mask": mask[places]}
                rows += self._generated_as_by_hf(context[places], max_length, stop, settings)
        return pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)

    def _generated_by_many(
        self, context: Tensor, mask: Tensor, max_new_tokens: int, stop: list[str], settings: dict[str, Any]
    ) -> list[Tensor]:
        """Return the rows of a context with their answers.

        Raises:
            ValueError: for settings that `generate_many` does not take.
        """
        settings = {"pad_token_id": self.tokenizer.pad_token_id} | settings
        if not settings.get("do_sample"):
            settings.pop("temperature", None)  # 0, which generate() would warn of
        rows, model, state = list(context), self.model, STATES[self.model]
        dtype = self.mixed_precision_dtype
        with (
            torch.autocast(self.device.type, dtype, enabled=dtype is not None),
            state.decoding(model, model.generation_config) as watching,
        ):
            prompts = []
            for ids in (row[own.bool()] for row, own in zip(rows, mask, strict=True)):
                criteria = [*stop_sequences_criteria(self.tokenizer, stop, len(ids), 1), *watching]
                prompts.append({"input_ids": ids, "stopping_criteria": criteria})
            pool, max_rows = state.new_cache(model).pool, self._max_rows
            with generate_many(
                model, prompts, pool=pool, max_rows=max_rows, max_new_tokens=max_new_tokens, **settings
            ) as results:
                for result in results:
                    if result.error is not None:
                        raise result.error
                    answer = torch.tensor(result.tokens, device=context.device)
                    rows[result.index] = torch.cat([rows[result.index], answer])
        return rows

    def _generated_as_by_hf(
        self, context: Tensor, max_length: int, stop: list[str], settings: dict[str, Any]
    ) -> Tensor:
        ids: Tensor = super()._model_generate(context, max_length, stop, **settings)
        return ids

    def _scored_one_by_one(
        self, requests: list[Request], disable_tqdm: bool, override_bs: int | None
    ) -> list[tuple[float, bool]]:
        scores: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        return scores

    def _fitting(self, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        """The end of a context that fits into the model with a continuation, as `HFLM` cuts it."""
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise ValueError(
                f"A continuation of {len(continuation)} tokens was to be scored, but the model takes "
                f"{self.max_length}. Raise max_length in --model_args, if the model knows as many positions."
            )
        if len(context) > room:
            logger.warning("A context of %d tokens is cut to its last %d, as --model hf does.", len(context), room)
        return tuple(context[-room:])


if __name__ == "__main__":
    cli_evaluate()
