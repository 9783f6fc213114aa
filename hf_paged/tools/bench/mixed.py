"""Mixed: a batch of prompts of very different lengths, from nothing to the last token."""

import random
import statistics
from typing import Any

from hf_paged.tools.bench import worker
from hf_paged.tools.bench.baselines import line_up
from hf_paged.tools.bench.race import Lap, race_once, summarize, warm_up
from hf_paged.tools.bench.settings import Settings
from hf_paged.tools.lab.memory import PeakMemory
from hf_paged.tools.lab.progress import progress
from hf_paged.tools.lab.subject import Subject

BASELINES = ("dynamic", "paged", "paged-ragged", "paged-compiled", "generate_batch")
NUM_PROMPTS = 16
LENGTHS = (16, 1024)
_LAST_TOKENS = 256
_PEAKS_ON_CPU = 3  # processes: what an allocator keeps of large tensors that were freed differs by hundreds of MiB
_SEED = 0


def prompt_lengths(settings: Settings) -> list[int]:
    """Those asked for, or lengths between 16 and 1024 tokens, the same in every run."""
    if settings.prompt_lengths is not None:
        return list(settings.prompt_lengths)
    generator = random.Random(_SEED)
    return [generator.randint(*LENGTHS) for _ in range(NUM_PROMPTS)]


def measure(subject: Subject, settings: Settings) -> dict[str, Any]:
    """Measure the batch; the memory of each baseline in a process of its own.

    Returns:
        `prompt_lengths`; `minimum_bytes`, the keys and values of the real tokens; `rows` for each baseline, with
        `total_s`; `tokens_per_s`, prompt tokens and new ones over the total; `last_tokens_per_s`, over the last 256
        new tokens or all of them; `overhead` of the cache over the minimum; `peak_bytes`, what a process held beyond
        the loaded model, at most, in the median of several, `least_peak_bytes` and `most_peak_bytes`, or `peak_error`.
    """
    lengths = prompt_lengths(settings)
    names = settings.baselines or BASELINES
    ids, mask = subject.padded(lengths)
    num_new = settings.max_new_tokens
    with line_up(subject.model, names, settings.page_size) as baselines:
        warm_up(baselines, subject, len(lengths))
        laps = [race_once(baselines, ids, mask, num_new) for _ in progress(range(settings.rounds), "mixed")]
    # What the last token of a row would store is stored by the step after it.
    minimum = (sum(lengths) + len(lengths) * (num_new - 1)) * subject.token_bytes()
    rows = summarize(laps)
    for row in progress(rows, "memory"):
        if "error" in row:
            continue
        own = [lap[row["baseline"]] for lap in laps]
        row["total_s"] = statistics.median(lap.total_s for lap in own)
        row["tokens_per_s"] = (sum(lengths) + len(lengths) * num_new) / row["total_s"]
        row["last_tokens_per_s"] = statistics.median(last_tokens_per_s(lap, len(lengths)) for lap in own)
        if "kv_bytes" in row:
            row["overhead"] = row["kv_bytes"] / minimum - 1
        row |= _peaks(settings, row["baseline"], 1 if subject.device.type == "cuda" else _PEAKS_ON_CPU)
    return {"prompt_lengths": lengths, "minimum_bytes": minimum, "rows": rows}


def _peaks(settings: Settings, name: str, num_processes: int) -> dict[str, Any]:
    runs = [worker.start("peak", settings, name) for _ in range(num_processes)]
    errors = [run["error"] for run in runs if "error" in run]
    if errors:
        return {"peak_error": errors[0]}
    peaks = [run["peak_bytes"] for run in runs]
    return {
        "peak_bytes": statistics.median(peaks),
        "least_peak_bytes": min(peaks),
        "most_peak_bytes": max(peaks),
    }


def last_tokens_per_s(lap: Lap, num_rows: int) -> float:
    """New tokens per second over the last 256, or over all but the first of each row."""
    steps = lap.step_s[-max(1, _LAST_TOKENS // num_rows) :]
    return num_rows * len(steps) / sum(steps)


def peak(subject: Subject, settings: Settings, name: str) -> dict[str, Any]:
    """Run the batch once with one baseline in this process.

    Returns:
        `peak_bytes`, or `error`.
    """
    ids, mask = subject.padded(prompt_lengths(settings))
    subject.token_bytes()  # a forward pass, which touches weights that were not read from disk yet
    memory = PeakMemory(subject.device)
    with line_up(subject.model, [name], settings.page_size) as baselines:
        warm_up(baselines, subject, len(ids))
        memory.forget_peak()  # compilers take memory too, but are gone by then
        lap = race_once(baselines, ids, mask, settings.max_new_tokens)[name]
        return {"peak_bytes": memory.bytes} if lap.error is None else {"error": lap.error}
