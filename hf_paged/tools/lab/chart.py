"""A picture of figures: lines, or bars.

Lines and bars carry their names themselves, and axes begin at zero. The colours are those of Okabe and Ito (2008),
which people see apart whatever their eyes, with dark gold for their yellow, which is too light to read, and grey.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[dict[str, Any]]

PALETTE = (
    "#000000",
    "#6A51A3",
    "#E69F00",
    "#CC79A7",
    "#56B4E9",
    "#009E73",
    "#7F7F7F",
    "#D55E00",
    "#B8860B",
    "#0072B2",
)
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
    by: str = "baseline"
    is_logarithmic: bool = False


def save(chart: Chart, rows: Rows, path: Path, colours: Mapping[str, str], model: str = "") -> None:
    """Draw one picture.

    Args:
        chart: what it shows.
        rows: figures by key, each with the chart's.
        path: of the file, whose suffix is its format.
        colours: of the lines or bars, by name; others get one of the palette.
        model: for the title; empty where all figures are of the same one.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # Text stays text, which is small and can be searched; ids are the same in every run, for the sake of diffs.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hf-paged", "font.size": 10, "text.color": _INK}):
        figure = Figure(figsize=(7.0, 4.0), layout="constrained")
        axes = figure.add_subplot()
        if chart.x is None:
            _bars(axes, chart, rows, colours)
        else:
            _lines(axes, chart, chart.x, rows, colours)
        axes.set_title(chart.title + (f", {model}" if model else ""), loc="left", fontsize=12)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.tick_params(which="both", colors=_INK, length=0)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _lines(axes: "Axes", chart: Chart, x: str, rows: Rows, colours: Mapping[str, str]) -> None:
    ends = []
    for index, name in enumerate(dict.fromkeys(row[chart.by] for row in rows)):
        points = sorted((row[x], row[chart.y] / chart.unit) for row in rows if row[chart.by] == name)
        colour = colours.get(name, PALETTE[-1 - index % len(PALETTE)])
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


def _bars(axes: "Axes", chart: Chart, rows: Rows, colours: Mapping[str, str]) -> None:
    names = [" ".join(filter(None, (row[chart.by], row.get("start")))) for row in rows]
    sizes = [row[chart.y] / chart.unit for row in rows]
    bars = axes.barh(names, sizes, color=[colours.get(row[chart.by], PALETTE[-1]) for row in rows], height=0.6)
    axes.bar_label(bars, fmt=lambda size: f"{size:.3g}" if size < 100 else f"{size:,.0f}", padding=4, color=_INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(sizes))
    axes.set_xlabel(chart.label)
