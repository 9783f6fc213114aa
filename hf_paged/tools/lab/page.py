"""Tables of a Markdown page, filled from figures.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Form = Callable[[Any], str]
Column = tuple[str, str, Form]

_MIB = 2**20


def fill(page: str, made: Mapping[str, str]) -> str:
    """Put tables into a page, in place of those that it has.

    Raises:
        ValueError: if the page has a place for a table that there are no results for.
    """

    def replace(match: re.Match[str]) -> str:
        if match[1] not in made:
            raise ValueError(f"The page wants a table of {match[1]!r}, but there are results of {list(made)} only.")
        return f"<!-- table: {match[1]} -->\n\n{made[match[1]]}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (.*?) -->\n.*?<!-- end -->", replace, page, flags=re.DOTALL)


def markdown(rows: Iterable[dict[str, Any]], columns: Sequence[Column]) -> str:
    """Lay rows out in Markdown.

    Args:
        rows: figures by key.
        columns: key, heading and form of each; a row that lacks the key has an empty cell.
    """
    chosen = list(rows)
    shown = [column for column in columns if any(column[0] in row for row in chosen)]
    lines = ["| " + " | ".join(heading for _, heading, _ in shown) + " |", "|---" * len(shown) + "|"]
    for row in chosen:
        cells = (form(row[key]) if key in row else "" for key, _, form in shown)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def digits(count: int) -> Form:
    """Numbers with `count` digits after the point."""
    return lambda value: f"{value:.{count}f}"


def percent(value: float) -> str:
    """0.12 as `12 %`."""
    return f"{100 * value:.0f} %"


def mib(value: int) -> str:
    """Bytes as MiB."""
    return f"{value / _MIB:.1f}"


def answer(value: bool) -> str:
    """Yes or no."""
    return "yes" if value else "no"
