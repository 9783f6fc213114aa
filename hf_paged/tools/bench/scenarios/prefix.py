"""Prompts that begin alike, with and without an index that finds what was computed."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_paged._transformers import CACHE
from hf_paged.attention.mask import NAME
from hf_paged.cache.paged import PagedCache
from hf_paged.decoding.sample import sample
from hf_paged.pages.pool import PagePool
from hf_paged.scoring.choices import score_choices
from hf_paged.tools.bench.scenario import Scenario
from hf_paged.tools.bench.settings import Settings, load
from hf_paged.tools.lab.baseline import synchronize
from hf_paged.tools.lab.model import MeasuredModel
from hf_paged.tools.progress import progress

SYSTEM_PROMPT, NUM_REQUESTS, QUESTION = 2000, 16, 30
TURNS, TURN, ANSWER = 8, 105, 32
BATCHES, ROWS, BEGINNING, END = 4, 16, 450, 50
CHOICES, CONTEXT, CHOICE = 4, 500, 8
INDEXED, PLAIN = "prefix cache", "no prefix cache"

Times = dict[str, float]


class Requests:
    """Requests to a model, in pools of their own.

    Args:
        measured: the model.
        page_size: tokens per page.
    """

    def __init__(self, measured: MeasuredModel, page_size: int) -> None:
        self.model: Any = measured.model
        self.text = measured.prompt(min(measured.max_length, 7000))
        self._page_size = page_size

    def pool(self, prefix_cache: bool, num_tokens: int = 40000) -> PagePool:
        """A pool for so many tokens."""
        return PagePool.from_model(
            self.model, num_tokens // self._page_size, self._page_size, prefix_cache=prefix_cache
        )

    def first_token(self, cache: PagedCache, ids: Tensor, num_new: int = 1) -> tuple[float, Tensor]:
        """Compute a prompt and its first token; return the seconds that takes, and `num_new` tokens."""
        begin = time.perf_counter()
        tokens = self._generate(cache, ids, 1)
        seconds = time.perf_counter() - begin
        return seconds, tokens if num_new == 1 else self._generate(cache, tokens, num_new - 1)

    def _generate(self, cache: PagedCache, ids: Tensor, num_new: int) -> Tensor:
        settings = {"do_sample": False, "max_new_tokens": num_new, "min_new_tokens": num_new}
        tokens: Tensor = self.model.generate(ids, **{CACHE: cache}, **settings, custom_generate=sample)
        synchronize(tokens.device)
        return tokens

    def behind_a_system_prompt(self, pool: PagePool) -> Times:
        """One request after the other behind the same tokens; all are held to the end."""
        system = self.text[:, :SYSTEM_PROMPT]
        caches, times = [], []
        for request in range(NUM_REQUESTS):
            begin = SYSTEM_PROMPT + request * QUESTION
            cache = PagedCache(pool=pool)
            ids = torch.cat([system, self.text[:, begin : begin + QUESTION]], dim=1)
            times.append(self.first_token(cache, ids)[0])
            caches.append(cache)
        least = -(-SYSTEM_PROMPT // pool.page_size) + NUM_REQUESTS * -(-QUESTION // pool.page_size)
        return {
            "first_s": times[0],
            "later_s": statistics.median(times[1:]),
            "total_s": sum(times),
            "pages": float(pool.stats().num_active_pages),
            "pages_over_least": pool.stats().num_active_pages / least,
        }

    def conversation(self, pool: PagePool) -> Times:
        """Turns of one conversation, each with a cache of its own."""
        ids, times = self.text[:, :0], []
        for turn in range(TURNS):
            ids = torch.cat([ids, self.text[:, turn * TURN : (turn + 1) * TURN]], dim=1)
            with PagedCache(pool=pool) as cache:
                seconds, ids = self.first_token(cache, ids, ANSWER)
            times.append(seconds)
        return {"first_s": times[0], "later_s": times[-1], "total_s": sum(times)}

    def batches(self, pool: PagePool, num_shared: int) -> Times:
        """Batches of prompts, of which so many tokens are the same in all of them."""
        times = []
        for batch in range(BATCHES):
            ids = self.text[:, :BEGINNING].repeat(ROWS, 1)
            ends = [
                self.text[0].roll(-(batch * ROWS + row + 1) * END)[: BEGINNING + END - num_shared]
                for row in range(ROWS)
            ]
            ids = torch.cat([ids[:, :num_shared], torch.stack(ends)], dim=1)
            with PagedCache(pool=pool) as cache:
                times.append(self.first_token(cache, ids)[0])
        return {"first_s": times[0], "later_s": statistics.median(times[1:]), "total_s": sum(times)}

    def choices(self, pool: PagePool) -> Times:
        """Scores of some answers behind one context: computed once, or once for each."""
        context = self.text[:, :CONTEXT]
        answers = self.text[0, CONTEXT : CONTEXT + CHOICES * CHOICE].view(CHOICES, CHOICE)
        begin = time.perf_counter()
        if pool.prefix_index is not None:
            (scores,) = score_choices(self.model, context.tolist(), [answers.tolist()], pool)
            score = sum(choice.log_probability for choice in scores)
        else:
            with torch.no_grad():
                ids = torch.cat([context.repeat(CHOICES, 1), answers], dim=1)
                logits = self.model(ids, use_cache=False, logits_to_keep=CHOICE + 1).logits[:, :-1]
                score = float(logits.log_softmax(-1).gather(2, answers[..., None]).sum())
        return {"total_s": time.perf_counter() - begin, "score": score}


def measure(settings: Settings, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Run requests in pools with an index and without one, in turn.

    Args:
        settings: as given.
        rows: gets one for each case and kind of pool, with medians of `first_s`, of the first request, `later_s`, of
            one of the others, or of the last turn, `total_s`, how many times as fast as without an index, and pages.
    """
    measured = load(settings)
    measured.check_room([SYSTEM_PROMPT + NUM_REQUESTS * QUESTION], 1)
    measured.model.set_attn_implementation(NAME)
    requests = Requests(measured, settings.page_size)
    cases: dict[str, Callable[[PagePool], Times]] = {
        f"{NUM_REQUESTS} requests behind {SYSTEM_PROMPT} tokens": requests.behind_a_system_prompt,
        f"conversation of {TURNS} turns": requests.conversation,
        f"{BATCHES} batches of {ROWS}, {BEGINNING} of {BEGINNING + END} tokens shared": lambda pool: requests.batches(
            pool, BEGINNING
        ),
        f"{BATCHES} batches of {ROWS}, nothing shared": lambda pool: requests.batches(pool, 0),
        f"{CHOICES} choices behind {CONTEXT} tokens": requests.choices,
    }
    for compiling in (requests.behind_a_system_prompt, requests.choices):
        compiling(requests.pool(True))
    for name, case in progress(cases.items(), "prefix"):
        runs = {kind: [Times() for _ in range(settings.rounds)] for kind in (PLAIN, INDEXED)}
        for turn in range(settings.rounds):
            for kind in list(runs)[:: 1 if turn % 2 else -1]:
                runs[kind][turn] = case(requests.pool(kind == INDEXED))
        medians = {kind: _medians(taken) for kind, taken in runs.items()}
        for kind, row in medians.items():
            times = [key for key in ("first_s", "later_s", "total_s") if key in row]
            speed = {f"{key}_speed": medians[PLAIN][key] / row[key] for key in times}
            rows.append({"model": measured.name, "case": name, "baseline": kind} | row | speed)
    return {}


def _medians(runs: list[Times]) -> Times:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


PREFIX = Scenario(
    "prefix",
    "prompts that begin alike, with and without an index that finds what was computed",
    measure,
    (
        "model",
        "case",
        "baseline",
        "first_s",
        "later_s",
        "later_s_speed",
        "total_s",
        "total_s_speed",
        "pages_over_least",
    ),
)
