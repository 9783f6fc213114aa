"""More prompts than a batch holds, with answers of very different lengths."""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, PreTrainedModel
from typing_extensions import override

from hf_paged._transformers import CACHE
from hf_paged.attention.mask import NAME
from hf_paged.compile.api import compiled
from hf_paged.compile.weights import gather_weights
from hf_paged.decoding.many.answers import generate_many
from hf_paged.pages.pool import PagePool
from hf_paged.tools.bench.scenario import Scenario
from hf_paged.tools.bench.settings import Settings, load
from hf_paged.tools.bench.worker import in_new_process
from hf_paged.tools.lab.baseline import sharing_weights, synchronize
from hf_paged.tools.lab.memory import PeakMemory
from hf_paged.tools.lab.model import MeasuredModel, padded
from hf_paged.tools.progress import progress

NUM_PROMPTS, MAX_ROWS = 64, 16
PROMPT, ANSWER = (16, 1024), (8, 256)
SHARED = 0.9
PLAIN, ALIKE, SHORT = "nothing shared", f"{SHARED:.0%} of each prompt shared", "pages for a third of the rows"

_SEED = 0
_GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@dataclass(frozen=True)
class Work:
    """Prompts, and how many tokens each is answered by, at most."""

    prompts: list[list[int]]
    answers: list[int]

    def num_pages(self, page_size: int) -> int:
        """Pages for a third of `MAX_ROWS` rows as they are in the middle, but no fewer than the longest needs."""
        pages = [-(-(len(ids) + count) // page_size) for ids, count in zip(self.prompts, self.answers, strict=True)]
        return max(*pages, round(statistics.mean(pages) * MAX_ROWS / 3))


def make_work(measured: MeasuredModel, lengths: Sequence[int] | None, shared: float) -> Work:
    """Prompts of lengths between those of `PROMPT`, as many short as long ones, and answers few of which are long.

    Args:
        measured: whose text it is.
        lengths: of the prompts; None for `NUM_PROMPTS`.
        shared: part of each that is the same in all.
    """
    chance = random.Random(_SEED)
    if lengths is None:
        shortest, longest = PROMPT
        lengths = [round(shortest * (longest / shortest) ** chance.random()) for _ in range(NUM_PROMPTS)]
    # Half of them are at most twice as long as the shortest, a tenth more than ten times.
    answers = [min(ANSWER[1], round(ANSWER[0] / (1 - chance.random()))) for _ in lengths]
    measured.check_room(lengths, ANSWER[1])
    ids, mask = measured.padded(lengths)
    rows = [row[own.bool()].tolist() for row, own in zip(ids, mask, strict=True)]
    common = max(rows, key=len)
    prompts = [common[: int(shared * len(row))] + row[int(shared * len(row)) :] for row in rows]
    return Work(prompts, answers)


class Way:
    """A way to answer them all, by a model object of its own over the weights that all share.

    Args:
        model: shared; is not changed.
        page_size: tokens per page.
    """

    attention = "sdpa"

    def __init__(self, model: PreTrainedModel, page_size: int) -> None:
        self.model: Any = sharing_weights(model)
        self.model.set_attn_implementation(self.attention)
        self.model.generation_config = GenerationConfig(**_GREEDY)  # type: ignore[no-untyped-call]
        self.page_size = page_size

    def run(self, work: Work) -> list[list[int]]:
        """Answer all; return the new tokens of each."""
        raise NotImplementedError

    def close(self) -> None:
        """Undo what was done to get ready."""


class Batches(Way):
    """`generate()` with DynamicCache, `MAX_ROWS` prompts at a time, each batch as long as its longest answer."""

    @override
    def run(self, work: Work) -> list[list[int]]:
        found: list[list[int]] = []
        for first in range(0, len(work.prompts), MAX_ROWS):
            ids, mask = padded(work.prompts[first : first + MAX_ROWS], self.model.device)
            answers = work.answers[first : first + MAX_ROWS]
            cache = {CACHE: DynamicCache(config=self.model.config)}
            tokens = self.model.generate(ids, attention_mask=mask, max_new_tokens=max(answers), **cache)
            new = tokens[:, ids.shape[1] :].tolist()
            found += [row[:count] for row, count in zip(new, answers, strict=True)]
        return found


class Continuous(Way):
    """Transformers' continuous batching, as `generate_batch` runs it, with a length for each answer."""

    @override
    def run(self, work: Work) -> list[list[int]]:
        is_on_gpu = self.model.device.type == "cuda"
        page_size = ContinuousBatchingConfig().page_size
        longest = max(len(ids) + count for ids, count in zip(work.prompts, work.answers, strict=True))
        config = ContinuousBatchingConfig(
            num_blocks=(MAX_ROWS + 1) * -(-longest // page_size),
            max_batch_tokens=4096 if is_on_gpu else 512,
            use_cuda_graph=is_on_gpu,
        )
        asked = _GREEDY | {"eos_token_id": -1, "max_new_tokens": max(work.answers)}
        greedy = GenerationConfig(**asked)  # type: ignore[no-untyped-call]
        found: dict[str, list[int]] = {}
        with self.model.continuous_batching_context_manager(
            generation_config=greedy, continuous_batching_config=config
        ) as manager:
            names = [
                manager.add_request(ids, max_new_tokens=count, eos_token_id=-1)
                for ids, count in zip(work.prompts, work.answers, strict=True)
            ]
            while len(found) < len(names):
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise RuntimeError("Continuous batching ended before all prompts were answered.")
                if result is not None and result.error is not None:
                    raise RuntimeError(f"Continuous batching failed: {result.error}")
                if result is not None and result.is_finished():
                    found[result.request_id] = result.generated_tokens
        return [found[name] for name in names]


class Many(Way):
    """`generate_many`, in a pool of its own."""

    attention = NAME

    @override
    def run(self, work: Work) -> list[list[int]]:
        return self.answer(work, None)

    def answer(self, work: Work, pool: PagePool | None) -> list[list[int]]:
        """Answer all in a pool; None for one of their own."""
        prompts = [
            {"input_ids": ids, "max_new_tokens": count} for ids, count in zip(work.prompts, work.answers, strict=True)
        ]
        results = generate_many(self.model, prompts, pool=pool, max_rows=MAX_ROWS).in_order()
        for result in results:
            if result.error is not None:
                raise result.error
        return [result.tokens for result in results]


class ManyCompiled(Many):
    """The same, compiled."""

    def __init__(self, model: PreTrainedModel, page_size: int) -> None:
        super().__init__(model, page_size)
        gather_weights(self.model)
        self._opened = ExitStack()
        self._opened.enter_context(compiled(self.model))

    @override
    def close(self) -> None:
        self._opened.close()


class ManyShort(Many):
    """`generate_many`, in a pool with pages for a third of the rows."""

    @override
    def run(self, work: Work) -> list[list[int]]:
        num_pages = work.num_pages(self.page_size)
        return self.answer(work, PagePool.from_model(self.model, num_pages, self.page_size, prefix_cache=True))


WAYS: dict[str, Callable[[PreTrainedModel, int], Way]] = {
    "dynamic": Batches,
    "generate_batch": Continuous,
    "many": Many,
    "many-compiled": ManyCompiled,
    "many-short": ManyShort,
}
_OF_CASE = {PLAIN: tuple(WAYS)[:4], ALIKE: tuple(WAYS)[:4], SHORT: ("many", "many-short")}


def measure(case: str, settings: Settings, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Answer prompts in several ways, in turn.

    Args:
        case: of `_OF_CASE`.
        settings: as given; `caches` names ways, `prompt_lengths` prompts.
        rows: gets one for each way: `first_s`, a first run over three prompts, with whatever is compiled in it or
            found on disk; medians of `total_s` and `tokens_per_s`, new ones over it; `total_s_speed`, how many times
            as fast as the first way; `same_tokens`, the part of the answers that are those of the first way;
            `peak_bytes` beyond the loaded model, in a process of its own.

    Raises:
        ValueError: for a way that there is not.
    """
    measured = load(settings)
    ways = _OF_CASE[case]
    unknown = [name for name in settings.caches or () if name not in WAYS]
    names = [name for name in ways if name in (settings.caches or ways)]
    if unknown or not names:
        raise ValueError(
            f"caches={unknown or list(settings.caches or ())} were asked for; there are {', '.join(ways)}."
        )
    rows += _race(measured, settings, case, names)
    for row in progress(rows, "memory"):
        if "error" not in row:
            found = in_new_process(peak, settings, case, row["baseline"])
            row |= {"peak_error": found["error"]} if "error" in found else found
    return {}


def _race(measured: MeasuredModel, settings: Settings, case: str, names: Sequence[str]) -> list[dict[str, Any]]:
    work = _work_of(measured, settings, case)
    times: dict[str, list[float]] = {name: [] for name in names}  # the first one warms up
    tokens: dict[str, list[list[int]]] = {}
    errors: dict[str, str] = {}
    with ExitStack() as stack:
        ways = {name: WAYS[name](measured.model, settings.page_size) for name in names}
        for way in ways.values():
            stack.callback(way.close)
        for turn in range(-1, settings.rounds):
            for name in list(names)[:: 1 if turn % 2 else -1]:
                if name in errors:
                    continue
                start = time.perf_counter()
                try:
                    tokens[name] = ways[name].run(_warm_up(work) if turn < 0 else work)
                except Exception as error:
                    errors[name] = f"{type(error).__name__}: {error}"
                synchronize(measured.device)
                times[name].append(time.perf_counter() - start)
    first = names[0]
    rows: list[dict[str, Any]] = []
    for name in names:
        row: dict[str, Any] = {"model": measured.name, "case": case, "baseline": name}
        if name in errors:
            rows.append(row | {"error": errors[name]})
            continue
        first_s, *others = times[name]
        total_s = statistics.median(others)
        row |= {"first_s": first_s, "total_s": total_s, "tokens_per_s": sum(work.answers) / total_s}
        if first not in errors:
            row["total_s_speed"] = statistics.median(times[first][1:]) / total_s
            same = [one == other for one, other in zip(tokens[first], tokens[name], strict=True)]
            row["same_tokens"] = sum(same) / len(same)
        rows.append(row)
    return rows


def peak(settings: Settings, case: str, name: str) -> dict[str, Any]:
    """Answer prompts once in this process, in one way; return `peak_bytes` beyond the loaded model, or `error`."""
    measured = load(settings)
    work = _work_of(measured, settings, case)
    way = WAYS[name](measured.model, settings.page_size)
    try:
        way.run(_warm_up(work))
        memory = PeakMemory(measured.device)
        way.run(work)
        return {"peak_bytes": memory.bytes}
    finally:
        way.close()


def _work_of(measured: MeasuredModel, settings: Settings, case: str) -> Work:
    return make_work(measured, settings.prompt_lengths, SHARED if case == ALIKE else 0.0)


def _warm_up(work: Work) -> Work:
    """Some prompts that meet every kernel and graph: of several rows and of one, and a longer prompt."""
    prompts = sorted(work.prompts, key=len)
    chosen = [prompts[0], prompts[len(prompts) // 2], prompts[-1][:200]]
    return Work([list(ids) for ids in chosen], [3, 3, 6])


_COLUMNS = (
    "model",
    "baseline",
    "first_s",
    "total_s",
    "total_s_speed",
    "tokens_per_s",
    "peak_bytes",
    "same_tokens",
    "error",
    "peak_error",
)

_WHAT = f"{NUM_PROMPTS} prompts through batches of {MAX_ROWS} rows, their answers few of which are long"

MANY = Scenario("many", _WHAT, partial(measure, PLAIN), _COLUMNS)
MANY_ALIKE = Scenario("many-alike", f"the same, {ALIKE}", partial(measure, ALIKE), _COLUMNS)
MANY_SHORT = Scenario("many-short", f"the same, with {SHORT}", partial(measure, SHORT), _COLUMNS)
