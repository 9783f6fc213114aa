"""A batch of prompts of very different lengths, from nothing to the last token; with pages of each size, too."""

import random
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from hf_paged.pages.pool import PAGE_SIZES
from hf_paged.tools.bench.bandwidth import Bandwidth
from hf_paged.tools.bench.race import Lap, laps_of, race_once, summarize, warm_up
from hf_paged.tools.bench.scenario import LAP, WHOLE, Scenario
from hf_paged.tools.bench.settings import Settings, line_up_for, load
from hf_paged.tools.bench.worker import in_new_process
from hf_paged.tools.lab.baseline import Baseline
from hf_paged.tools.lab.baselines import PagedRagged, line_up
from hf_paged.tools.lab.memory import PeakMemory, token_bytes, weight_bytes
from hf_paged.tools.progress import progress

BASELINES = ("dynamic", "paged", "paged-ragged", "paged-compiled", "generate_batch")
NUM_PROMPTS = 16
LENGTHS = (16, 1024)
_LAST_TOKENS = 256
_PEAKS_ON_CPU = 3  # processes: what an allocator keeps of large tensors that were freed differs by hundreds of MiB
_SEED = 0


def prompt_lengths(asked: Sequence[int] | None = None) -> list[int]:
    """Those asked for, or lengths between 16 and 1024 tokens, the same in every run."""
    if asked is not None:
        return list(asked)
    generator = random.Random(_SEED)
    return [generator.randint(*LENGTHS) for _ in range(NUM_PROMPTS)]


def measure(settings: Settings, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Measure the batch; the memory of each baseline in a process of its own.

    Args:
        settings: as given.
        rows: gets those of `run_batch`, with `peak_bytes`, what a process held beyond the loaded model, at most, in
            the median of several, `least_peak_bytes` and `most_peak_bytes`, and `peak_noise_bytes`, which is what lies
            between these, and what the process kept of its warm-up; or `peak_error`.

    Returns:
        What else `run_batch` gives.
    """
    model = load(settings)
    with line_up_for(settings, model, BASELINES) as baselines:
        results = run_batch(baselines, settings, rows)
    num_processes = 1 if model.device.type == "cuda" else _PEAKS_ON_CPU
    for row in progress(rows, "memory"):
        if "error" not in row and not settings.whole:  # whole runs have measured it
            row |= _peaks([in_new_process(peak, settings, row["baseline"]) for _ in range(num_processes)])
    return results


def run_batch(baselines: Sequence[Baseline], settings: Settings, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Run the batch with baselines in turns.

    Args:
        baselines: that run.
        settings: as given.
        rows: gets one for each baseline, with `minimum_bytes`, the keys and values of the real tokens;
            `bandwidth_gb_s` and `bandwidth_share`, as in `latency`, of a step in the middle; `total_s`;
            `tokens_per_s`, prompt tokens and new ones over the total; `last_tokens_per_s`, over the last 256 new
            tokens or all of them; `overhead` of the cache over the minimum.

    Returns:
        `prompt_lengths` and `minimum_bytes`.
    """
    model, lengths, num_new = load(settings), prompt_lengths(settings.prompt_lengths), settings.max_new_tokens
    model.check_room(lengths, num_new)
    ids, mask = model.padded(lengths)
    bandwidth, bytes_per_token = Bandwidth(model.device), token_bytes(model.model)
    if not settings.whole:
        warm_up(baselines, model, len(lengths))
    laps = laps_of(settings, baselines, ids, mask, bandwidth.measure)
    bytes_per_s = bandwidth.take_median()
    num_bytes = weight_bytes(model.model) + (sum(lengths) + len(lengths) * num_new // 2) * bytes_per_token
    # What the last token of a row would store is stored by the step after it.
    minimum = (sum(lengths) + len(lengths) * (num_new - 1)) * bytes_per_token
    rows += summarize(laps)
    for row in rows:
        if "error" in row:
            continue
        own = [lap[row["baseline"]] for lap in laps]
        row |= {"bandwidth_gb_s": bytes_per_s / 1e9, "minimum_bytes": minimum}
        row["bandwidth_share"] = num_bytes / (row["ms_per_step"] / 1e3) / bytes_per_s
        row["total_s"] = statistics.median(lap.total_s for lap in own)
        row["tokens_per_s"] = (sum(lengths) + len(lengths) * num_new) / row["total_s"]
        row["last_tokens_per_s"] = statistics.median(last_tokens_per_s(lap, len(lengths)) for lap in own)
        if "kv_bytes" in row:
            row["overhead"] = row["kv_bytes"] / minimum - 1
    return {"prompt_lengths": lengths, "minimum_bytes": minimum}


def measure_page_sizes(settings: Settings, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Measure the batch with pages of each size, and with `DynamicCache`.

    Args:
        settings: as given.
        rows: gets those of `run_batch`, with the `page_size` of each, None for the reference.

    Returns:
        What else `run_batch` gives.
    """
    model = load(settings).model
    sizes = {f"paged, {size}": size for size in PAGE_SIZES}
    baselines = [Baseline(model, settings.page_size)]
    for name, size in sizes.items():
        baselines.append(PagedRagged(model, size))
        baselines[-1].name = name
    with ExitStack() as stack:
        for baseline in baselines:
            stack.callback(baseline.close)
        results = run_batch(baselines, settings, rows)
    rows[:] = [{"page_size": sizes.get(row["baseline"])} | row for row in rows]
    return results


def last_tokens_per_s(lap: Lap, num_rows: int) -> float:
    """New tokens per second over the last 256, or over all but the first of each row."""
    steps = lap.step_s[-max(1, _LAST_TOKENS // num_rows) :]
    return num_rows * len(steps) / sum(steps)


def peak(settings: Settings, name: str) -> dict[str, Any]:
    """Run the batch once with one baseline in this process.

    Returns:
        `peak_bytes` beyond the loaded model, and of these `kept_bytes`, which were held before the batch began: what
        was imported for the warm-up, and what allocators keep of it. Or `error`.
    """
    model = load(settings)
    ids, mask = model.padded(prompt_lengths(settings.prompt_lengths))
    token_bytes(model.model)  # a forward pass, which touches weights that were not read from disk yet
    memory = PeakMemory(model.device)
    with line_up(model.model, [name], settings.page_size) as baselines:
        warm_up(baselines, model, len(ids))
        memory.forget_peak()  # compilers take memory too, but are gone by then
        kept = memory.held_bytes
        lap = race_once(baselines, ids, mask, settings.max_new_tokens)[name]
        return {"peak_bytes": memory.bytes, "kept_bytes": kept} if lap.error is None else {"error": lap.error}


def _peaks(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    errors = [run["error"] for run in runs if "error" in run]
    if errors:
        return {"peak_error": errors[0]}
    peaks, kept = ([run[name] for run in runs] for name in ("peak_bytes", "kept_bytes"))
    least, most = min(peaks), max(peaks)
    return {
        "peak_bytes": statistics.median(peaks),
        "least_peak_bytes": least,
        "most_peak_bytes": most,
        "peak_noise_bytes": most - least + max(0, statistics.median(kept)),
    }


_TIMES = ("bandwidth_share", "total_s", "total_s_speed", "tokens_per_s", "last_tokens_per_s")
_BYTES = ("kv_bytes", "overhead", *WHOLE, "peak_bytes")

MIXED = Scenario(
    "mixed",
    "a batch of prompts of very different lengths, from nothing to the last token",
    measure,
    (*LAP, *_TIMES, *_BYTES, "same_tokens", "error", "peak_error"),
    ("peak_bytes", "kv_bytes", "tokens_per_s", "first_token_s"),
)

PAGE_SIZE = Scenario(
    "page-size",
    "speed and waste of every page size on the batch of mixed",
    measure_page_sizes,
    (*LAP, "total_s", "kv_bytes", "overhead", "same_tokens", "error"),
    ("overhead", "ms_per_step"),
)
