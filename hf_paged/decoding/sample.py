"""Greedy decoding and sampling, a step ahead of the device.

`generate()` waits for each token before it prepares the next step, so that on a GPU host and device take turns. But
nothing that is prepared depends on which token it was, except whether there is a next step at all. So the next step is
launched first, and whether it was needed is read while it runs; a pass that was not is taken back.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer

from hf_paged._transformers import arguments_of_generate, cache_in, is_synced
from hf_paged.decoding.ends import Ends
from hf_paged.decoding.passes import Passes
from hf_paged.decoding.record import Record
from hf_paged.decoding.stopping import leave_models_alone
from hf_paged.decoding.surplus import Surplus
from hf_paged.errors import OutOfPagesError

_REMEDIES = {
    GenerationMode.BEAM_SEARCH: "num_beams",
    GenerationMode.BEAM_SAMPLE: "num_beams",
    GenerationMode.ASSISTED_GENERATION: "assistant_model and prompt_lookup_num_tokens",
}


def sample(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: BaseStreamer | None = None,
    *,
    packs_prompt: bool = False,
    **model_kwargs: Any,
) -> Any:
    """Decode without waiting for the device: `model.generate(..., custom_generate=hf_paged.sample)`.

    What is returned is what `generate()` returns without it, token by token, greedy or sampled. On a GPU each pass is
    launched while the one before runs, and whether rows have ended is read meanwhile. So a pass behind the last token
    is made and taken back: hooks see it, and streamers and criteria of your own are called when it is under way.
    Elsewhere no pass is made before it is known to be needed.

    Afterwards the cache holds the tokens that are returned, but for the last.

    Args:
        model: any model that has `generate()`, with any cache or none.
        input_ids: `(num_rows, num_columns)`, the prompt.
        logits_processor: what changes scores.
        stopping_criteria: what ends rows.
        generation_config: how to generate.
        synced_gpus: must be False.
        streamer: is given each token once the next pass is launched; None for the one that `generate()` was given.
        packs_prompt: whether a `PagedCache` computes a prompt packed, also without a prefix index, if much of it is
            padding or it is longer than a chunk, as `PagedCache.prefill` would.
        **model_kwargs: what the model is given, with its cache.

    Returns:
        `(num_rows, num_columns + num_new)` ids; with `return_dict_in_generate` what `generate()` returns then.

    Raises:
        ValueError: for a mode that is neither greedy decoding nor sampling; nothing has been computed.
    """
    config: Any = generation_config
    arguments = arguments_of_generate(model)
    _check(model, config, synced_gpus or arguments.get("synced_gpus"), arguments.get("assistant_model"))
    streamer = streamer or arguments.get("streamer")
    record = Record(config, model_kwargs["encoder_outputs"] if model.config.is_encoder_decoder else None)
    called = [logits_processor, *logits_processor, stopping_criteria, *stopping_criteria]
    is_alone = leave_models_alone(called if streamer is None else [*called, streamer])
    passes = Passes(model, config, model_kwargs, is_alone=is_alone)
    outputs = passes.first(input_ids, packs=packs_prompt)
    surplus = Surplus(cache_in(outputs), bool(config.return_dict_in_generate), model, input_ids)
    ends = Ends(stopping_criteria, streamer, input_ids, config._pad_token_tensor, surplus.is_possible)
    with passes.optimized(), surplus:
        while True:
            passes.update(outputs)
            tokens = ends.padded(_choose(record.add(outputs, input_ids, logits_processor), config.do_sample))
            outputs = None  # so that its logits are freed before the next ones are made
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
            ends.ask(input_ids, record.scores, tokens)
            is_last = input_ids.shape[1] >= ends.max_length
            if is_last or not surplus.is_possible:
                if ends.are_reached() or is_last:
                    break
                outputs = passes.next(input_ids)
                continue
            try:
                outputs = passes.next(input_ids)
            except Exception as error:
                if ends.are_reached() and surplus.forget():
                    break
                if not isinstance(error, OutOfPagesError):
                    raise
            if outputs is None:  # rows that have ended may have made room
                outputs = passes.next(input_ids)
            elif surplus.decide(ends.are_reached):
                break
    passes.end(input_ids)
    if streamer is not None:
        streamer.end()
    return record.result(input_ids, passes.cache) if config.return_dict_in_generate else input_ids


def _choose(scores: Tensor, is_random: bool) -> Tensor:
    """`(num_rows,)` tokens for scores `(num_rows, vocab_size)`."""
    if is_random:
        return torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
    return scores.argmax(dim=-1)


def _check(model: PreTrainedModel, config: Any, synced_gpus: Any, assistant: Any) -> None:
    mode = config.get_generation_mode(assistant)
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"hf_paged.sample decodes greedily and samples, but this call asks for {mode.value.replace('_', ' ')}. "
            f"Leave out {_REMEDIES.get(mode, 'what asks for that')}, or leave out custom_generate."
        )
    if synced_gpus or is_synced(model):
        raise ValueError(
            "hf_paged.sample was asked for synced_gpus=True, but it does not wait for other processes (FSDP, "
            "DeepSpeed ZeRO 3). Leave out synced_gpus, or leave out custom_generate."
        )
