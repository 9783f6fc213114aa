"""The loop: draft, compute all drafted tokens in one pass, keep those that are right."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from hf_paged._transformers import CACHE, arguments_of_generate, cache_in, is_synced, recurrent_layer
from hf_paged.attention.mask import NAME
from hf_paged.batch.padding import Counts
from hf_paged.batch.sequences import Sequences
from hf_paged.decoding.passes import Passes
from hf_paged.decoding.ragged_passes import RaggedPasses, check_ends_apart
from hf_paged.decoding.speculate.budget import Budget
from hf_paged.decoding.speculate.drafts import Drafter, Drafts
from hf_paged.decoding.speculate.ends import Ends
from hf_paged.decoding.speculate.text import Text
from hf_paged.decoding.speculate.verdict import Verdict
from hf_paged.decoding.surplus import sequences_of
from hf_paged.errors import OutOfPagesError

logger = logging.getLogger(__name__)

MakeDrafter = Callable[..., Drafter]
"""Takes a model, the text, the model's inputs with its cache, its processors, and how it generates."""

_EVERYTHING = "output_scores", "output_logits", "output_attentions", "output_hidden_states"
_CATCHING_UP = 32  # tokens of a row in a pass for which nobody waits


def speculate(
    make_drafter: MakeDrafter,
    num_tokens: int,
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> Any:
    """Decode with drafts, greedily or sampling; from `model` on arguments and result are those of `hf_paged.sample`.

    Args:
        make_drafter: makes what drafts.
        num_tokens: to draft at most for a row, at least 1.
        model: as for `hf_paged.sample`, as all that follow.
        input_ids: as there.
        logits_processor: as there.
        stopping_criteria: as there.
        generation_config: as there.
        synced_gpus: as there.
        streamer: as there.
        **model_kwargs: as there.

    Raises:
        ValueError: for what can't be done with drafts; nothing has been computed.
    """
    config: Any = generation_config
    arguments = arguments_of_generate(model)
    sequences = _check(model, config, synced_gpus or arguments.get("synced_gpus"), arguments, model_kwargs)
    streamer = streamer or arguments.get("streamer")
    text = Text(input_ids)
    ends = Ends(stopping_criteria, text, config._pad_token_tensor)
    verdict = Verdict(text, ends, logits_processor, config.do_sample)
    if verdict.is_in_step and len(input_ids) > 1:
        logger.warning(
            "All %d rows go on by as many tokens as the slowest one, since there are logits processors or stopping "
            "criteria that must be given all rows at once.",
            len(input_ids),
        )
    drafter = make_drafter(model, text, model_kwargs, logits_processor, config)
    passes = Passes(model, config, model_kwargs)
    outputs = passes.first(input_ids, packs=False)
    passes.update(outputs)
    streaming = _Streaming(streamer, text, ends)
    no_drafts = Drafts(np.zeros((len(input_ids), 0), dtype=np.int64), np.zeros(len(input_ids), dtype=np.int64))
    verdict.pass_on(outputs.logits[:, -1:].to(input_ids.device), no_drafts)
    del outputs
    streaming.go_on()
    try:
        if ends.length is None:
            with passes.optimized():
                ragged = RaggedPasses(model, passes.forward, sequences, passes.inputs, text.up_to(text.num_prompt + 1))
                with ragged:
                    try:
                        _decode(ragged, text, ends, verdict, drafter, num_tokens, streaming, no_drafts)
                    except BaseException:
                        ragged.give_up(text.known - 1)
                        raise
                    finally:
                        if ragged.have_all_ids:
                            _make_known(sequences, text)
    finally:
        drafter.close()
    assert ends.length is not None  # or the loop would go on
    ids = text.up_to(ends.length)
    passes.end(ids)
    if streamer is not None:
        streamer.end()
    if not config.return_dict_in_generate:
        return ids
    result: Any = GenerateDecoderOnlyOutput
    return result(sequences=ids, **{CACHE: passes.cache})


def _decode(
    passes: RaggedPasses,
    text: Text,
    ends: Ends,
    verdict: Verdict,
    drafter: Drafter,
    num_tokens: int,
    streaming: "_Streaming",
    no_drafts: Drafts,
) -> None:
    num_rows = len(text.ids)
    budget = Budget(1 if verdict.is_in_step else num_rows, num_tokens, num_rows, text.device, drafter.cost)
    while ends.length is None:
        wanted = _wanted(budget, drafter, text, ends, verdict.is_in_step)
        drafts = drafter.draft(wanted) if wanted.any() else no_drafts
        try:
            logits = _run(passes, text, ends, drafts, verdict.is_in_step)
        except OutOfPagesError:
            if not drafts.counts.any():
                raise
            drafts = no_drafts
            logits = _run(passes, text, ends, drafts, verdict.is_in_step)
        foreseen, before, were_going = drafter.foreseen(), text.known, ends.are_going
        accepted = verdict.pass_on(logits.to(text.device), drafts)
        del logits  # before the next ones are made
        is_right = text.next_to(before) == foreseen
        budget.note(drafts.counts, accepted, np.where(were_going & (foreseen >= 0), is_right, np.nan))
        computed = np.where(were_going, text.known - 1, passes.ends)  # behind that, others were chosen
        if ends.pads:
            text.fill_up(np.flatnonzero(ends.have_ended), ends.pad_token)
        passes.cut(np.minimum(np.minimum(passes.ends, computed), text.known - 1))
        streaming.go_on()
    _catch_up(passes, text, ends.length)


def _wanted(budget: Budget, drafter: Drafter, text: Text, ends: Ends, is_in_step: bool) -> Counts:
    """`(num_rows,)` how many tokens to draft."""
    going = ends.are_going
    room = ends.max_length - text.known if is_in_step else ends.room
    room = np.minimum(room - 1, budget.max_drafted)  # the last token is not drafted
    available = np.where(going, np.minimum(drafter.available(), room), 0).astype(np.int64)
    if is_in_step:
        least = available[going].min(keepdims=True)
        return np.where(going, budget.choose(least, np.ones(1, dtype=bool)), 0)
    return budget.choose(available, going)


def _run(passes: RaggedPasses, text: Text, ends: Ends, drafts: Drafts, is_in_step: bool) -> Tensor:
    """Compute the tokens that are known, and those that are drafted; rows that have ended keep pace."""
    going, begins = ends.are_going, passes.ends
    num_new = int(drafts.counts.max(initial=0)) + 1
    last = int((begins + drafts.counts + 1)[going].max())
    counts = np.where(going, drafts.counts + 1, np.clip(last - begins, 0, num_new))
    text.guess(drafts.tokens)
    text.pad(np.flatnonzero(~going), num_new, ends.pad_token)
    return passes.run(text.at(begins, num_new), counts)


def _catch_up(passes: RaggedPasses, text: Text, length: int) -> None:
    """Let all rows have been computed up to the last token."""
    passes.cut(np.minimum(passes.ends, length - 1))
    while (passes.ends < length - 1).any():
        counts = np.minimum(length - 1 - passes.ends, _CATCHING_UP)
        passes.run(text.at(passes.ends, int(counts.max())), counts)


def _make_known(sequences: Sequences, text: Text) -> None:
    """Note which ids the columns of the cache are, which are those of the text."""
    known, count = sequences.rows.known_ids, sequences.rows.columns.count
    if known.are_all(1):
        known.note(text.up_to(count).clone(), 0, count)  # what is returned is the caller's, who may change it


class _Streaming:
    """Gives a streamer each column as soon as all rows have it."""

    def __init__(self, streamer: Any, text: Text, ends: Ends) -> None:
        self._streamer = streamer
        self._text = text
        self._ends = ends
        self._done = text.num_prompt

    def go_on(self) -> None:
        """Give it the columns that are new."""
        if self._streamer is None:
            return
        end = int(self._text.known.min()) if self._ends.length is None else self._ends.length
        for column in range(self._done, end):
            self._streamer.put(torch.from_numpy(self._text.ids[:, column].copy()))
        self._done = max(self._done, end)


def _check(model: Any, config: Any, synced_gpus: Any, arguments: Any, inputs: dict[str, Any]) -> Sequences:
    mode = config.get_generation_mode(arguments.get("assistant_model"))
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"Drafts are for greedy decoding and sampling, but this call asks for {mode.value.replace('_', ' ')}. "
            "Leave out what asks for that (num_beams, assistant_model, prompt_lookup_num_tokens), or leave out "
            "custom_generate."
        )
    if synced_gpus or is_synced(model):
        raise ValueError(
            "Decoding with drafts was asked for synced_gpus=True, but it does not wait for other processes (FSDP, "
            "DeepSpeed ZeRO 3). Leave out synced_gpus, or leave out custom_generate."
        )
    wanted = [name for name in _EVERYTHING if config.return_dict_in_generate and getattr(config, name)]
    if wanted:
        raise ValueError(
            f"{', '.join(wanted)} was asked for, but passes over drafted tokens don't return what generate() has "
            "there. Leave it out, or use custom_generate=hf_paged.sample."
        )
    cache = cache_in(inputs)
    sequences = sequences_of(cache)
    if sequences is not None and sequences.pool.has_states:
        raise ValueError(
            f"Drafts need rows that can end in columns of their own, but of this {type(model).__name__} "
            f"{recurrent_layer(model.config)}, of which no token can be taken back. Leave out custom_generate."
        )
    if sequences is not None and not model.config.is_encoder_decoder:
        check_ends_apart(model)
    if sequences is None or model.config.is_encoder_decoder or not cache.is_compileable:
        raise ValueError(
            f"Drafts need a decoder with attn_implementation={NAME!r} and a PagedCache, whose rows can be of "
            f"different lengths, but {type(model).__name__} was given {type(cache).__name__}. Pass "
            f"past_key_values=PagedCache.from_model(model), of a model loaded with attn_implementation={NAME!r}."
        )
    return sequences
