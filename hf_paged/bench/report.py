"""Results as the tables of a page: `python -m hf_paged.bench.report docs/performance.md docs/results/bench`.

A table stands between `<!-- table: NAME/SCENARIO -->`, for the results in `NAME.json`, and `<!-- end -->`.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from hf_paged.bench.race import REFERENCE

Results = dict[str, Any]
Form = Callable[[Any], str]

_MIB = 2**20


def tables(folder: Path) -> dict[str, str]:
    """Make a Markdown table of each scenario that a folder has results of.

    Args:
        folder: with the JSON files that `hf-paged bench --json` wrote, any number of scenarios in each.

    Returns:
        Tables by file and scenario, as in `"two-threads/latency"`; the lines through the times of `latency` are
        `"two-threads/fits"`.
    """
    made: dict[str, str] = {}
    for path in sorted(folder.glob("*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        for name in results.keys() & _COLUMNS.keys():
            made[f"{path.stem}/{name}"] = markdown(_with_speed(results[name]["rows"]), _COLUMNS[name])
        if "latency" in results:
            made[f"{path.stem}/fits"] = markdown(results["latency"]["fits"], _FITS)
    return made


def fill(page: str, made: dict[str, str]) -> str:
    """Put tables into a page, in place of those that it has.

    Raises:
        ValueError: if the page has a place for a table that there are no results for.
    """

    def replace(match: re.Match[str]) -> str:
        if match[1] not in made:
            raise ValueError(f"The page wants a table of {match[1]!r}, but there are results of {list(made)} only.")
        return f"<!-- table: {match[1]} -->\n\n{made[match[1]]}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (.*?) -->\n.*?<!-- end -->", replace, page, flags=re.DOTALL)


def markdown(rows: Iterable[dict[str, Any]], columns: Sequence[tuple[str, str, Form]]) -> str:
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


def _with_speed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add how many times as fast as the reference a row is, to its first token and in all."""
    references = {_case(row): row for row in rows if row.get("contender") == REFERENCE}
    extended = []
    for row in rows:
        reference = references.get(_case(row), {})
        speeds = {
            f"{key}_speed": reference[key] / row[key]
            for key in ("ms_per_step", "first_token_s", "total_s")
            if row.get(key) and reference.get(key)
        }
        extended.append(row | speeds)
    return extended


def _case(row: dict[str, Any]) -> Any:
    return row.get("context"), row.get("turn")


def _digits(count: int) -> Form:
    return lambda value: f"{value:.{count}f}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _mib(value: int) -> str:
    return f"{value / _MIB:.1f}"


def _answer(value: bool) -> str:
    return "yes" if value else "no"


_LAP = (
    ("context", "context", str),
    ("contender", "", str),
    ("ms_per_step", "ms per step", _digits(1)),
    ("ms_per_step_speed", "times as fast", _digits(2)),
    ("first_token_s", "first token, s", _digits(2)),
    ("first_token_s_speed", "times as fast", _digits(2)),
)
_SAME = ("same_tokens", "same tokens", _answer)
_ERROR = ("error", "", str)
_COLUMNS: dict[str, Sequence[tuple[str, str, Form]]] = {
    "latency": (*_LAP, ("bandwidth_share", "of the bandwidth", _percent), _SAME, _ERROR),
    "mixed": (
        *_LAP,
        ("total_s", "all, s", _digits(1)),
        ("total_s_speed", "times as fast", _digits(2)),
        ("tokens_per_s", "tokens/s", _digits(0)),
        ("last_tokens_per_s", "last 256, tokens/s", _digits(0)),
        ("kv_bytes", "KV cache, MiB", _mib),
        ("overhead", "over the minimum", _percent),
        ("peak_bytes", "peak over the model, MiB", _mib),
        _SAME,
        _ERROR,
    ),
    "beam": (
        *_LAP,
        ("peak_kv_bytes", "KV cache at most, MiB", _mib),
        ("same_tokens", "same sequences", _answer),
        _ERROR,
    ),
    "fork": (
        ("context", "tokens", str),
        ("contender", "", str),
        ("ms", "ms", _digits(3)),
        ("new_bytes", "new MiB", _mib),
    ),
    "no-cache": (*_LAP, _SAME, _ERROR),
    "allocator": (
        ("num_pages", "pages", str),
        ("num_threads", "threads", str),
        ("us_per_page", "µs per page", _digits(3)),
    ),
    "plan": (("num_pages", "pages", str), ("us", "µs", _digits(0))),
    "compile": (
        ("contender", "", str),
        ("start", "start", str),
        ("first_token_s", "first token, s", _digits(1)),
        ("two_tokens_s", "second token after, s", _digits(1)),
        ("ms_per_step", "ms per step", _digits(1)),
        _ERROR,
    ),
    "profile": (
        ("context", "context", str),
        ("contender", "", str),
        ("ms_per_step", "ms per step", _digits(1)),
        ("profiled_ms", "with the profiler", _digits(1)),
        ("linear_ms", "linear layers", _digits(1)),
        ("graph_ms", "compiled graph", _digits(1)),
        ("attention_ms", "attention", _digits(1)),
        ("copies_ms", "copies of KV", _digits(1)),
        ("other_operations_ms", "other operations", _digits(1)),
        ("guards_ms", "guards", _digits(1)),
        ("python_ms", "Python and planning", _digits(1)),
    ),
}
_FITS = (
    ("contender", "", str),
    ("intercept_ms", "ms at length 0", _digits(1)),
    ("slope_us", "µs per token of context", _digits(2)),
    ("r_squared", "R²", _digits(3)),
    ("growth", "128 to 2048", _digits(2)),
)


def main(page: Path, folder: Path) -> None:
    """Fill the tables of a page."""
    page.write_text(fill(page.read_text(encoding="utf-8"), tables(folder)), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
