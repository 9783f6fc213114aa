"""The same examples answered from each cache, and what the answers and times come to."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_paged._transformers import CACHE
from hf_paged.tools.lab.baseline import Baseline
from hf_paged.tools.lab.baselines import CACHES, line_up
from hf_paged.tools.lab.memory import kv_bytes
from hf_paged.tools.lab.model import MeasuredModel, padded
from hf_paged.tools.lab.options import count, counts, names, option
from hf_paged.tools.long_context.example import Example, Task
from hf_paged.tools.long_context.longbench import LONGBENCH_V2
from hf_paged.tools.long_context.tasks import OFFLINE
from hf_paged.tools.progress import progress

TASKS = {task.name: task for task in (*OFFLINE, LONGBENCH_V2)}
"""By name."""


@dataclass(frozen=True)
class Settings:
    """What is asked of the model, and how; at least one of each, at least 1.

    Attributes:
        tasks: names out of passkey, documents, copy and longbench-v2.
        contexts: the most tokens of a prompt.
        limit: examples of each task and context.
        caches: names out of dynamic, paged and static; the others' answers are compared with those of the first.
        page_size: tokens per page of the paged caches.
        batch_size: examples that are answered at once, padded on the left.
        chunk_size: tokens of a prompt that are computed at once, which bounds the memory of the activations;
            None: all.
        max_new_tokens: of each answer; None: the task's own.
        seed: of the tasks that are made here.
    """

    tasks: tuple[str, ...] = option(tuple(task.name for task in OFFLINE), "see above", names)
    contexts: tuple[int, ...] = option((1000, 4000), "prompt tokens", counts)
    limit: int = option(2, "examples of each", count)
    caches: tuple[str, ...] = option(("dynamic", "paged"), "the first is the reference", names)
    page_size: int = option(128, "tokens per page", count)
    batch_size: int = option(1, "examples at once", count)
    chunk_size: int | None = option(
        None, "tokens of a prompt run at once (default: all)", count, old_name="--prefill-chunk-size"
    )
    max_new_tokens: int | None = option(None, "of an answer (default: the task's own)", count)
    seed: int = option(0, "of the examples", int)

    def __post_init__(self) -> None:
        counts = ("limit", "batch_size", "chunk_size", "max_new_tokens")
        found = {name: getattr(self, name) for name in counts}
        low = {name: count for name, count in found.items() if count is not None and count < 1}
        low |= {name: () for name in ("tasks", "contexts", "caches") if not getattr(self, name)}
        if low:
            words = " and ".join(f"{name}={value}" for name, value in low.items())
            raise ValueError(f"{words} was asked for; there must be at least 1.")
        if unknown := [name for name in self.tasks if name not in TASKS]:
            raise ValueError(f"Tasks {unknown} were asked for; there are {', '.join(TASKS)}.")


@dataclass(frozen=True)
class _Batch:
    """Examples that are answered at once, and the most tokens of an answer."""

    task: Task
    context: int
    examples: list[Example]
    max_new_tokens: int


@dataclass(frozen=True)
class _Answers:
    """What came of a batch: tokens of each row, seconds, bytes of the cache at the end."""

    tokens: list[list[int]]
    total_s: float
    kv_bytes: int


Results = dict[str, list[dict[str, Any]]]
"""Rows of figures, and answers."""

_Lap = tuple[_Batch, dict[str, _Answers]]
"""A batch, and the answers from each cache."""


def evaluate_long_context(model: MeasuredModel, settings: Settings, results: Results | None = None) -> Results:
    """Let a model do tasks with each cache, greedily, and compare.

    The caches take turns, batch by batch. Before, each generates two tokens for the first batch of each size, so that
    the kernels for decoding are compiled when it counts.

    Args:
        model: that is asked.
        settings: what, and how.
        results: where to put the results, so that a caller who is interrupted has those of the batches before.

    Returns:
        Under `rows`, for each task, context and cache: the number of `examples`, the `prompt_tokens` of the longest
        one, whether these are the `same_answers` as those of the first cache, token for token, the median over the
        batches of `total_s`, `kv_bytes`, the most at the end of a batch, and the mean `score`.
        Under `answers`, each answer and what it is scored beside.

    Raises:
        ValueError: for a model without a tokenizer, an unknown cache, or a context that has no room for the question
            or leaves none for the answer.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError(f"{model.name} has no tokenizer, and can't be asked anything. Choose another model.")
    laps: dict[tuple[str, int], list[_Lap]] = {}
    results = {} if results is None else results
    with line_up(model.model, settings.caches, settings.page_size, CACHES) as baselines:
        for baseline in baselines:
            baseline.prepare()
        batches = _batches(model, tokenizer, settings)
        for batch in {len(batch.examples): batch for batch in reversed(batches)}.values():
            for baseline in baselines:
                _generate(baseline, batch, min(2, batch.max_new_tokens), settings.chunk_size)
        try:
            for batch in progress(batches, "long context"):
                answers = {
                    baseline.name: _generate(baseline, batch, batch.max_new_tokens, settings.chunk_size)
                    for baseline in baselines
                }
                laps.setdefault((batch.task.name, batch.context), []).append((batch, answers))
        finally:
            results |= _results(tokenizer, laps, settings.caches)
    return results


def _results(
    tokenizer: PreTrainedTokenizerBase, laps: dict[tuple[str, int], list[_Lap]], caches: Sequence[str]
) -> Results:
    rows, texts = [], []
    for (task, context), own in laps.items():
        for cache in caches:
            place: dict[str, Any] = {"task": task, "context": context, "cache": cache}
            scored = [place | answer for answer in _scored(tokenizer, own, cache)]
            score = fmean(answer["score"] for answer in scored)
            rows.append(place | _figures(own, cache, caches[0]) | {"score": score})
            texts += scored
    return {"rows": rows, "answers": texts}


def _batches(model: MeasuredModel, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> list[_Batch]:
    """All examples, made before anything is measured."""
    batches = []
    for task in map(TASKS.__getitem__, dict.fromkeys(settings.tasks)):
        max_new_tokens = settings.max_new_tokens or task.max_new_tokens
        for context in dict.fromkeys(settings.contexts):
            if context + max_new_tokens > model.max_length:
                raise ValueError(
                    f"A context of {context} tokens and an answer of {max_new_tokens} ({task.name}) were asked for, "
                    f"but {model.name} has {model.max_length} positions. Ask for a context of "
                    f"{model.max_length - max_new_tokens} at most."
                )
            examples = task.examples(tokenizer, context, settings.limit, settings.seed)
            for first in range(0, len(examples), settings.batch_size):
                own = examples[first : first + settings.batch_size]
                batches.append(_Batch(task, context, own, max_new_tokens))
    return batches


def _generate(baseline: Baseline, batch: _Batch, max_new_tokens: int, chunk_size: int | None) -> _Answers:
    model: Any = baseline.model
    ids, mask = padded([example.prompt.input_ids for example in batch.examples], model.device)
    cache = baseline.new_cache(ids.shape[1] + max_new_tokens)
    start = time.perf_counter()
    output = model.generate(
        ids,
        attention_mask=mask,
        **{CACHE: cache},
        do_sample=False,
        max_new_tokens=max_new_tokens,
        prefill_chunk_size=chunk_size,
    )
    tokens = output[:, ids.shape[1] :].tolist()
    total_s = time.perf_counter() - start
    ends = model.generation_config.eos_token_id
    whole = [_until_end(row, ends if isinstance(ends, list) else [ends]) for row in tokens]
    return _Answers(whole, total_s, kv_bytes(cache))


def _until_end(tokens: list[int], ends: Sequence[int | None]) -> list[int]:
    """Without the end of the sequence and what fills the row up after it."""
    return tokens[: next((index for index, token in enumerate(tokens) if token in ends), None)]


def _figures(laps: Sequence[_Lap], cache: str, reference: str) -> dict[str, Any]:
    prompts = [example.prompt.input_ids for batch, _ in laps for example in batch.examples]
    own = [answers[cache] for _, answers in laps]
    return {
        "examples": len(prompts),
        "prompt_tokens": max(map(len, prompts)),
        "same_answers": all(answers[cache].tokens == answers[reference].tokens for _, answers in laps),
        "total_s": median(answers.total_s for answers in own),
        "kv_bytes": max(answers.kv_bytes for answers in own),
    }


def _scored(tokenizer: PreTrainedTokenizerBase, laps: Sequence[_Lap], cache: str) -> list[dict[str, Any]]:
    scored = []
    for batch, answers in laps:
        for example, tokens in zip(batch.examples, answers[cache].tokens, strict=True):
            text = str(tokenizer.decode(tokens, skip_special_tokens=True))
            score = batch.task.score(text, example.reference)
            scored.append({"answer": text, "reference": example.reference, "score": score})
    return scored
