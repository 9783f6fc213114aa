"""Beam: beam search, where a contiguous cache holds the prompt once per beam and copies everything at each step."""

import statistics
import time
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, StoppingCriteria

from hf_paged._transformers import CACHE
from hf_paged.tools.bench.baseline import Baseline
from hf_paged.tools.bench.baselines import line_up
from hf_paged.tools.bench.race import REFERENCE, warm_up
from hf_paged.tools.bench.settings import Settings
from hf_paged.tools.lab.memory import kv_bytes
from hf_paged.tools.lab.progress import progress
from hf_paged.tools.lab.subject import Subject

CONTEXTS = (1000, 4000)
BASELINES = ("dynamic", "paged")
NUM_BEAMS = 4


class Watch(StoppingCriteria):
    """Looks at the clock and the cache after each step; never stops anything.

    Args:
        cache: that is generated with.
    """

    def __init__(self, cache: Cache | None) -> None:
        self.times: list[float] = []
        self.peak_bytes = 0
        self._cache = cache

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        """Note time and bytes."""
        if input_ids.is_cuda:
            torch.cuda.synchronize(input_ids.device)
        self.times.append(time.perf_counter())
        self.peak_bytes = max(self.peak_bytes, kv_bytes(self._cache))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def measure(subject: Subject, settings: Settings) -> dict[str, Any]:
    """Run the same beam search with each baseline in turn.

    Returns:
        `num_beams`; `rows` for each context and baseline, with `ms_per_step`, `peak_kv_bytes`, and if the reference
        ran `ratio` and `same_tokens`.
    """
    rows = []
    with line_up(subject.model, settings.baselines or BASELINES, settings.page_size) as baselines:
        warm_up(baselines, subject, NUM_BEAMS)
        for context in progress(subject.contexts(settings.contexts, CONTEXTS, settings.max_new_tokens), "beam"):
            ids = subject.prompt(context)
            runs = [
                {baseline.name: search(baseline, ids, settings.max_new_tokens) for baseline in baselines}
                for _ in range(settings.rounds)
            ]
            rows += [{"context": context} | row for row in _rows(runs)]
    return {"num_beams": NUM_BEAMS, "rows": rows}


def search(baseline: Baseline, ids: Tensor, num_new_tokens: int) -> dict[str, Any]:
    """Run one beam search; give `steps` in seconds, `peak_kv_bytes` and `sequences`, or `error`."""
    try:
        baseline.prepare()
        cache = baseline.new_cache(ids.shape[1] + num_new_tokens)
        watch = Watch(cache)
        with baseline.flags():
            model: Any = baseline.model
            sequences = model.generate(
                ids,
                **{CACHE: cache},
                num_beams=NUM_BEAMS,
                do_sample=False,
                max_new_tokens=num_new_tokens,
                min_new_tokens=num_new_tokens,
                stopping_criteria=[watch],
            )
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    steps = [after - before for before, after in zip(watch.times, watch.times[1:], strict=False)]
    return {"steps": steps, "peak_kv_bytes": watch.peak_bytes, "sequences": sequences}


def _rows(runs: list[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    def median(name: str) -> float:
        steps: list[float] = [step for run in runs for step in run[name]["steps"]]
        return 1e3 * statistics.median(steps)

    failed = {name: run[name]["error"] for run in runs for name in run if "error" in run[name]}
    rows = []
    for name in runs[0]:
        row: dict[str, Any] = {"baseline": name}
        if name in failed:
            row["error"] = failed[name]
        else:
            row |= {"ms_per_step": median(name), "peak_kv_bytes": max(run[name]["peak_kv_bytes"] for run in runs)}
            if REFERENCE in runs[0] and REFERENCE not in failed:
                row["ratio"] = row["ms_per_step"] / median(REFERENCE)
                row["same_tokens"] = all(
                    torch.equal(run[name]["sequences"], run[REFERENCE]["sequences"]) for run in runs
                )
        rows.append(row)
    return rows
