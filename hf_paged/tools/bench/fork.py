"""Fork: what a copy of a cache costs, for instance to reuse a prompt."""

import copy
import statistics
import time
from typing import Any

from hf_paged.cache.paged import PagedCache
from hf_paged.tools.bench.baseline import Baseline
from hf_paged.tools.bench.baselines import line_up
from hf_paged.tools.bench.race import Race, warm_up
from hf_paged.tools.bench.settings import Settings
from hf_paged.tools.lab.memory import kv_bytes
from hf_paged.tools.lab.progress import progress
from hf_paged.tools.lab.subject import Subject

CONTEXTS = (1000, 4000, 8000)
BASELINES = ("dynamic", "paged")
_COPIES_PER_ROUND = 5


def measure(subject: Subject, settings: Settings) -> dict[str, Any]:
    """Copy a filled cache of each baseline with `copy.deepcopy`.

    Returns:
        `rows` for each context and baseline, with `ms` for a copy and the `new_bytes` of keys and values it holds
        beyond the original.
    """
    rows = []
    with line_up(subject.model, settings.baselines or BASELINES, settings.page_size) as baselines:
        warm_up(baselines, subject)
        for context in progress(subject.contexts(settings.contexts, CONTEXTS, 1), "fork"):
            race = Race(baselines, context + 1)
            laps = race.lap(subject.prompt(context), 1, settings.chunk_size)
            for baseline in baselines:
                error = laps[baseline.name].error
                figures = _copies(baseline, settings.rounds) if error is None else {"error": error}
                rows.append({"context": context, "baseline": baseline.name} | figures)
            race.end()
    return {"rows": rows}


def _copies(baseline: Baseline, rounds: int) -> dict[str, Any]:
    seconds = []
    for _ in range(rounds * _COPIES_PER_ROUND):
        held = _held_bytes(baseline)
        start = time.perf_counter()
        copied = copy.deepcopy(baseline.cache)
        seconds.append(time.perf_counter() - start)
        # A copy of a paged cache holds pages of the same pool, which counts each page once.
        new_bytes = _held_bytes(baseline) - held if isinstance(copied, PagedCache) else kv_bytes(copied)
        del copied
    return {"ms": 1e3 * statistics.median(seconds), "new_bytes": new_bytes}


def _held_bytes(baseline: Baseline) -> int:
    cache = baseline.cache
    return cache.pool.stats().active_bytes if isinstance(cache, PagedCache) else kv_bytes(cache)
