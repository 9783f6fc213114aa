"""Time to the first token, and of each token after it, against the length of the context."""

import statistics
from typing import Any

from hf_paged.tools.bench.bandwidth import Bandwidth
from hf_paged.tools.bench.race import laps_of, summarize, warm_up
from hf_paged.tools.bench.scenario import LAP, WHOLE, Scenario
from hf_paged.tools.bench.settings import Settings, line_up_for, load
from hf_paged.tools.lab.memory import token_bytes, weight_bytes
from hf_paged.tools.progress import progress

CONTEXTS = (128, 512, 1024, 2048, 4096, 8000)
BASELINES = ("dynamic", "static", "flex", "paged")
_GROWN_TO = 2048


def measure(settings: Settings, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Measure one row at each context.

    Args:
        settings: as given.
        rows: gets one for each context and baseline, with `bandwidth_gb_s`, measured in turns with the steps, and
            `bandwidth_share`: the bytes that a step must read (weights, and the keys and values of the context) per
            second, as a part of it; `minimum_bytes`, keys and values of all tokens that are stored.

    Returns:
        `weight_bytes`, which a step reads, and `fits` for each baseline.
    """
    model = load(settings)
    contexts = model.contexts(settings.contexts, CONTEXTS, settings.max_new_tokens)
    bandwidth = Bandwidth(model.device)
    weights, bytes_per_token = weight_bytes(model.model), token_bytes(model.model)
    with line_up_for(settings, model, BASELINES) as baselines:
        if not settings.whole:
            warm_up(baselines, model)
        for context in progress(contexts, "latency"):
            ids = model.prompt(context)
            laps = laps_of(settings, baselines, ids, None, bandwidth.measure)
            bytes_per_s = bandwidth.take_median()
            for row in summarize(laps):
                if "error" not in row:
                    row["bandwidth_gb_s"] = bytes_per_s / 1e9
                    num_bytes = weights + context * bytes_per_token
                    row["bandwidth_share"] = num_bytes / (row["ms_per_step"] / 1e3) / bytes_per_s
                    row["minimum_bytes"] = (context + settings.max_new_tokens - 1) * bytes_per_token
                rows.append({"context": context} | row)
    return {"weight_bytes": weights, "fits": fits(rows)}


def fits(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fit a line through the times of each baseline; none for a baseline with fewer than two.

    Returns:
        `slope_us` per token of context, `intercept_ms` and `r_squared`; `growth` of the time from the first context
        to 2048, or to the last where that was not measured.
    """
    times: dict[str, dict[int, float]] = {}
    for row in rows:
        if "error" not in row:
            times.setdefault(row["baseline"], {})[row["context"]] = row["ms_per_step"]
    lines = []
    for name, by_context in times.items():
        if len(by_context) < 2:
            continue
        contexts, ms = list(by_context), list(by_context.values())
        slope, intercept = statistics.linear_regression(contexts, ms)
        first, last = min(by_context), _GROWN_TO if _GROWN_TO in by_context else max(by_context)
        lines.append(
            {
                "baseline": name,
                "slope_us": 1e3 * slope,
                "intercept_ms": intercept,
                "r_squared": statistics.correlation(contexts, ms) ** 2,
                "growth": by_context[last] / by_context[first],
                "growth_from": first,
                "growth_to": last,
            }
        )
    return lines


LATENCY = Scenario(
    "latency",
    "time to the first token, and of each after it, against the length of the context",
    measure,
    (*LAP, "bandwidth_share", *WHOLE, "peak_bytes", "same_tokens", "error"),
    ("ms_per_step", "first_token_s"),
)
