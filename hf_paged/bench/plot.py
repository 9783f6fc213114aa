"""Pictures of the figures, as SVG.

Lines and bars carry their names themselves, axes begin at zero, and a contender has the same colour everywhere. The
colours are those of Okabe and Ito (2008), which people see apart whatever their eyes, with dark gold for their yellow,
which is too light to read, and grey.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_paged.bench.contenders import CONTENDERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[dict[str, Any]]

_PALETTE = ("#000000", "#E69F00", "#CC79A7", "#56B4E9", "#009E73", "#7F7F7F", "#D55E00", "#B8860B", "#0072B2")
_COLOURS = dict(zip(CONTENDERS, _PALETTE, strict=True))
_INK = "#333333"


@dataclass(frozen=True)
class Chart:
    """What one picture shows.

    Attributes:
        title: a sentence's worth of what is seen.
        y: key of the rows whose numbers are drawn.
        label: of the y axis, with its unit.
        x: key of the numbers that lines go along; None: one bar for each row.
        x_label: of the x axis.
        unit: divides the numbers.
        by: key of the rows that names a line or bar.
        is_logarithmic: whether x goes by factors.
    """

    title: str
    y: str
    label: str
    x: str | None = None
    x_label: str = "context, tokens"
    unit: float = 1.0
    by: str = "contender"
    is_logarithmic: bool = False


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
    "profile": (),  # a table says it better
}
"""The pictures of each scenario."""


def draw(scenario: str, rows: Rows, folder: Path) -> list[Path]:
    """Draw a scenario's charts, for each model one file per chart.

    Args:
        scenario: by name.
        rows: its figures; rows without a chart's figure, such as those of a contender that failed, are left out.
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
            _save(chart, drawn, model, paths[-1])
    return paths


def _save(chart: Chart, rows: Rows, model: str, path: Path) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # Text stays text, which is small and can be searched; ids are the same in every run, for the sake of diffs.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hf-paged", "font.size": 10, "text.color": _INK}):
        figure = Figure(figsize=(7.0, 4.0), layout="constrained")
        axes = figure.add_subplot()
        if chart.x is None:
            _bars(axes, chart, rows)
        else:
            _lines(axes, chart, chart.x, rows)
        axes.set_title(chart.title + (f", {model}" if model else ""), loc="left", fontsize=12)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.tick_params(which="both", colors=_INK, length=0)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _lines(axes: "Axes", chart: Chart, x: str, rows: Rows) -> None:
    ends = []
    for index, name in enumerate(dict.fromkeys(row[chart.by] for row in rows)):
        points = sorted((row[x], row[chart.y] / chart.unit) for row in rows if row[chart.by] == name)
        colour = _COLOURS.get(name, _PALETTE[-1 - index % len(_PALETTE)])
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, linewidth=1.8, clip_on=False)
        label = name if isinstance(name, str) else _counted(name, chart.by)
        ends.append((points[-1][1], points[-1][0], label, colour))
    if chart.is_logarithmic:
        axes.set_xscale("log")
    else:
        axes.set_xlim(left=0)
    highest = max(row[chart.y] for row in rows) / chart.unit
    axes.set_ylim(0, 1.08 * highest)
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.label)
    axes.yaxis.grid(True, color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    ends.sort()
    heights = apart([height for height, *_ in ends], 0.06 * highest)
    for y, (_, at, label, colour) in zip(heights, ends, strict=True):
        axes.annotate(
            label,
            (at, y),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            annotation_clip=False,
        )


def _counted(count: int, key: str) -> str:
    """`(1, "num_threads")` as `1 thread`."""
    things = key.removeprefix("num_")
    return f"{count} {things.removesuffix('s') if count == 1 else things}"


def apart(heights: Sequence[float], distance: float) -> list[float]:
    """Move ascending heights up so that they lie apart: (1, 1.1, 5) with a distance of 1 gives (1, 2, 5)."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + distance) if placed else height)
    return placed


def _bars(axes: "Axes", chart: Chart, rows: Rows) -> None:
    names = [" ".join(filter(None, (row[chart.by], row.get("start")))) for row in rows]
    sizes = [row[chart.y] / chart.unit for row in rows]
    bars = axes.barh(names, sizes, color=[_COLOURS.get(row[chart.by], _PALETTE[-1]) for row in rows], height=0.6)
    axes.bar_label(bars, fmt=lambda size: f"{size:.3g}" if size < 100 else f"{size:,.0f}", padding=4, color=_INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(sizes))
    axes.set_xlabel(chart.label)
