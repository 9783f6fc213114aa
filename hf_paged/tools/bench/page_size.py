"""Page size: speed and waste of every page size on the batch of `mixed`."""

import statistics
from contextlib import ExitStack
from typing import Any

from hf_paged.pages.pool import PAGE_SIZES
from hf_paged.tools.bench.baseline import Baseline
from hf_paged.tools.bench.baselines import PagedRagged
from hf_paged.tools.bench.mixed import prompt_lengths
from hf_paged.tools.bench.race import race_once, summarize, warm_up
from hf_paged.tools.bench.settings import Settings
from hf_paged.tools.lab.progress import progress
from hf_paged.tools.lab.subject import Subject


def measure(subject: Subject, settings: Settings) -> dict[str, Any]:
    """Measure the batch with pages of each size, and with `DynamicCache`.

    Returns:
        `prompt_lengths`; `minimum_bytes`, the keys and values of the real tokens; `rows` for each page size, and None
        for the reference, with `total_s` and the `overhead` of the cache over the minimum.
    """
    lengths = prompt_lengths(settings)
    ids, mask = subject.padded(lengths)
    minimum = (sum(lengths) + len(lengths) * (settings.max_new_tokens - 1)) * subject.token_bytes()
    with ExitStack() as stack:
        baselines: list[Baseline] = [Baseline(subject.model, settings.page_size)]
        sizes = {}
        for size in PAGE_SIZES:
            baselines.append(PagedRagged(subject.model, size))
            baselines[-1].name = f"paged, {size}"
            sizes[baselines[-1].name] = size
        for baseline in baselines:
            stack.callback(baseline.close)
        warm_up(baselines, subject, len(lengths))
        rounds = progress(range(settings.rounds), "page-size")
        laps = [race_once(baselines, ids, mask, settings.max_new_tokens) for _ in rounds]
    rows = []
    for row in summarize(laps):
        if "error" not in row:
            row["total_s"] = statistics.median(lap[row["baseline"]].total_s for lap in laps)
            row["overhead"] = row["kv_bytes"] / minimum - 1
        rows.append({"page_size": sizes.get(row["baseline"])} | row)
    return {"prompt_lengths": lengths, "minimum_bytes": minimum, "rows": rows}
