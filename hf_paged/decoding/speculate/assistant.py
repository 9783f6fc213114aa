"""Drafts that a smaller model makes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_paged._transformers import CACHE, cache_in, model_in, recurrent_layer
from hf_paged.attention.mask import NAME
from hf_paged.batch.padding import BoolVector, Counts
from hf_paged.decoding.ragged_passes import RaggedPasses
from hf_paged.decoding.speculate.drafts import Drafts, check_positive, prompt_mask
from hf_paged.decoding.speculate.loop import speculate
from hf_paged.decoding.speculate.processing import of_scores
from hf_paged.decoding.speculate.text import Text
from hf_paged.decoding.surplus import sequences_of

_MAX_BEHIND = 32  # tokens of a row that are computed at once where drafts were left out for a while

Choose = Callable[[Tensor, BoolVector], Counts]
"""Takes scores `(num_rows, vocab_size)`, and of which rows a token is wanted; returns `(num_rows,)` tokens."""


class EachFromItsEnd(Protocol):
    """Passes in which each row goes on from its own end, as `RaggedPasses`."""

    @property
    def ends(self) -> Counts:
        """`(num_rows,)` how much of each row is computed."""

    def run(self, tokens: Counts, counts: Counts) -> Tensor:
        """Compute the next `counts[row]` of `(num_rows, num_new)` tokens; `(num_rows, num_new, vocab_size)`."""

    def cut(self, ends: Counts) -> None:
        """Take back what was computed of each row from there on."""


class Known(Protocol):
    """Tokens of rows, as `Text`."""

    @property
    def known(self) -> Counts:
        """`(num_rows,)` how many are known."""

    def at(self, begins: Counts, num_columns: int) -> Counts:
        """`(num_rows, num_columns)` tokens of each row from its one of `begins` on; whatever behind those known."""


class Ahead:
    """Has a model guess what follows the tokens that are known of rows.

    Args:
        passes: of the model.
        text: what is known.
    """

    def __init__(self, passes: EachFromItsEnd, text: Known) -> None:
        self._passes = passes
        self._text = text
        self._guesses = np.zeros((len(text.known), 0), dtype=np.int64)
        self._begins = text.known.copy()  # of the guesses

    def go_on(self, counts: Counts, choose: Choose) -> Counts:
        """Guess `counts[row]` tokens of each row; return `(num_rows, max_guessed)`, valid up to `counts`.

        Raises:
            OutOfPagesError: if the pool of the model has too few pages.
        """
        self.take_back()
        logits = self._catch_up(counts > 0)
        self._begins = self._text.known.copy()
        self._guesses = tokens = np.zeros((len(counts), int(counts.max())), dtype=np.int64)
        for done in range(tokens.shape[1]):
            if done:
                logits = self._passes.run(tokens[:, done - 1 : done], (counts > done).astype(np.int64))[:, 0]
            tokens[:, done] = choose(logits, counts > done)
        return tokens

    def take_back(self) -> None:
        """Take back what was computed of guesses that did not come true, or of which that is not known.

        Of each row the last token that is known is computed again, as what follows it is to be guessed.
        """
        num_guessed = self._guesses.shape[1]
        places = self._begins[:, None] + np.arange(num_guessed)
        is_right = (self._text.at(self._begins, num_guessed) == self._guesses) & (places < self._text.known[:, None])
        num_right = np.logical_and.accumulate(is_right, axis=1).sum(axis=1)
        ends = np.minimum(self._passes.ends, self._text.known - 1)
        self._passes.cut(np.where(ends > self._begins, np.minimum(ends, self._begins + num_right), ends))

    def _catch_up(self, are_wanted: BoolVector) -> Tensor:
        """Compute what is known of some rows, and return `(num_rows, vocab_size)` behind their last tokens."""
        passes, text = self._passes, self._text
        while True:
            missing = np.where(are_wanted, text.known - passes.ends, 0)
            counts = np.minimum(missing, _MAX_BEHIND)
            logits = passes.run(text.at(passes.ends, int(counts.max())), counts)
            if (counts == missing).all():
                return logits[np.arange(len(counts)), np.maximum(counts, 1) - 1]


class Assistant:
    """Has a model decode ahead, with a cache of its own.

    Args:
        model: drafts.
        text: of the rows.
        inputs: of the model that decides, with its cache.
        processors: what changes that one's scores. Those that look at scores alone change the draft's, too, so that
            both agree on what is likely.
        is_random: whether to sample.
        cost: as `Drafter.cost`.
    """

    def __init__(
        self, model: Any, text: Text, inputs: dict[str, Any], processors: Any, is_random: bool, cost: float
    ) -> None:
        self.cost = cost
        self._model = model
        self._text = text
        self._mask = prompt_mask(text, inputs)
        # The class that is above this room.
        kind, pool = type(cache_in(inputs)), cache_in(inputs).pool
        self._cache = kind.from_model(model, page_size=pool.page_size)
        self._processors = of_scores(processors)
        self._is_random = is_random
        self._passes: RaggedPasses | None = None
        self._max_length = max_length(model)

    def available(self) -> Counts:
        """See `Drafter`."""
        return np.maximum(0, self._max_length - self._text.known)

    def foreseen(self) -> Counts:
        """See `Drafter`."""
        return np.full(len(self._text.ids), -1)

    def draft(self, counts: Counts) -> Drafts:
        """See `Drafter`."""
        if self._passes is None:
            self._passes = self._begin()
            self._ahead = Ahead(self._passes, self._text)
        drawn: list[Tensor] = []

        def choose(logits: Tensor, are_drafted: BoolVector) -> Counts:
            chosen, probabilities = self._choose(logits)
            if probabilities is not None:
                is_drafted = torch.from_numpy(are_drafted).to(probabilities.device)
                drawn.append((probabilities * is_drafted[:, None]).to(self._text.device))
            tokens: Counts = chosen.cpu().numpy()
            return tokens

        tokens = self._ahead.go_on(counts, choose)
        return Drafts(tokens, counts, torch.stack(drawn, dim=1) if drawn else None)

    def close(self) -> None:
        """See `Drafter`."""
        if self._passes is not None:
            self._passes.__exit__(None, None, None)
        self._cache.roll_back()
        self._cache.reset()

    def _begin(self) -> RaggedPasses:
        """Compute what all rows have at first: the prompt, and a token."""
        text, model = self._text, self._model
        ids = text.up_to(text.num_prompt + 1).to(model.device)
        mask = torch.ones_like(ids)
        if self._mask is not None:
            mask[:, : text.num_prompt] = torch.from_numpy(self._mask)
        self._cache.prefill(model, ids, mask)
        inputs = {
            CACHE: self._cache,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            "use_cache": True,
        }
        settings = model.generation_config
        is_compiled = model._valid_auto_compile_criteria(inputs, settings)
        forward = model.get_compiled_call(settings.compile_config) if is_compiled else model.__call__
        sequences = sequences_of(self._cache)
        assert sequences is not None  # it was made here
        return RaggedPasses(model, forward, sequences, inputs, ids).__enter__()

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self._is_random:
            return logits.argmax(dim=-1), None
        no_ids: Any = torch.zeros_like(logits[:, :1], dtype=torch.int64)
        scores = self._processors(no_ids, logits.to(torch.float32, copy=True))
        probabilities = torch.softmax(scores, dim=-1)
        return torch.multinomial(probabilities, num_samples=1)[:, 0], probabilities


def assisted(draft_model: PreTrainedModel, num_tokens: int = 5) -> "Assisted":
    """Decode with drafts of a smaller model: `model.generate(..., custom_generate=assisted(draft_model))`.

    One pass of the model decides on all tokens that the smaller one has drafted for each row, in batches of any size:
    each row keeps what was right of its own. Greedy decoding gives the tokens that it gives without drafts (as far as
    logits of several tokens in one pass round alike), and sampling draws from the same distribution. How many tokens
    are drafted follows from what came of the last ones, and from how large the models are; where the drafts are never
    right hardly any are.

    Both models are decoders with `attn_implementation="paged_flex"`; the one that decides has a `PagedCache`, which
    afterwards holds the tokens that are returned, but for the last. The other one gets a cache for each call, and is
    compiled within `compiled(draft_model)`. Processors and criteria of your own are as for `prompt_lookup`.
    `generate_many` takes it as well; there each prompt has the tokens of its seed.

    Args:
        draft_model: drafts; with the tokens of the other one.
        num_tokens: to draft at most for each row.

    Returns:
        What `generate()` takes as `custom_generate`.

    Raises:
        ValueError: if it can't draft, or `num_tokens` is less than 1. By `generate()`, before anything is computed:
            for models of different vocabularies, and what can't be done with drafts.
    """
    check_positive("num_tokens", num_tokens)
    draft: Any = model_in(draft_model, "assisted()")
    if draft.training or draft.config.is_encoder_decoder or draft.config._attn_implementation != NAME:
        raise ValueError(
            f"assisted() was given a {type(draft).__name__} that can't draft: it takes a decoder in evaluation mode "
            f"with attn_implementation={NAME!r}. Load it so, or call set_attn_implementation({NAME!r}) and eval()."
        )
    layer = recurrent_layer(draft.config)
    if layer is not None:
        raise ValueError(
            f"assisted() was given a {type(draft).__name__} that can't draft: {layer}, of which no token can be taken "
            "back. Take a draft model without such layers, or hf_paged.prompt_lookup()."
        )
    return Assisted(draft, num_tokens)


@dataclass(frozen=True)
class Assisted:
    """What `assisted` returns, with its arguments."""

    draft_model: PreTrainedModel
    num_tokens: int

    def __call__(self, model: PreTrainedModel, input_ids: Tensor, **arguments: Any) -> Any:
        """Decode as `hf_paged.sample` does, with drafts."""
        return speculate(self._make, self.num_tokens, model, input_ids, **arguments)

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError for a model with other tokens."""
        sizes = [each.config.get_text_config(decoder=True).vocab_size for each in (model, self.draft_model)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"A draft model with {sizes[1]} tokens was given for a model with {sizes[0]}, but both must have the "
                "same. Take one of the same family, or hf_paged.prompt_lookup()."
            )

    def cost(self, model: PreTrainedModel) -> float:
        """See `Drafter`."""
        num_weights = [sum(weight.numel() for weight in each.parameters()) for each in (self.draft_model, model)]
        return num_weights[0] / max(1, num_weights[1])

    def _make(self, model: Any, text: Text, inputs: dict[str, Any], processors: Any, config: Any) -> Assistant:
        self.check(model)
        if not text.num_prompt:
            raise ValueError(
                "A draft model was to go on from a prompt of embeddings, which are those of another model. Pass "
                "input_ids, or use hf_paged.prompt_lookup()."
            )
        return Assistant(self.draft_model, text, inputs, processors, bool(config.do_sample), self.cost(model))


def max_length(model: PreTrainedModel) -> int:
    """Tokens of a row for which a model has positions."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return 2**31 if limit is None else int(limit)
