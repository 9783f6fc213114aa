"""lm-eval's `--model hf-paged`: contexts are computed once for all of their choices, and answers generated from pages.

lm-eval knows its models by names that are registered as their modules are imported, and imports none but its own. So
importing this module registers one more, and running it (`python -m hf_paged.tools.lm_eval`) is lm-eval's command with
it.
"""

import logging
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from typing_extensions import override

from hf_paged.enabling.api import enable
from hf_paged.errors import NotPackable
from hf_paged.scoring.choices import score_choices

logger = logging.getLogger(__name__)

_CONTEXTS = 32  # scored between two steps of the progress bar

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""Context and continuation as text, None for a part of a text, and as token ids."""


@register_model("hf-paged")
class PagedLM(HFLM):  # type: ignore[misc]
    """A model of lm-eval that is enabled; it takes what `--model hf` takes.

    Args:
        *args: as for `HFLM`.
        **kwargs: as for `HFLM`. `batch_size`: prompts that are generated from at once; for scores it means nothing.

    Raises:
        ValueError: for a model that can't be enabled, or is already.
    """

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
