"""What becomes of a tiny model with a `PagedCache`, beside `DynamicCache`."""

import copy
import logging
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache, GenerationConfig, PreTrainedModel

import hf_paged
from hf_paged import OutOfPagesError, PagedCache, compiled
from tests.models import left_padded, random_ids

PAGE_SIZE = 16
PROMPT, NEW_TOKENS = 18, 16  # while decoding a window of 12 leaves a page of 16 behind, and the second one is filled
LENGTHS = [PROMPT, 5, 11]
TURNS = [PROMPT, 9, 13]  # padded on the right by less than a window: what a query sees that sees nothing is anything
TOLERANCE = 2e-3  # of the largest logit of a step
AMPLIFIED = 0.05  # what rounding may become in a model that amplifies it
OF_TEXT = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
IN_EACH_STEP = {"image_attention_mask", "cross_attention_mask"}  # of models that look at an image in each step
PACKAGE = str(Path(hf_paged.__file__).parent)


class Compilations(logging.Handler):
    """Counts the graphs that the package says it compiles."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += record.getMessage().startswith("Compiling a model")


compilations = Compilations()
logging.getLogger("hf_paged.compile.api").addHandler(compilations)


class Outcome(StrEnum):
    """What becomes of a call that works with `DynamicCache`, best first."""

    SAME = "same tokens"
    REFUSED = "clear error"
    UNCLEAR = "unclear error"
    STUCK = "no end"
    WRONG = "wrong tokens"


@dataclass
class Finding:
    """What became of one call, and what was said."""

    outcome: Outcome
    message: str = ""
    where: str = ""

    def as_json(self) -> str | dict[str, str]:
        """The outcome alone, if there is nothing to add."""
        if not self.message:
            return str(self.outcome)
        return {name: str(value) for name, value in vars(self).items() if value}


@dataclass
class Subject:
    """A model set to some attention, the inputs for it by name, and what the oracle makes of them.

    Attributes:
        name: of its class.
        load: makes it, given an attention.
        attention: of the oracle.
        inputs: arguments of `generate()` for each case.
        expected: what the oracle generates in each case that works with it.
        refused: what the oracle says in each case that doesn't.
    """

    name: str
    load: Callable[[str | dict[str, str]], PreTrainedModel]
    attention: str
    inputs: dict[str, dict[str, Any]]
    expected: dict[str, "Generated"] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


@dataclass
class Generated:
    """Tokens `(num_rows, num_columns)`, and the logits of each step where beams don't mix them."""

    tokens: Tensor
    logits: list[Tensor]


def greedy(model: PreTrainedModel) -> GenerationConfig:
    """Greedy tokens, to the last; nothing of what the model's own generation configuration forbids or forces."""
    start = getattr(model.config, "decoder_start_token_id", None)
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        decoder_start_token_id=2 if start is None else start,
    )


def dynamic_cache(model: PreTrainedModel) -> Cache:
    """The oracle's cache."""
    config = model.config.get_text_config(decoder=True)
    decoder = DynamicCache(config=config)
    return EncoderDecoderCache(decoder, DynamicCache(config=config)) if model.config.is_encoder_decoder else decoder


def paged_cache(model: PreTrainedModel) -> Cache:
    return PagedCache.from_model(model, page_size=PAGE_SIZE)


def generate(model: PreTrainedModel, cache: Cache, inputs: dict[str, Any], **arguments: Any) -> Generated:
    """Greedy tokens and their logits."""
    inputs = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    arguments = {"max_new_tokens": NEW_TOKENS, "return_dict_in_generate": True, "output_logits": True} | arguments
    output = model.generate(**inputs, past_key_values=cache, **arguments)
    return Generated(output.sequences, list(output.logits or ()))


def second_turn(model: PreTrainedModel, cache: Cache, inputs: dict[str, Any]) -> Generated:
    """A first turn of three rows, and a second one whose shorter rows are padded on the right."""
    first = random_ids(3, 7, seed=5)
    ids = inputs["input_ids"]
    mask = left_padded(PROMPT, TURNS).flip(1)
    ids = ids.flip(1) * mask
    with torch.no_grad():
        model(first, past_key_values=cache, use_cache=True)
    inputs = {"input_ids": torch.cat([first, ids], 1), "attention_mask": torch.cat([torch.ones_like(first), mask], 1)}
    return generate(model, cache, inputs, max_new_tokens=4)


def beams(model: PreTrainedModel, cache: Cache, inputs: dict[str, Any]) -> Generated:
    found = generate(model, cache, inputs, num_beams=2)
    return Generated(found.tokens, [])


def forked(model: PreTrainedModel, cache: Cache, inputs: dict[str, Any]) -> Generated:
    """Two continuations of copies of one prompt's cache; the second one's."""
    ids = inputs["input_ids"]
    with torch.no_grad():
        model(ids[:, :11], past_key_values=cache, use_cache=True)
    other = copy.deepcopy(cache)
    generate(model, cache, {"input_ids": ids}, max_new_tokens=4)
    return generate(model, other, {"input_ids": torch.cat([ids[:, :11], ids[:, 11:].flip(1)], 1)}, max_new_tokens=8)


WAYS: dict[str, Callable[[PreTrainedModel, Cache, dict[str, Any]], Generated]] = {
    "right-padded turn": second_turn,
    "beams": beams,
    "fork": forked,
}


def run(model: PreTrainedModel, cache: Cache, case: str, inputs: dict[str, Any]) -> Generated:
    return WAYS.get(case, generate)(model, cache, inputs)


def forget(model: PreTrainedModel) -> None:
    """Drop what a model keeps of the prompt of another case."""
    for module in model.modules():
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None


@dataclass
class Difference:
    """How two runs differ: in words, empty if they don't, and by how much of the largest logit at most."""

    text: str
    gap: float = float("inf")


def difference(expected: Generated, found: Generated, tolerance: float = TOLERANCE) -> Difference:
    """Compare the logits of every step, of each row for as long as its tokens are the same.

    Tokens may part where two logits are as good as equal; what follows is not compared.
    """
    if not expected.logits:
        return Difference("" if torch.equal(expected.tokens, found.tokens) else "other sequences")
    if len(expected.logits) != len(found.logits):
        return Difference(f"{len(found.logits)} steps instead of {len(expected.logits)}")
    num_rows = len(expected.tokens)
    alive = torch.ones(num_rows, dtype=torch.bool)
    largest = 0.0
    for step, (wanted, given) in enumerate(zip(expected.logits, found.logits, strict=True)):
        if wanted.shape != given.shape:
            return Difference(f"logits {tuple(given.shape)} instead of {tuple(wanted.shape)} at step {step}")
        same = (wanted.argmax(-1) == given.argmax(-1)).reshape(num_rows, -1).all(-1)
        finite = torch.isfinite(wanted)
        size = wanted.masked_fill(~finite, 0).abs().amax(-1).clamp(min=1e-6)
        gaps = ((wanted - given).masked_fill(~finite, 0).abs().amax(-1) / size).reshape(num_rows, -1).amax(-1)
        bad = alive & ~(gaps < tolerance)
        if bad.any():
            row = int(bad.nonzero()[0])
            what = "logits" if same[row] else "tokens"
            gap = float(gaps[row])
            return Difference(f"{what} differ at step {step}, row {row}, by {gap:.2g} of the largest logit", gap)
        largest = max(largest, float(gaps[alive].max()) if alive.any() else 0.0)
        alive &= same
    return Difference("", largest)


def compare(subject: Subject, case: str, found: Generated) -> Finding:
    """Judge tokens by the oracle's.

    Some models amplify rounding: a small difference counts only if it is larger than that between two right
    computations, the oracle with `sdpa` and the oracle with `eager`. Of some, Transformers itself computes something
    else with `sdpa` than with `eager`: either will do.
    """
    expected = subject.expected[case]
    plain = difference(expected, found)
    if not plain.text:
        return Finding(Outcome.SAME)
    if subject.attention == "sdpa":
        try:
            model = subject.load("eager")
            other = run(model, dynamic_cache(model), case, subject.inputs[case])
        except Exception:  # has no eager attention, or one that fails
            return Finding(Outcome.WRONG, plain.text)
        if not difference(other, found).text:
            return Finding(Outcome.SAME, "as with `eager`: with `sdpa` Transformers computes something else")
        noise = difference(expected, other, AMPLIFIED).gap
        if not difference(expected, found, max(TOLERANCE, min(10 * noise, AMPLIFIED))).text:
            return Finding(Outcome.SAME, "within the rounding between `sdpa` and `eager`")
    return Finding(Outcome.WRONG, plain.text)


def reused(subject: Subject, case: str, found: Generated) -> Difference:
    """How tokens differ from the oracle's with a prompt that it holds but for the last column."""
    model = subject.load(subject.attention)
    cache = dynamic_cache(model)
    cache.activate_past_recording()
    model.generate(**subject.inputs[case], past_key_values=cache, max_new_tokens=1)
    cache.crop(-1)
    inputs = {name: value for name, value in subject.inputs[case].items() if name in OF_TEXT}
    return difference(run(model, cache, case, inputs), found)


def attempt(call: Callable[[], Finding]) -> Finding:
    """What a call finds, or its error."""
    try:
        return call()
    except Exception as error:
        return judged(error)


def judged(error: Exception) -> Finding:
    """A clear error is a ValueError of the package's own, raised by its own code."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1]
    own = last.filename.startswith(PACKAGE)
    message = " ".join(f"{type(error).__name__}: {error}".split())[:600]
    where = f"{'/'.join(Path(last.filename).parts[-2:])}:{last.lineno}"
    clear = own and isinstance(error, (ValueError, OutOfPagesError))
    return Finding(Outcome.REFUSED if clear else Outcome.UNCLEAR, message, where)


def ask_oracle(subject: Subject, modes: list[str]) -> None:
    """Let the oracle generate in every case of these modes."""
    model = subject.load(subject.attention)
    for case, inputs in subject.inputs.items():
        if any(case in MODES[mode][1] for mode in modes):
            forget(model)
            try:
                subject.expected[case] = run(model, dynamic_cache(model), case, inputs)
            except Exception as error:
                subject.refused[case] = judged(error).message


def stored(cache: Cache) -> bool:
    """Whether a decoder has put anything into its cache."""
    decoder = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    return decoder.get_seq_length() > 0


# Those of "turns" have several queries over a cache that isn't empty, for which a kernel is compiled.
MODES: dict[str, tuple[str, list[str]]] = {
    "uncompiled": ("paged_flex", ["row", "batch", "image", "sound", "beams"]),
    "turns": ("paged_flex", ["right-padded turn", "fork"]),
    "prefill": ("paged_flex", ["row", "batch", "image", "sound"]),
    "compiled": ("paged_flex", ["row", "image", "sound"]),
    "gathered": ("", ["row", "batch", "image", "sound", "beams"]),
}
"""Attention, that of the oracle if empty, and cases of each mode."""


def check(subject: Subject, mode: str) -> dict[str, Finding]:
    """Compare the cases of a mode with what the oracle made of them; those that it refuses count if we do, too."""
    attention, cases = MODES[mode]
    try:
        model, note = load(subject, attention or subject.attention)
    except Exception as error:
        return {"load": judged(error)}
    findings = {case: attempt(partial(find, subject, model, case, mode)) for case in cases if case in subject.inputs}
    for finding in findings.values():
        finding.message = finding.message or note
    return {
        case: finding
        for case, finding in findings.items()
        if case in subject.expected or finding.outcome == Outcome.REFUSED
    }


def load(subject: Subject, attention: str) -> tuple[PreTrainedModel, str]:
    """Make the model; where its eye looks its attention up by name, with another one there, and say so."""
    try:
        return subject.load(attention), ""
    except KeyError:
        model = subject.load({"text_config": attention})
        if model.config.get_text_config(decoder=True)._attn_implementation != attention:
            raise
        return model, f'loaded with `attn_implementation={{"text_config": "{attention}"}}`'


def find(subject: Subject, model: PreTrainedModel, case: str, mode: str) -> Finding:
    """Run a case with a `PagedCache`."""
    inputs, cache = subject.inputs[case], paged_cache(model)
    compilations.count = 0
    forget(model)
    with compiled(model) if mode == "compiled" else nullcontext():
        if mode == "prefill":
            cache.prefill(model, **inputs)
            if not (IN_EACH_STEP | set(signature(model.generate).parameters)) & inputs.keys():
                inputs = {name: value for name, value in inputs.items() if name in OF_TEXT}
        found = run(model, cache, case, inputs)
    judgement = compare(subject, case, found) if case in subject.expected else Finding(Outcome.SAME)
    if mode == "prefill" and judgement.outcome == Outcome.WRONG and not reused(subject, case, found).text:
        return Finding(Outcome.SAME, "as DynamicCache in two passes, which are not one to this model")
    if judgement.outcome == Outcome.WRONG or judgement.message:
        return judgement
    if mode == "compiled" and case == "row" and compilations.count == 0:
        return Finding(Outcome.SAME, "nothing was compiled")
    return Finding(Outcome.SAME, "" if stored(cache) else "nothing is kept in the cache")
