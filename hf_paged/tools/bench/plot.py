"""Pictures of the figures, as SVG; a baseline has the same colour everywhere."""

from pathlib import Path

from hf_paged.tools.bench.baselines import BASELINES
from hf_paged.tools.lab.chart import PALETTE, Chart, Rows, save

_COLOURS = dict(zip(BASELINES, PALETTE, strict=True))

_MIB = 2.0**20
_STEP = Chart("Time per token against context", "ms_per_step", "ms per token", "context")

CHARTS: dict[str, tuple[Chart, ...]] = {
    "latency": (
        _STEP,
        Chart("Time to the first token", "first_token_s", "seconds", "context"),
    ),
    "single": (
        _STEP,
        Chart("Keys and values of one sequence", "kv_bytes", "MiB", "context", unit=_MIB),
    ),
    "mixed": (
        Chart("Memory beyond the model, at the peak", "peak_bytes", "MiB", unit=_MIB),
        Chart("Keys and values", "kv_bytes", "MiB", unit=_MIB),
        Chart("Prompt and new tokens", "tokens_per_s", "tokens per second"),
        Chart("Time to the first token of every row", "first_token_s", "seconds"),
    ),
    "chat": (
        Chart("Time to the first token of each answer", "first_token_s", "seconds", "context", "conversation, tokens"),
        Chart("Time per token of each answer", "ms_per_step", "ms per token", "context", "conversation, tokens"),
    ),
    "beam": (
        Chart("Keys and values of 4 beams, at the peak", "peak_kv_bytes", "MiB", "context", unit=_MIB),
        Chart("Time of one step of 4 beams", "ms_per_step", "ms per step", "context"),
    ),
    "fork": (Chart("Time to copy a cache", "ms", "ms", "context"),),
    "allocator": (
        Chart(
            "Time to take and give back a page",
            "us_per_page",
            "µs per page",
            "num_pages",
            "pages of the pool",
            by="num_threads",
            is_logarithmic=True,
        ),
    ),
    "plan": (
        Chart(
            "Time to plan a decoding step of 16 rows",
            "us",
            "µs",
            "num_pages",
            "pages of the pool",
            by="num_rows",
            is_logarithmic=True,
        ),
    ),
    "compile": (Chart("Time of a new process to its first two tokens", "two_tokens_s", "seconds"),),
    "no-cache": (_STEP,),
    "page-size": (
        Chart("Keys and values beyond the minimum", "overhead", "percent", unit=0.01),
        Chart("Time of a step of the batch", "ms_per_step", "ms per step"),
    ),
    "profile": (),  # a table says it better
}
"""The pictures of each scenario."""


def draw(scenario: str, rows: Rows, folder: Path) -> list[Path]:
    """Draw a scenario's charts, for each model one file per chart.

    Args:
        scenario: by name.
        rows: its figures; rows without a chart's figure, such as those of a baseline that failed, are left out.
        folder: where the files go; it is made if it isn't there.

    Returns:
        The files, `SCENARIO-FIGURE.svg`, or `SCENARIO-FIGURE-MODEL.svg` where a scenario ran on several models.
    """
    folder.mkdir(parents=True, exist_ok=True)
    models = list(dict.fromkeys(row.get("model", "") for row in rows))
    paths = []
    for chart in CHARTS[scenario]:
        for model in models:
            drawn = [row for row in rows if row.get("model", "") == model and row.get(chart.y) is not None]
            if not drawn:
                continue
            suffix = f"-{model.replace(' ', '-')}" if len(models) > 1 else ""
            paths.append(folder / f"{scenario}-{chart.y}{suffix}.svg")
            save(chart, drawn, paths[-1], _COLOURS, model)
    return paths
