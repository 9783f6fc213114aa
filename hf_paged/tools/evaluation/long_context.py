"""Tasks over long contexts, answered from several caches side by side.

The claim is that all caches give the same answers; the score says how good these are, which is up to the model.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from hf_paged._transformers import CACHE
from hf_paged.tools.evaluation.example import Example, Task
from hf_paged.tools.evaluation.longbench import LONGBENCH
from hf_paged.tools.evaluation.tasks import OFFLINE
from hf_paged.tools.lab.candidate import Candidate, candidates
from hf_paged.tools.lab.memory import kv_bytes
from hf_paged.tools.lab.progress import progress
from hf_paged.tools.lab.subject import Subject

TASKS = {task.name: task for task in (*OFFLINE, *LONGBENCH)}
"""By name."""


@dataclass(frozen=True)
class Settings:
    """What is asked of the model, and how.

    Attributes:
        tasks: names out of `TASKS`.
        contexts: the most tokens of a prompt.
        limit: examples of each task and context.
        caches: names out of `lab.candidate.CANDIDATES`; the others' answers are compared with those of the first.
        page_size: tokens per page of the paged caches.
        batch_size: examples that are answered at once, padded on the left.
        prefill_chunk_size: tokens of a prompt that are computed at once, which bounds the memory of the activations;
            None: all.
        max_new_tokens: of each answer; None: the task's own.
        seed: of the tasks that are made here.
    """

    tasks: tuple[str, ...] = tuple(task.name for task in OFFLINE)
    contexts: tuple[int, ...] = (1000, 4000)
    limit: int = 2
    caches: tuple[str, ...] = ("dynamic", "paged")
    page_size: int = 128
    batch_size: int = 1
    prefill_chunk_size: int | None = None
    max_new_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        names = ("limit", "batch_size", "prefill_chunk_size", "max_new_tokens")
        low = {name: count for name in names if (count := getattr(self, name)) is not None and count < 1}
        if low:
            asked = " and ".join(f"{name}={count}" for name, count in low.items())
            raise ValueError(f"{asked} was asked for; there must be at least 1.")
        if not (self.tasks and self.contexts and self.caches):
            raise ValueError(
                f"tasks={self.tasks}, contexts={self.contexts} and caches={self.caches} were asked for; name at least "
                "one of each."
            )
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
    """What came of a batch: tokens of each row, seconds since it was handed in, bytes of the cache at the end."""

    tokens: list[list[int]]
    first_token_s: float
    total_s: float
    kv_bytes: int


_Lap = tuple[_Batch, dict[str, _Answers]]
"""A batch, and the answers from each cache."""


class _FirstToken(StoppingCriteria):
    """Notes when the first token is there; stops nothing."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        if self.at is None:
            input_ids[:, -1].tolist()  # on a GPU, waits for it
            self.at = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def evaluate_long_context(subject: Subject, settings: Settings) -> dict[str, list[dict[str, Any]]]:
    """Let a model do tasks with each cache, greedily, and compare.

    The caches take turns, batch by batch. Before, each generates two tokens for the first batch of each size, so that
    the kernels for decoding are compiled when it counts.

    Returns:
        Under `rows`, for each task, context and cache: the number of `examples`, the `prompt_tokens` of the longest
        one, whether these are the `same_answers` as those of the first cache, token for token, medians over the
        batches of `first_token_s` and `total_s`, `kv_bytes`, the most at the end of a batch, and the mean `score`.
        Under `answers`, each answer and what it is scored beside.

    Raises:
        ValueError: for a model without a tokenizer, an unknown cache, or a context that has no room for the question
            or leaves none for the answer.
        ModuleNotFoundError: for tasks of LongBench without `datasets`.
    """
    tokenizer = subject.tokenizer
    if tokenizer is None:
        raise ValueError(f"{subject.name} has no tokenizer, and can't be asked anything. Choose another model.")
    compared = candidates(subject.model, settings.caches, settings.page_size)
    batches = _batches(subject, tokenizer, settings)
    for batch in {len(batch.examples): batch for batch in reversed(batches)}.values():
        for candidate in compared:
            _generate(candidate, batch, min(2, batch.max_new_tokens), settings.prefill_chunk_size)
    laps: dict[tuple[str, int], list[_Lap]] = {}
    for batch in progress(batches, "long context"):
        answers = {
            candidate.name: _generate(candidate, batch, batch.max_new_tokens, settings.prefill_chunk_size)
            for candidate in compared
        }
        laps.setdefault((batch.task.name, batch.context), []).append((batch, answers))
    rows, texts = [], []
    for own in laps.values():
        for cache in settings.caches:
            scored = _scored(tokenizer, own, cache)
            rows.append(_row(own, cache, settings.caches[0]) | {"score": fmean(answer["score"] for answer in scored)})
            texts += scored
    return {"rows": rows, "answers": texts}


def _batches(subject: Subject, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> list[_Batch]:
    """All examples, made before anything is measured."""
    batches = []
    for task in map(TASKS.__getitem__, dict.fromkeys(settings.tasks)):
        max_new_tokens = settings.max_new_tokens or task.max_new_tokens
        for context in dict.fromkeys(settings.contexts):
            if context + max_new_tokens > subject.max_length:
                raise ValueError(
                    f"A context of {context} tokens and an answer of {max_new_tokens} ({task.name}) were asked for, "
                    f"but {subject.name} has {subject.max_length} positions. Ask for a context of "
                    f"{subject.max_length - max_new_tokens} at most."
                )
            examples = task.examples(tokenizer, context, settings.limit, settings.seed)
            for first in range(0, len(examples), settings.batch_size):
                own = examples[first : first + settings.batch_size]
                batches.append(_Batch(task, context, own, max_new_tokens))
    return batches


def _generate(candidate: Candidate, batch: _Batch, max_new_tokens: int, prefill_chunk_size: int | None) -> _Answers:
    model: Any = candidate.model
    prompts = [torch.tensor(example.prompt.input_ids) for example in batch.examples]
    ids = pad_sequence(prompts, batch_first=True, padding_side="left").to(model.device)
    mask = pad_sequence(list(map(torch.ones_like, prompts)), batch_first=True, padding_side="left").to(ids.device)
    cache = candidate.new_cache(ids.shape[1] + max_new_tokens)
    first_token = _FirstToken()
    start = time.perf_counter()
    output = model.generate(
        ids,
        attention_mask=mask,
        **{CACHE: cache},
        do_sample=False,
        max_new_tokens=max_new_tokens,
        prefill_chunk_size=prefill_chunk_size,
        stopping_criteria=[first_token],
    )
    tokens = output[:, ids.shape[1] :].tolist()
    total_s = time.perf_counter() - start
    assert first_token.at is not None
    ends = model.generation_config.eos_token_id
    return _Answers(
        [_until_end(row, ends if isinstance(ends, list) else [ends]) for row in tokens],
        first_token.at - start,
        total_s,
        kv_bytes(cache),
    )


def _until_end(tokens: list[int], ends: Sequence[int | None]) -> list[int]:
    """Without the end of the sequence and what fills the row up after it."""
    return tokens[: next((index for index, token in enumerate(tokens) if token in ends), None)]


def _row(laps: Sequence[_Lap], cache: str, reference: str) -> dict[str, Any]:
    """Figures of one task, context and cache."""
    batch = laps[0][0]
    prompts = [example.prompt.input_ids for batch, _ in laps for example in batch.examples]
    own = [answers[cache] for _, answers in laps]
    return {
        "task": batch.task.name,
        "context": batch.context,
        "cache": cache,
        "examples": len(prompts),
        "prompt_tokens": max(map(len, prompts)),
        "same_answers": all(answers[cache].tokens == answers[reference].tokens for _, answers in laps),
        "first_token_s": median(answers.first_token_s for answers in own),
        "total_s": median(answers.total_s for answers in own),
        "kv_bytes": max(answers.kv_bytes for answers in own),
    }


def _scored(tokenizer: PreTrainedTokenizerBase, laps: Sequence[_Lap], cache: str) -> list[dict[str, Any]]:
    """Each answer of one task, context and cache."""
    scored = []
    for batch, answers in laps:
        place = {"task": batch.task.name, "context": batch.context, "cache": cache}
        for example, tokens in zip(batch.examples, answers[cache].tokens, strict=True):
            text = str(tokenizer.decode(tokens, skip_special_tokens=True))
            score = batch.task.score(text, example)
            scored.append(place | {"answer": text, "references": list(example.references), "score": score})
    return scored
