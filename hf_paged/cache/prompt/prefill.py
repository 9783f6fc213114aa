"""Prefill: a prompt computed without its padding, in chunks of bounded size, where no more than that is wanted of it.

`generate()` itself prepares the prompt, as it would do before its first pass. What it then would give the model says,
with the model, whether rows and columns are told apart by causality, positions and padding alone: these can be told of
packed rows, too. Otherwise the first pass of `generate()` is made as it is, and its last column taken back.
"""

import copy
import logging
from functools import cache as once
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from hf_paged._torch.dynamo import let_vary
from hf_paged._torch.host_memory import give_back_freed
from hf_paged._transformers import CACHE, decoder_of, model_in
from hf_paged.batch.padding import Counts
from hf_paged.batch.prompt.packed_prompt import PackedPrompt
from hf_paged.batch.sequences import Sequences
from hf_paged.batch.steps.packed import Chunk
from hf_paged.cache.layer import layers_over
from hf_paged.cache.prompt import checks
from hf_paged.cache.prompt.by_row import compute_by_row
from hf_paged.cache.prompt.checks import check_rotary, ends_in_padding
from hf_paged.cache.prompt.origin import origin_of_prompt
from hf_paged.cache.prompt.packable import check_model, check_prompt
from hf_paged.cache.prompt.resume import is_other_prompt, keep_columns, kept_lengths, note_generating
from hf_paged.compile.api import MIN_TOKENS, Filling, compiled_filling
from hf_paged.errors import NotPackable, OutOfPagesError

if TYPE_CHECKING:
    from hf_paged.cache.paged import PagedCache

logger = logging.getLogger(__name__)

_TOLERANCE = 0.05  # of the largest score: above what rounding makes in 16 bit, far below what other positions make
_PADDING = 0.1  # of a prompt, above which it is worth a pass more to compute none
_BY_COLUMN = {"attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids"}
_CHUNK_ON_CPU, _CHUNK = 1536, 4096  # tokens at a time; a GPU takes as long for a few hundred


def usual_chunk(device: torch.device) -> int:
    """Tokens at a time where nobody says how many."""
    return _CHUNK_ON_CPU if device.type == "cpu" else _CHUNK


def prefill(
    model: PreTrainedModel,
    cache: "PagedCache",
    input_ids: Tensor,
    attention_mask: Tensor | None,
    max_tokens: int | None,
    inputs: dict[str, Any],
    *,
    resumes: bool = False,
) -> None:
    """Compute all columns but the last one; if that fails, nothing has changed.

    Where the cache is known to hold another prompt, each row keeps what it has in common with this one.

    Args:
        model: a decoder, or a model that has one.
        cache: what to fill.
        input_ids: `(num_rows, num_columns)`, those that are cached included.
        attention_mask: like `input_ids`, 0 for padding; None for what `generate()` makes of that.
        max_tokens: tokens of a chunk; None for as many as keep the device busy.
        inputs: what else `generate()` is to give the model.
        resumes: whether it must be known what the cache holds.

    Raises:
        OutOfPagesError: if the pool has too few pages.
        ValueError: for arguments that don't fit the cache, or a model that can't be prefilled.
    """
    model = model_in(model, "prefill()")
    sequences = cache._sequences
    checks.check_tensor(input_ids)
    if max_tokens is None:
        max_tokens = usual_chunk(input_ids.device)
    checks.check_fits(model, sequences)
    checks.check_arguments(model, inputs)
    sequences.end_step()
    checks.check_ids(input_ids, attention_mask, max_tokens)
    checks.check_end(sequences, attention_mask)
    is_other = is_other_prompt(sequences, input_ids, attention_mask, must_know=resumes)
    num_cached, num_columns = 0 if is_other else sequences.rows.columns.count, input_ids.shape[1]
    checks.check_is_longer(input_ids, num_cached)
    if num_columns == num_cached + 1:
        if is_other:
            sequences.clear()
        return
    filled = cache.fork()
    if is_other:
        filled.reset()  # generate() is to prepare the whole prompt
    given_inputs = {name: value for name, value in inputs.items() if value is not None}
    was_called, scores = False, None

    def compute(
        generating: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **inputs: Any,
    ) -> Tensor:
        nonlocal was_called, scores
        was_called = True
        mask, kept = inputs.get("attention_mask"), None
        if is_other:
            kept = kept_lengths(generating, sequences, input_ids, mask)
            if given_inputs or sequences.pool.has_states:
                kept[:] = 0  # what made the tokens that are cached was ids alone; no state goes back
        try:
            _compute_packed(generating, sequences, filled._sequences, input_ids, inputs, max_tokens, kept)
        except NotPackable as reason:
            _say(type(generating).__name__, str(reason))
            filled._sequences.become_fork_of(sequences)
            if kept is None:
                filled._sequences.rows.supersede(sequences.rows)
            else:
                keep_columns(filled._sequences, kept, input_ids, mask)
            scores = _compute_padded(generating, sequences, filled._sequences, input_ids, generation_config, inputs)
        return input_ids

    given: Any = model
    generate = partial(given.generate, input_ids=input_ids, attention_mask=attention_mask)
    settings = first_pass_settings(model, num_columns)
    try:
        generate(generation_config=settings, custom_generate=compute, **{CACHE: filled}, **given_inputs)
        if not was_called:
            raise ValueError(
                f"{type(model).__name__} generates in a way of its own. Leave out cache.prefill(): generate() "
                "computes the prompts of this model by itself."
            )
        if scores is not None and not given_inputs:  # images, for one, are not given again
            check = partial(_check_going_on, scores)
            trial = filled.fork()
            try:
                generate(generation_config=settings, custom_generate=check, **{CACHE: trial})
                is_tried = True
            except OutOfPagesError:
                is_tried = False
            finally:
                trial._sequences.clear()
            if not is_tried:  # in the pages that there are; equal rows then no longer share their last one
                filled._sequences.records_past = True
                generate(generation_config=settings, custom_generate=check, **{CACHE: filled})
                filled._sequences.truncate(num_columns - 1, keeps_past=sequences.records_past)
        sequences.exchange(filled._sequences)
    finally:
        filled._sequences.clear()


def prefill_prepared(
    model: PreTrainedModel, sequences: Sequences, input_ids: Tensor, inputs: dict[str, Any], *, packs: bool
) -> None:
    """Compute all columns but the last one packed, where that pays; else compute nothing.

    It pays where the pool has a prefix index, a tenth of the prompt is padding, or it is longer than a chunk. What it
    costs is a pass of its own for the last column, and bits: keys are those of `generate()` but for rounding. Of a
    single row that a prefix index leaves no more than a chunk of, nothing is computed: the next pass does.

    Args:
        model: that generates.
        sequences: the rows.
        input_ids: `(num_rows, num_columns)`.
        inputs: what else `generate()` has prepared for the model.
        packs: whether it pays without a prefix index, too.

    Raises:
        OutOfPagesError: if the pool has too few pages; nothing has changed.
    """
    sequences.end_step()
    if not sequences.rows.are_empty or input_ids.shape[1] == 1 or not _pays(sequences, input_ids, inputs, packs):
        return
    if sequences.pool.has_states and ends_in_padding(inputs):
        return  # a state takes a token in that comes alone, hidden or not
    filled = Sequences(sequences.pool)
    filled.become_fork_of(sequences)
    try:
        chunk = usual_chunk(input_ids.device)
        _compute_packed(model, sequences, filled, input_ids, inputs, chunk, leaves_rest=True)
        sequences.exchange(filled)
        if ends_in_padding(inputs):
            sequences.rows.origin = None
    except NotPackable as reason:
        _say_missed(type(model).__name__, str(reason))
    finally:
        filled.clear()


def _pays(sequences: Sequences, input_ids: Tensor, inputs: dict[str, Any], packs: bool) -> bool:
    if sequences.pool.prefix_index is not None or not packs:
        return sequences.pool.prefix_index is not None
    mask: Tensor | None = inputs.get("attention_mask")
    is_padded = mask is not None and bool(mask.float().mean() < 1 - _PADDING)
    return is_padded or input_ids.numel() > usual_chunk(input_ids.device)


def _check_going_on(
    scores: Tensor,
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **inputs: Any,
) -> Tensor:
    """Compare what the last column gives by itself, over a prefilled cache, with what it gave with all others.

    A model that is not packed may make positions, or anything else, of the columns of a pass alone.
    """
    found = model._prefill(input_ids, generation_config, inputs).logits[:, -1]  # type: ignore[operator]
    if (found - scores).abs().max() > _TOLERANCE * scores.abs().max():
        raise ValueError(
            f"{type(model).__name__} gives the last token of this prompt other scores if the tokens before it are "
            "cached, so its prompts can't be prefilled. Leave out cache.prefill(): generate() computes them by itself."
        )
    return input_ids


def _compute_packed(
    model: PreTrainedModel,
    sequences: Sequences,
    filled: Sequences,
    input_ids: Tensor,
    inputs: dict[str, Any],
    max_tokens: int,
    kept: Counts | None = None,
    *,
    leaves_rest: bool = False,
) -> None:
    """Compute the prompt packed, but for what is `kept` of another one, and let `filled` hold it.

    Args:
        model: that generates.
        sequences: the rows.
        filled: what is to hold the prompt.
        input_ids: `(num_rows, num_columns)`.
        inputs: what else `generate()` has prepared for the model.
        max_tokens: tokens of a chunk.
        kept: `(num_rows,)` first tokens of each row that stay of another prompt.
        leaves_rest: whether a pass follows over all columns that `filled` does not hold then.
    """
    if sequences.pool.has_states and sequences.pool.prefix_index is not None:
        return compute_by_row(model, sequences, filled, input_ids, inputs, max_tokens, is_new=kept is not None)
    decoder = check_model(model)
    num_cached, num_columns = sequences.rows.columns.count if kept is None else 0, input_ids.shape[1]
    check_prompt(model, layers_over(filled), input_ids, inputs, num_cached)
    attention_mask = inputs.get("attention_mask")
    origin = origin_of_prompt(model, sequences)
    filled.clear()  # or else its pages would be copied, as shared ones
    mask = None if attention_mask is None else attention_mask[:, :-1]
    packed = PackedPrompt(sequences, input_ids[:, :-1], mask, max_tokens, kept, origin)
    try:
        check_rotary(decoder, packed.longest)
        end = packed.end_where_found() if leaves_rest else None
        while packed.next_wave():
            _compute_wave(model, decoder, packed, max_tokens, input_ids.device)
        packed.unpack()
        packed.sequences.rows.known_ids.note(input_ids.clone(), num_cached, num_columns - 1 if end is None else end)
        filled.exchange(packed.sequences)
    finally:
        packed.close()


def _compute_wave(
    model: PreTrainedModel,
    decoder: torch.nn.Module,
    packed: PackedPrompt,
    max_tokens: int,
    device: torch.device,
) -> None:
    cache = Cache(layers=layers_over(packed.sequences))
    num_tokens, began = packed.num_tokens, perf_counter()
    for first in range(0, num_tokens, max_tokens):
        num_queries = min(max_tokens, num_tokens - first)
        fill = compiled_filling(decoder) if _is_compiled(num_queries, max_tokens) else None
        if fill is not None:
            num_queries = max(num_queries, MIN_TOKENS)
        chunk = packed.begin(first, num_queries)
        _run(model, fill, cache, chunk, num_queries, device)
        packed.end()
        num_freed = num_queries if first + max_tokens < num_tokens else num_tokens
        if device.type == "cpu" and num_freed >= _CHUNK_ON_CPU:
            give_back_freed()  # what activations leave in C's heap while the pages fill up
    if packed.speeds is not None:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        packed.speeds.note_computed(num_tokens, perf_counter() - began)


def _compute_padded(
    model: PreTrainedModel,
    sequences: Sequences,
    filled: Sequences,
    input_ids: Tensor,
    generation_config: Any,
    inputs: dict[str, Any],
) -> Tensor | None:
    """Let `generate()` make its first pass over `filled`, a fork of `sequences`, and take the last column back.

    A state can't be taken back, so that with recurrent layers the pass leaves this column out.

    Args:
        model: that generates.
        sequences: the rows.
        filled: what the pass goes on from.
        input_ids: `(num_rows, num_columns)`.
        generation_config: of the call.
        inputs: what else it has prepared for the model.

    Returns:
        `(num_rows, vocab_size)` scores of the last column; None if there are none.
    """
    takes_back = not sequences.pool.has_states
    if not takes_back:
        input_ids, inputs = input_ids[:, :-1], _without_last_column(input_ids, inputs)
    num_columns = input_ids.shape[1]
    filled.records_past = takes_back
    note_generating(filled, model, input_ids, inputs)
    scores = getattr(model._prefill(input_ids, generation_config, inputs), "logits", None)  # type: ignore[operator]
    filled.end_step()
    if filled.rows.columns.count != num_columns:
        raise ValueError(
            f"{type(model).__name__} was given {num_columns} ids, after which the cache held "
            f"{filled.rows.columns.count} columns, so that generate() could not go on from there. Leave out "
            "cache.prefill(): generate() computes this prompt by itself."
        )
    if not takes_back:
        filled.records_past = sequences.records_past
        return None
    filled.truncate(num_columns - 1, keeps_past=sequences.records_past)
    return None if scores is None else scores[:, -1]


def _without_last_column(input_ids: Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a model beside its ids, for all columns but the last one."""
    given = {"attention_mask": torch.ones_like(input_ids)}
    given |= {name: value for name, value in inputs.items() if value is not None}
    return {name: value[..., :-1] if name in _BY_COLUMN else value for name, value in given.items()}


@once
def _say(name: str, reason: str) -> None:
    logger.warning("prefill() computes the prompt of %s at once and padded, as generate() does: %s.", name, reason)


@once
def _say_missed(name: str, reason: str) -> None:
    logger.warning("The prompt of %s is computed at once and padded, as generate() does: %s.", name, reason)


def first_pass_settings(model: PreTrainedModel, num_columns: int) -> GenerationConfig:
    """The settings of the model, but for what is asked of `generate()` beside its first pass."""
    settings: Any = copy.deepcopy(model.generation_config)
    if settings.max_new_tokens is None:
        settings.max_length = num_columns + 1
    settings.min_length = 0
    settings.num_beams = settings.num_return_sequences = 1
    settings.do_sample = settings.return_dict_in_generate = settings.output_attentions = False
    settings.output_hidden_states = settings.output_scores = settings.output_logits = False
    settings.use_cache = True
    return settings  # type: ignore[no-any-return]


def _is_compiled(num_tokens: int, max_tokens: int) -> bool:
    """Whether a chunk is for a compiled model, filled up if a few tokens are missing. Many would cost too much."""
    return max_tokens >= MIN_TOKENS and 4 * num_tokens >= 3 * MIN_TOKENS


@torch.no_grad()
def _run(
    model: PreTrainedModel,
    fill: Filling | None,
    cache: Cache,
    chunk: Chunk,
    num_queries: int,
    device: torch.device,
) -> None:
    """Let the decoder, compiled or not, compute a chunk, filled up with tokens of no row to `num_queries`."""
    ids, positions = torch.zeros((2, 1, num_queries), dtype=torch.int64)
    ids[0, : len(chunk.ids)] = torch.from_numpy(chunk.ids)
    positions[0, : len(chunk.ids)] = torch.from_numpy(chunk.places)
    inputs: dict[str, Any] = {"input_ids": ids.to(device), "position_ids": positions.to(device)}
    if fill is not None:
        for tensor in (inputs["input_ids"], inputs["position_ids"]):
            let_vary(tensor, 1)
        # Outside of the graph, as generate() does.
        arguments: dict[str, Any] = {CACHE: cache, "attention_mask": None, "position_ids": inputs["position_ids"]}
        shape = torch.empty((1, num_queries, 0), dtype=model.dtype, device=device)
        inputs["attention_mask"] = create_masks_for_generate(config=model.config, inputs_embeds=shape, **arguments)
    run = fill or decoder_of(model)
    run(**inputs, **{CACHE: cache}, use_cache=True)
