"""Latency: time to the first token, and of each token after it, against the length of the context."""

from typing import Any

from hf_paged.tools.bench.bandwidth import Bandwidth, bandwidth_share
from hf_paged.tools.bench.baselines import line_up
from hf_paged.tools.bench.fit import fit_line
from hf_paged.tools.bench.race import race_once, summarize, warm_up
from hf_paged.tools.bench.settings import Settings
from hf_paged.tools.lab.memory import weight_bytes
from hf_paged.tools.lab.progress import progress
from hf_paged.tools.lab.subject import Subject

CONTEXTS = (128, 512, 1024, 2048, 4096, 8000)
BASELINES = ("dynamic", "static", "flex", "paged")
_GROWN_TO = 2048


def measure(subject: Subject, settings: Settings) -> dict[str, Any]:
    """Measure one row at each context.

    Returns:
        `weight_bytes`, which a step reads; `rows` for each context and baseline, with `bandwidth_gb_s`, measured in
        turns with the steps, and `bandwidth_share`: the bytes that a step must read (weights, and the keys and values
        of the context) per second, as a part of it; `fits` for each baseline, a line through the times of a step with
        `slope_us` per token of context, and the `growth` of the time from the first context to 2048, or to the last
        where that was not measured.
    """
    contexts = subject.contexts(settings.contexts, CONTEXTS, settings.max_new_tokens)
    bandwidth = Bandwidth(subject.device)
    weights, token_bytes = weight_bytes(subject.model), subject.token_bytes()
    rows = []
    with line_up(subject.model, settings.baselines or BASELINES, settings.page_size) as baselines:
        warm_up(baselines, subject)
        for context in progress(contexts, "latency"):
            ids = subject.prompt(context)
            laps = [
                race_once(baselines, ids, None, settings.max_new_tokens, bandwidth.measure)
                for _ in range(settings.rounds)
            ]
            bytes_per_s = bandwidth.take_median()
            for row in summarize(laps):
                if "error" not in row:
                    num_bytes = weights + context * token_bytes
                    row["bandwidth_gb_s"] = bytes_per_s / 1e9
                    row["bandwidth_share"] = bandwidth_share(num_bytes, row["ms_per_step"] / 1e3, bytes_per_s)
                rows.append({"context": context} | row)
    return {"weight_bytes": weights, "rows": rows, "fits": fits(rows)}


def fits(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line through each baseline's times; none for a baseline with fewer than two."""
    times: dict[str, dict[int, float]] = {}
    for row in rows:
        if "error" not in row:
            times.setdefault(row["baseline"], {})[row["context"]] = row["ms_per_step"]
    lines = []
    for name, by_context in times.items():
        if len(by_context) < 2:
            continue
        fit = fit_line(list(by_context), list(by_context.values()))
        first, last = min(by_context), _GROWN_TO if _GROWN_TO in by_context else max(by_context)
        lines.append(
            {
                "baseline": name,
                "slope_us": 1e3 * fit.slope,
                "intercept_ms": fit.intercept,
                "r_squared": fit.r_squared,
                "growth": by_context[last] / by_context[first],
                "growth_from": first,
                "growth_to": last,
            }
        )
    return lines
