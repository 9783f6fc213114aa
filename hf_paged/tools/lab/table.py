"""Figures as tables, for a terminal and for pages."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tabulate import DataRow, TableFormat, tabulate

Row = Mapping[str, Any]

_MIB = 2**20
_COLUMNS = {
    "baseline": ("", ""),
    "error": ("", ""),
    "bytes": ("MiB", ".1f"),
    "ms_per_step": ("ms per step", ".1f"),
    "ms_per_step_speed": ("times as fast", ".2f"),
    "first_token_s_speed": ("times as fast", ".2f"),
    "total_s_speed": ("times as fast", ".2f"),
    "later_s_speed": ("times as soon", ".2f"),
    "speed": ("times as fast", ".2f"),
    "same": ("same tokens", ".0%"),
    "same_tokens": ("same answers", ".0%"),
    "pages_over_least": ("pages over the least", ".2f"),
    "total_s": ("all, s", ".1f"),
    "two_tokens_s": ("second token after, s", ".1f"),
    "bandwidth_share": ("of the bandwidth", ".0%"),
    "busy_share": ("GPU busy", ".0%"),
    "num_rows": ("rows", ""),
    "ms_per_step_without": ("ms per step without it", ".1f"),
    "ratio": ("ratio", ".2f"),
    "kernel_ms": ("kernels, ms", ".1f"),
    "tokens_per_s": ("tokens/s", ".0f"),
    "last_tokens_per_s": ("last 256, tokens/s", ".0f"),
    "kv_bytes": ("KV cache, MiB", ".1f"),
    "peak_kv_bytes": ("KV cache at most, MiB", ".1f"),
    "peak_bytes": ("peak over the model, MiB", ".1f"),
    "overhead": ("over the minimum", ".1%"),
    "worst_overhead": ("at worst", ".1%"),
    "num_pages": ("pages", ""),
    "num_threads": ("threads", ""),
    "us_per_page": ("µs per page", ".3f"),
    "limit_us": ("at best, µs", ".1f"),
    "us": ("µs", ".0f"),
    "profiled_ms": ("with the profiler", ".1f"),
    "python_ms": ("Python and planning", ".1f"),
    "intercept_ms": ("ms at length 0", ".1f"),
    "slope_us": ("µs per token of context", ".2f"),
    "r_squared": ("R²", ".3f"),
    "growth": ("128 to 2048", ".2f"),
    "perplexity": ("perplexity", ".6f"),
    "agreement": ("same likeliest token", ".2%"),
    "score": ("score", ".2f"),
    "num_tokens": ("tokens scored", ","),
    "chunk_size": ("tokens at once", ""),
    "kl": ("KL, nats", ".1e"),
}
"""Heading and format of a column by its key, where they don't follow from the end of the key."""

_ROW = DataRow("| ", " | ", " |")
_MARKDOWN = TableFormat(None, lambda widths, _: "|---" * len(widths) + "|", None, None, _ROW, _ROW, 0, None)
_ENDS = {"_bytes": (", MiB", ".2f"), "_ms": (", ms", ".1f"), "_s": (", s", ".2f")}


def table(rows: Iterable[Row], keys: Sequence[str] | None = None, markdown: bool = False) -> str:
    """Lay rows out.

    A row with `{"context": 128, "ms_per_step": 61.2345, "kv_bytes": 3145728}` reads `128  61.2  3.0` under
    `context  ms per step  KV cache, MiB`.

    Args:
        rows: figures by key; an empty cell is where a row lacks one.
        keys: of the columns, in their order; columns that no row has are left out. None: all, as they appear.
        markdown: for a page instead of a terminal.
    """
    rows = list(rows)
    there = dict.fromkeys(key for row in rows for key in row)
    shown = [key for key in (there if keys is None else keys) if key in there]
    cells = [[_cell(key, row.get(key)) for key in shown] for row in rows]
    headings = [column(key)[0] for key in shown]
    if markdown:
        how: dict[str, Any] = {"tablefmt": _MARKDOWN, "stralign": None, "numalign": None}
    else:
        sides = ["left" if any(isinstance(row.get(key), str) for row in rows) else "right" for key in shown]
        how = {"tablefmt": "plain", "colalign": sides}
    made: str = tabulate(cells, headings, disable_numparse=True, **how)
    return made


def column(key: str) -> tuple[str, float, str]:
    """Heading of a column, what its numbers are divided by, and their format."""
    unit = _MIB if key.endswith("bytes") else 1.0
    if key in _COLUMNS:
        heading, form = _COLUMNS[key]
        return heading, unit, form
    for end, (words, form) in _ENDS.items():
        if key.endswith(end):
            return key.removesuffix(end).replace("_", " ") + words, unit, form
    return key.replace("_", " "), unit, ""


def _cell(key: str, value: Any) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case float() | int():
            _, unit, form = column(key)
            return format(value / unit if unit > 1 else value, form or (".1e" if isinstance(value, float) else ""))
    return str(value)
