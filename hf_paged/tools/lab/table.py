"""Figures as a table of plain text."""

from collections.abc import Sequence
from typing import Any


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay rows out, a column for each key in the order of appearance; bytes as MiB.

    A row with `{"context": 128, "ms_per_step": 61.2345, "kv_bytes": 3145728}` reads `128  61.23  3.00` under
    `context  ms_per_step  kv_MiB`.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [[_heading(name) for name in names]]
    lines += [[_cell(name, row.get(name)) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    is_text = [any(isinstance(row.get(name), str) for row in rows) for name in names]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(line, widths, is_text, strict=True)
        ).rstrip()
        for line in lines
    )


def _heading(name: str) -> str:
    return name.removesuffix("bytes") + "MiB" if name.endswith("bytes") else name


def _cell(name: str, value: Any) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case str():
            return value
        case _ if name.endswith("bytes"):
            return f"{value / 2**20:.2f}"
        case float():
            return f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"
    return str(value)
