"""Results as the tables of a page: `python -m hf_paged.tools.bench.report docs/performance.md docs/results/bench`.

The table of `<!-- table: NAME/SCENARIO -->` is that of the results in `NAME.json`.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_paged.tools.bench.race import REFERENCE
from hf_paged.tools.lab.page import Column, answer, digits, fill, markdown, mib, percent

Results = dict[str, Any]


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


def _with_speed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add how many times as fast as the reference a row is, to its first token and in all."""
    references = {_case(row): row for row in rows if row.get("baseline") == REFERENCE}
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
    return row.get("model"), row.get("context")


_LAP = (
    ("context", "context", str),
    ("baseline", "", str),
    ("ms_per_step", "ms per step", digits(1)),
    ("ms_per_step_speed", "times as fast", digits(2)),
    ("first_token_s", "first token, s", digits(2)),
    ("first_token_s_speed", "times as fast", digits(2)),
)
_GROWING = (
    ("model", "model", str),
    *_LAP,
    ("kv_bytes", "KV cache, MiB", mib),
)
_SAME = ("same_tokens", "same tokens", answer)
_ERROR = ("error", "", str)
_COLUMNS: dict[str, Sequence[Column]] = {
    "latency": (*_LAP, ("bandwidth_share", "of the bandwidth", percent), _SAME, _ERROR),
    "single": (*_GROWING, _SAME, _ERROR),
    "chat": (*_GROWING, _SAME, _ERROR),
    "mixed": (
        *_LAP,
        ("total_s", "all, s", digits(1)),
        ("total_s_speed", "times as fast", digits(2)),
        ("tokens_per_s", "tokens/s", digits(0)),
        ("last_tokens_per_s", "last 256, tokens/s", digits(0)),
        ("kv_bytes", "KV cache, MiB", mib),
        ("overhead", "over the minimum", percent),
        ("peak_bytes", "peak over the model, MiB", mib),
        _SAME,
        _ERROR,
    ),
    "peers": (
        ("baseline", "", str),
        ("version", "version", str),
        ("total_s", "all, s", digits(1)),
        ("tokens_per_s", "tokens/s", digits(0)),
        _ERROR,
    ),
    "beam": (
        *_LAP,
        ("peak_kv_bytes", "KV cache at most, MiB", mib),
        ("same_tokens", "same sequences", answer),
        _ERROR,
    ),
    "fork": (
        ("context", "tokens", str),
        ("baseline", "", str),
        ("ms", "ms", digits(3)),
        ("new_bytes", "new MiB", mib),
    ),
    "no-cache": (*_LAP, _SAME, _ERROR),
    "page-size": (
        *_LAP,
        ("total_s", "all, s", digits(1)),
        ("kv_bytes", "KV cache, MiB", mib),
        ("overhead", "over the minimum", percent),
        _SAME,
        _ERROR,
    ),
    "allocator": (
        ("num_pages", "pages", str),
        ("num_threads", "threads", str),
        ("us_per_page", "µs per page", digits(3)),
    ),
    "plan": (("num_pages", "pages", str), ("us", "µs", digits(0))),
    "compile": (
        ("baseline", "", str),
        ("start", "start", str),
        ("first_token_s", "first token, s", digits(1)),
        ("two_tokens_s", "second token after, s", digits(1)),
        ("ms_per_step", "ms per step", digits(1)),
        _ERROR,
    ),
    "profile": (
        ("context", "context", str),
        ("baseline", "", str),
        ("ms_per_step", "ms per step", digits(1)),
        ("profiled_ms", "with the profiler", digits(1)),
        ("linear_ms", "linear layers", digits(1)),
        ("graph_ms", "compiled graph", digits(1)),
        ("attention_ms", "attention", digits(1)),
        ("copies_ms", "copies of KV", digits(1)),
        ("other_operations_ms", "other operations", digits(1)),
        ("guards_ms", "guards", digits(1)),
        ("python_ms", "Python and planning", digits(1)),
    ),
}
_FITS = (
    ("baseline", "", str),
    ("intercept_ms", "ms at length 0", digits(1)),
    ("slope_us", "µs per token of context", digits(2)),
    ("r_squared", "R²", digits(3)),
    ("growth", "128 to 2048", digits(2)),
)


def main(page: Path, folder: Path) -> None:
    """Fill the tables of a page."""
    page.write_text(fill(page.read_text(encoding="utf-8"), tables(folder)), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
