"""A prompt that is being answered."""

import copy
import math
from collections.abc import Hashable
from typing import Any, Self

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    EpsilonLogitsWarper,
    GenerationConfig,
    MaxLengthCriteria,
    MinPLogitsWarper,
    PreTrainedModel,
    StoppingCriteria,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.configuration_utils import GenerationMode

from hf_paged._transformers import CACHE
from hf_paged.cache.paged import PagedCache
from hf_paged.decoding.many.prompt import Prompt
from hf_paged.decoding.many.result import FinishReason, Result
from hf_paged.decoding.speculate.processing import of_scores
from hf_paged.pages.pool import PagePool

# They look at nothing but the scores of a row, so that rows may be processed together.
_OF_SCORES = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper, EpsilonLogitsWarper)

_OF_PLAIN_PROMPTS = {CACHE, "cache", "past_key_values", "use_cache", "attention_mask", "position_ids"}
_OF_PASSES = {"logits_to_keep", "return_dict", "output_attentions", "output_hidden_states"}
_SHOWS = ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states")


class Row:
    """A prompt and its answer so far, with what `generate()` has made of its settings.

    Args:
        prompt: that is answered.
        processors: what changes scores.
        criteria: what ends the answer.
        is_random: whether tokens are drawn.
        generator: that draws them.

    Attributes:
        ids: all tokens.
        likeness: the same for rows whose scores may be processed together; None for those that are processed alone.
        parked: what was computed of it, while it waits and that is in memory of the host.
        hits: the share of its drafts that is taken for right; None as long as nothing is known.
    """

    def __init__(
        self,
        prompt: Prompt,
        processors: list[Any],
        criteria: list[StoppingCriteria],
        is_random: bool,
        generator: torch.Generator | None,
    ) -> None:
        self.prompt = prompt
        self.processors = processors
        self.is_random = is_random
        self.generator = generator
        self.ids = list(prompt.ids)
        self.likeness = _likeness(processors)
        self.parked: PagedCache | None = None
        self.hits: float | None = None
        lengths = [one.max_length for one in criteria if type(one) is MaxLengthCriteria]
        self._max_length: float = min(lengths, default=math.inf)
        ends = [one.eos_token_id for one in criteria if type(one) is EosTokenCriteria]
        self._ends = {token for tensor in ends for token in tensor.tolist()}
        self._criteria = [one for one in criteria if type(one) not in (MaxLengthCriteria, EosTokenCriteria)]

    @property
    def tokens(self) -> list[int]:
        """The new ones."""
        return self.ids[len(self.prompt.ids) :]

    @property
    def num_left(self) -> float:
        """Tokens that the answer may still get."""
        return self._max_length - len(self.ids)

    def add(self, token: int, device: torch.device) -> FinishReason | None:
        """Go on by a token; return why the answer ends with it, None if it doesn't."""
        self.ids.append(token)
        if token in self._ends:
            return "eos"
        if self._criteria:
            ids = torch.tensor([self.ids], device=device)
            if any(bool(torch.as_tensor(criterion(ids, None)).all()) for criterion in self._criteria):  # or a bool
                return "stop"
        return "length" if self.num_left <= 0 else None

    def ahead(self) -> Self:
        """Return a row that chooses tokens as this one is going to, as far as their scores alone say.

        It draws the same numbers in advance: of scores that are alike, both choose the same token.

        Source:
            Drafter-invariant speculative decoding: Daliri et al., 2024.
        """
        other = copy.copy(self)
        other.generator = None if self.generator is None else self.generator.clone_state()
        if self.likeness is None:  # others may keep a state
            other.processors = list(of_scores(self.processors))
            other.likeness = _likeness(other.processors)
        return other

    def result(self, reason: FinishReason, error: Exception | None = None) -> Result:
        """What has come of it."""
        return Result(self.prompt.index, self.prompt.given, self.tokens, reason, error)


def prepare(
    model: PreTrainedModel, pool: PagePool, prompt: Prompt, config: GenerationConfig | None, settings: dict[str, Any]
) -> Row:
    """Let `generate()` make processors and criteria of the settings of a prompt, and check them.

    Args:
        model: that generates.
        pool: of its cache.
        prompt: with settings of its own, which come first.
        config: settings of all prompts; None for those of the model.
        settings: arguments of `generate()` for all prompts.

    Raises:
        Exception: whatever `generate()` raises.
        ValueError: for what can't be done for many prompts at once.
    """
    found: list[Row] = []
    seed = prompt.seed

    def take(
        generating: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **inputs: Any,
    ) -> Tensor:
        _check(generation_config, inputs)
        is_random, generator = bool(generation_config.do_sample), None
        if is_random:
            drawn = int(torch.randint(2**63 - 1, ())) if seed is None else seed
            generator = torch.Generator(input_ids.device).manual_seed(drawn)
        found.append(Row(prompt, list(logits_processor), list(stopping_criteria), is_random, generator))
        return input_ids

    ids = torch.tensor([prompt.ids], device=model.device)
    arguments = _completed(model, config, settings | prompt.settings)
    given: Any = model
    given.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=config,
        custom_generate=take,
        **{CACHE: PagedCache(pool=pool)},
        **arguments,
    )
    if not found:
        raise ValueError(
            f"{type(model).__name__} generates in a way of its own, which can't be taken apart into steps. Call its "
            "generate()."
        )
    return found[0]


def _completed(model: Any, config: GenerationConfig | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Add to the settings of a prompt what `generate()` has no way to, where it is given another loop.

    It gives the tokenizer to its own loops alone (seen in 5.24), and warns for each prompt if no token stands for
    padding, which there is none of.
    """
    settings = dict(settings)
    configs = [model.generation_config] if config is None else [config, model.generation_config]
    if all(each.pad_token_id is None for each in configs):
        settings.setdefault("pad_token_id", 0)
    tokenizer = settings.pop("tokenizer", None)
    strings = settings.get("stop_strings", configs[0].stop_strings)
    if strings is not None and tokenizer is not None:
        criterion = StopStringCriteria(tokenizer, strings)
        settings["stopping_criteria"] = [*(settings.get("stopping_criteria") or []), criterion]
        settings["stop_strings"] = None
    return settings


def _check(config: Any, inputs: dict[str, Any]) -> None:
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) or config.num_return_sequences != 1:
        what = mode.value.replace("_", " ") if config.num_return_sequences == 1 else "several answers to one prompt"
        raise ValueError(
            f"generate_many() decodes greedily and samples, one answer to each prompt, but {what} was asked for. Use "
            "generate(), or give the prompt several times."
        )
    shown = [name for name in _SHOWS if getattr(config, name, False)]
    if shown or config.use_cache is False:
        raise ValueError(
            f"generate_many() gives tokens, computed with a cache, but {', '.join(shown) or 'use_cache=False'} was "
            "asked for. Leave it out, or use generate()."
        )
    # From 5.23 on there is a dictionary for what encoders of images give, empty without any.
    others = {name for name, value in inputs.items() if value is not None and value is not False and value != {}}
    others -= _OF_PLAIN_PROMPTS | _OF_PASSES
    if others:
        raise ValueError(
            f"generate_many() was given {', '.join(sorted(others))}, but its prompts are tokens and nothing else. Use "
            "generate() for these."
        )


def _likeness(processors: list[Any]) -> Hashable | None:
    parts: list[Hashable] = []
    for processor in processors:
        values = vars(processor)
        if type(processor) not in _OF_SCORES or not all(isinstance(value, int | float) for value in values.values()):
            return None
        parts.append((type(processor), tuple(sorted(values.items()))))
    return tuple(parts)
