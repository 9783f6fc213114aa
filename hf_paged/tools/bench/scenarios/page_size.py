"""Speed and waste of every page size on the batch of `mixed`."""

from contextlib import ExitStack
from typing import Any

from hf_paged.pages.pool import PAGE_SIZES
from hf_paged.tools.bench.scenario import LAP, Scenario
from hf_paged.tools.bench.scenarios.mixed import run_batch
from hf_paged.tools.bench.settings import Settings, load
from hf_paged.tools.lab.baseline import Baseline
from hf_paged.tools.lab.baselines import PagedRagged


def measure(settings: Settings) -> dict[str, Any]:
    """Measure the batch with pages of each size, and with `DynamicCache`.

    Returns:
        What `run_batch` gives, with the `page_size` of each row, None for the reference.
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
        results = run_batch(baselines, settings)
    results["rows"] = [{"page_size": sizes.get(row["baseline"])} | row for row in results["rows"]]
    return results


PAGE_SIZE = Scenario(
    "page-size",
    "speed and waste of every page size on the batch of mixed",
    measure,
    (*LAP, "total_s", "kv_bytes", "overhead", "same_tokens", "error"),
    ("overhead", "ms_per_step"),
)
