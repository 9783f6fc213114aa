"""A picture of figures: lines, or bars."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_paged.tools.lab.table import Row, column

AXES = ("context", "num_pages", "step")
"""Keys of the numbers that lines go along, where rows have one; without, there is a bar for each row."""


def draw(rows: Sequence[Row], y: str, path: Path, title: str, by: str = "baseline") -> None:
    """Draw a figure, its axes from zero on.

    Args:
        rows: figures by key; those that lack this one are left out.
        y: key of the figure.
        path: of the file, whose suffix is its format.
        title: of the picture.
        by: key that names a line or bar.
    """
    # Not above: only pictures need them.
    import matplotlib as mpl
    import pandas as pd
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.get(y) is not None]
    if not rows:
        return
    frame: Any = pd.DataFrame(rows)
    heading, unit, _ = column(y)
    axes: Any = Figure(figsize=(7.0, 4.0), layout="constrained").subplots()
    x = next((key for key in AXES if key in frame), None)
    if x is None:
        frame.set_index(by)[y].div(unit)[::-1].plot.barh(ax=axes, xlabel=heading, ylabel="")
        axes.bar_label(axes.containers[0], fmt="{:,.4g}", padding=4)
        axes.margins(x=0.1)
    else:
        lines = frame.pivot_table(y, x, by, sort=False).sort_index().div(unit)
        lines.plot(ax=axes, marker="o", grid=True, ylabel=heading, ylim=(0, 1.08 * lines.max(axis=None)))
        axes.set_xlabel(column(x)[0])
        axes.set_xscale("log" if x == "num_pages" else "linear")
    axes.set_title(title, loc="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Text stays text, which is small and can be searched; ids are the same in every run, for the sake of diffs.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hf-paged"}):
        axes.figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
