"""`generate_many`, and the answers that it gives as they come."""

from collections.abc import Generator, Iterable, Iterator, Sized
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging
from typing_extensions import override

from hf_paged._transformers import model_in, recurrent_layer
from hf_paged.attention.mask import NAME
from hf_paged.cache.paged import PagedCache
from hf_paged.cache.prompt.checks import check_fits
from hf_paged.decoding.many.drafts.decoded import Decoded
from hf_paged.decoding.many.drafts.drafter import RowDrafter
from hf_paged.decoding.many.drafts.looked_up import LookedUp
from hf_paged.decoding.many.result import ManyStats, Result
from hf_paged.decoding.many.room import growing_pool
from hf_paged.decoding.many.schedule import Schedule
from hf_paged.decoding.ragged_passes import check_ends_apart
from hf_paged.decoding.speculate.assistant import Assisted
from hf_paged.decoding.speculate.lookup import PromptLookup
from hf_paged.pages.pool import PagePool, check_count, usual_page_size

_NOT_TAKEN = ("inputs", "input_ids", "attention_mask", "past_key_values", "cache", "streamer")


class Answers(Iterator[Result]):
    """Gives the result of each prompt as soon as it is there, in any order.

    Nothing is computed but while the next one is asked for. Once all are given, or this is closed, given up, or
    interrupted, all pages are given back. A context: it is closed at the end.

    Args:
        schedule: of the prompts.
        num_prompts: how many there are; None if that is not known.
    """

    def __init__(self, schedule: Schedule, num_prompts: int | None) -> None:
        self._schedule = schedule
        self._num_prompts = num_prompts
        self._num_done = self._num_failed = 0
        self._running = self._run()

    @override
    def __next__(self) -> Result:
        return next(self._running)

    def __enter__(self) -> "Answers":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End now."""
        self._running.close()

    def in_order(self) -> list[Result]:
        """Wait for all results that are left, and return them in the order of the prompts."""
        return sorted(self, key=lambda result: result.index)

    def stats(self) -> ManyStats:
        """How far the prompts are."""
        return replace(self._schedule.stats(), num_done=self._num_done, num_failed=self._num_failed)

    def _run(self) -> Generator[Result, None, None]:
        bar: Any = logging.tqdm(total=self._num_prompts, unit="prompt", disable=None)
        try:
            while (results := self._schedule.advance()) is not None:
                for result in results:
                    self._num_done += 1
                    self._num_failed += result.error is not None
                    bar.update()
                    yield result
        finally:
            bar.close()
            self._schedule.give_back()


def generate_many(
    model: PreTrainedModel,
    prompts: Iterable[Any],
    generation_config: GenerationConfig | None = None,
    pool: PagePool | None = None,
    max_rows: int = 16,
    **generate_kwargs: Any,
) -> Answers:
    """Answer many prompts in one batch that is filled up again as rows end.

    Rows that end leave at once. New prompts are computed packed, in pieces between two steps, and join. What is known
    of their beginnings is taken from the pool. When pages run short, the newest rows wait; nothing fails as long as
    one row alone fits. Greedy or sampled, an answer does not depend on what runs beside it, but for rounding: matrix
    products of other sizes may be summed in another order. Within `hf_paged.compiled(model)` steps are compiled.

    Each prompt may have settings of its own. What fails because of them, or of a processor or criterion, is the error
    of its result; the others go on.

    Args:
        model: a decoder with `attn_implementation="paged_flex"`, or one that is enabled.
        prompts: token ids, each a list or a tensor `(num_tokens,)`; or mappings with `input_ids`, and for that prompt
            a `seed` and arguments of `generate()`, such as `max_new_tokens`, `stop_strings` or `logits_processor`.
            Any iterable, maybe without end; the next one is taken when there may be room for it.
        generation_config: for all prompts; None for that of the model.
        pool: whose pages are used; None for one of its own, which grows as rows need it, and keeps what they leave
            for prompts to come until others need the pages.
        max_rows: rows of the batch, at most.
        **generate_kwargs: arguments of `generate()` for all prompts. With `custom_generate=hf_paged.prompt_lookup()`
            rows go on by several tokens a step where they repeat what they have said, and with
            `hf_paged.assisted(draft_model)` where a smaller model says the same; tokens are those that come without,
            drawn ones too.

    Returns:
        An iterator over results, as they come. Its `in_order()` waits for all of them.

    Raises:
        ValueError: for a model or pool that can't do this, or arguments that are no settings; for what is wrong with
            a prompt its result says so.
    """
    model = _checked(model)
    max_rows = check_count("max_rows", max_rows, least=1)
    wrong = sorted(set(_NOT_TAKEN) & set(generate_kwargs))
    if wrong:
        raise ValueError(f"generate_many() was given {', '.join(wrong)}, but it takes settings of generate() alone.")
    if isinstance(prompts, str | bytes | torch.Tensor) or not isinstance(prompts, Iterable):
        raise ValueError(
            f"generate_many() was given a {type(prompts).__name__} as prompts, but it takes a list of them, or "
            "anything that gives one after the other, each a list of token ids or a tensor (num_tokens,)."
        )
    if pool is None:
        pool = growing_pool(model, usual_page_size(model.device))
    check_fits(model, PagedCache(pool=pool)._sequences)
    drafter = _drafter(model, generate_kwargs.pop("custom_generate", None), pool.page_size)
    schedule = Schedule(model, prompts, generation_config, generate_kwargs, pool, max_rows, drafter)
    return Answers(schedule, len(prompts) if isinstance(prompts, Sized) else None)


def _drafter(model: PreTrainedModel, given: Any, page_size: int) -> RowDrafter | None:
    if given is None:
        return None
    if not isinstance(given, PromptLookup | Assisted):
        raise ValueError(
            f"generate_many() was given custom_generate={given!r}, but its batches have a loop of their own. Leave it "
            "out, or pass hf_paged.prompt_lookup() or hf_paged.assisted(draft_model) for drafts."
        )
    recurrent = recurrent_layer(model.config)
    if recurrent is not None:
        raise ValueError(
            f"Drafts need rows of which tokens can be taken back, but of this {type(model).__name__} {recurrent}. "
            "Leave out custom_generate."
        )
    check_ends_apart(model)
    if isinstance(given, PromptLookup):
        return LookedUp(given)
    given.check(model)
    check_ends_apart(given.draft_model)
    return Decoded(given, model, page_size)


def _checked(model: Any) -> PreTrainedModel:
    model = model_in(model, "generate_many()")
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"generate_many() was given a {name}, which wraps a model. Pass the model itself: with adapters of PEFT "
            "that are part of its layers, as LoRA's, that is model.get_base_model()."
        )
    if getattr(model, "generation_config", None) is None or model.config.is_encoder_decoder:
        raise ValueError(f"generate_many() was given a {name}, but it takes a decoder that has generate().")
    attention = model.config.get_text_config(decoder=True)._attn_implementation
    if attention != NAME:
        raise ValueError(
            f"generate_many() was given a {name} with attn_implementation={attention!r}, but its batches need "
            f"{NAME!r}. Load it with attn_implementation={NAME!r}, or call hf_paged.enable(model) first."
        )
    return model
