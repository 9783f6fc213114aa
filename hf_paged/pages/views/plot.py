"""A memory map, drawn by matplotlib."""

import importlib.util
from typing import TYPE_CHECKING, Any

from hf_paged.pages.views.memory_map import COLORS, WORDS, MappedGroup, MemoryMap

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot(memory_map: MemoryMap) -> "Figure":
    """Draw each row of the batch as a bar along its tokens, a rectangle for each page, filled as far as it is used.

    Returns:
        A figure with axes for each group of layers. A notebook shows it; `savefig` writes it.

    Raises:
        ModuleNotFoundError: if matplotlib isn't installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            "plot() draws with matplotlib, which is not installed here. Run: pip install matplotlib. Without it, "
            "print(cache.memory_map()) draws the same as text.",
            name="matplotlib",
        )
    from matplotlib.figure import Figure

    heights = [1.2 + 0.25 * len(group.rows) for group in memory_map.groups]
    figure = Figure(figsize=(8.0, sum(heights)), layout="constrained")
    all_axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, group in zip(all_axes, memory_map.groups, strict=True):
        _draw(axes, group)
    return figure


def _draw(axes: Any, group: MappedGroup) -> None:
    size = group.page_size
    labels = dict(WORDS)
    for number, row in enumerate(group.rows):
        where = (number - 0.4, 0.8)
        pages = [(place * size, group.pages[page]) for place, page in enumerate(row.pages, row.start // size)]
        axes.broken_barh([(left, size) for left, _ in pages], where, color=COLORS["free"], edgecolor="white")
        for kind in dict.fromkeys(page.kind for _, page in pages):
            # What has left a window is missing at the beginning of a page.
            starts = [(max(left, row.start), left, page) for left, page in pages if page.kind == kind]
            bars = [(start, min(page.fill * size, left + size - start)) for start, left, page in starts]
            axes.broken_barh(bars, where, color=COLORS[kind], edgecolor="white", label=labels.pop(kind, None))
    axes.set_title(group.title, loc="left")
    axes.set(xlabel="tokens", ylabel="row")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.invert_yaxis()
    if len(labels) < len(WORDS):
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
