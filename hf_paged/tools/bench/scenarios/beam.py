"""Beam search, where a contiguous cache holds the prompt once per beam and copies everything at each step."""

import statistics
import time
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, StoppingCriteria

from hf_paged._transformers import CACHE
from hf_paged.tools.bench.race import warm_up
from hf_paged.tools.bench.scenario import LAP, Scenario
from hf_paged.tools.bench.settings import Settings, load
from hf_paged.tools.lab.baseline import Baseline, synchronize
from hf_paged.tools.lab.baselines import line_up
from hf_paged.tools.lab.memory import kv_bytes
from hf_paged.tools.progress import progress

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
        synchronize(input_ids.device)
        self.times.append(time.perf_counter())
        self.peak_bytes = max(self.peak_bytes, kv_bytes(self._cache))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def measure(settings: Settings, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Run the same beam search with each baseline in turn.

    Args:
        settings: as given.
        rows: gets one for each context and baseline, with `ms_per_step`, `peak_kv_bytes`, and if the reference ran
            `ratio` and `same_tokens`.

    Returns:
        `num_beams`.
    """
    model = load(settings)
    contexts = model.contexts(settings.contexts, CONTEXTS, settings.max_new_tokens)
    with line_up(model.model, settings.caches or BASELINES, settings.page_size) as baselines:
        warm_up(baselines, model, NUM_BEAMS)
        for context in progress(contexts, "beam"):
            ids = model.prompt(context)
            runs = [
                {baseline.name: search(baseline, ids, settings.max_new_tokens) for baseline in baselines}
                for _ in range(settings.rounds)
            ]
            rows += [{"context": context} | _row(name, runs) for name in runs[0]]
    return {"num_beams": NUM_BEAMS}


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


def _row(name: str, runs: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    row: dict[str, Any] = {"baseline": name}
    if errors := [run[name]["error"] for run in runs if "error" in run[name]]:
        return row | {"error": errors[0]}
    row["ms_per_step"] = _median_ms(name, runs)
    row["peak_kv_bytes"] = max(run[name]["peak_kv_bytes"] for run in runs)
    if Baseline.name in runs[0] and not any("error" in run[Baseline.name] for run in runs):
        row["ratio"] = row["ms_per_step"] / _median_ms(Baseline.name, runs)
        row["same_tokens"] = all(torch.equal(run[name]["sequences"], run[Baseline.name]["sequences"]) for run in runs)
    return row


def _median_ms(name: str, runs: list[dict[str, dict[str, Any]]]) -> float:
    steps: list[float] = [step for run in runs for step in run[name]["steps"]]
    return 1e3 * statistics.median(steps)


BEAM = Scenario(
    "beam",
    "beam search, where a contiguous cache holds the prompt once per beam and copies everything at each step",
    measure,
    (*LAP, "peak_kv_bytes", "same_tokens", "error"),
    ("peak_kv_bytes", "ms_per_step"),
)
