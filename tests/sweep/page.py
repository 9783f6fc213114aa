"""docs/families.md, made from what a sweep left: `python -m tests.sweep.page > docs/families.md`."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

from tests.sweep.checks import TOLERANCE
from tests.sweep.results import RESULTS, Results

PAGE = Path(__file__).parent.parent.parent / "docs" / "families.md"

COLUMNS = {
    "uncompiled": "`paged_flex`",
    "turns": "second turn",
    "prefill": "`prefill`",
    "compiled": "`compiled`",
    "gathered": "`sdpa` or `eager`",
}
KINDS = {
    "causal": "Causal language models",
    "seq2seq": "Encoder-decoders",
    "vision-language": "Vision and language",
    "speech": "Speech",
    "multimodal": "Several media",
}
SAME, NONE, NOT_RUN = "same tokens", "not compared", "not run"

INTRODUCTION = """# Model families

What a `PagedCache` does in place of a `DynamicCache`, for every class of Transformers that generates tokens and can be
made tiny from its configuration. The oracle is `DynamicCache` with `sdpa`, or `eager` where the class has no `sdpa`:
tokens are the same and the logits of every step within {tolerance:g} of the largest. An error counts as clear if it is
a `ValueError` of this package that says what to do. Most of the others are raised by Transformers, where a class looks
its attention up by name ([Troubleshoot](how-to/troubleshoot.md)).

- **`paged_flex`**: `generate()` of one row, a left-padded batch of three, two beams, an image and sound, if the class
  takes any of the shapes that the sweep knows.
- **second turn**: three rows that go on with a right-padded turn; a copy of a cache that goes on with another text.
- **`prefill`**: `cache.prefill(model, **inputs)` before `generate()`.
- **`compiled`**: `generate()` within `with compiled(model)`.
- **`sdpa` or `eager`**: the attention of the oracle over a `PagedCache`.

`make families` runs the sweep; [its results](results/families.json) name each case, and what every error said. It ran
with {versions}.

"""


def page(results: Results) -> str:
    """Render the whole page."""
    built = {name: entry for name, entry in results.models.items() if "not built" not in entry}
    lines = [
        INTRODUCTION.format(
            tolerance=TOLERANCE,
            versions=", ".join(f"{name} {version}" for name, version in results.versions.items()),
        ).rstrip("\n"),
        "",
        *_counts(built),
        "",
        _over_pages([entry for entry in built.values() if entry["kind"] == "causal" and entry["cases"]]),
    ]
    for kind, title in KINDS.items():
        rows = {name: entry for name, entry in built.items() if entry["kind"] == kind}
        if rows:
            lines += ["", f"## {title}", "", *_table(rows)]
    lines += ["", "## What raises, and why", "", *_messages(built, "error")]
    lines += ["", "## Same tokens, with a note", "", *_messages(built, SAME)]
    uncompared = {name: entry for name, entry in built.items() if not entry["cases"]}
    lines += [
        "",
        "## Not compared",
        "",
        "`DynamicCache` itself fails with these, so that there is nothing to be the same as.",
        "",
    ]
    lines += [
        f"- {name}: {_short(next(iter(entry['refused by DynamicCache'].values()), ''))}"
        for name, entry in uncompared.items()
    ]
    missing = {name: entry["not built"] for name, entry in results.models.items() if "not built" in entry}
    lines += ["", "## Not built", "", "No tiny model could be made of these.", ""]
    lines += [f"- {name}: {_short(reason)}" for name, reason in missing.items()]
    return "\n".join(lines) + "\n"


def outcome(found: dict[str, Any] | None) -> str:
    """What a cell says: the outcome that all cases have, or each other one with its cases."""
    if found is None:
        return NOT_RUN
    if not found:
        return NONE
    cases: dict[str, list[str]] = {}
    for case, finding in found.items():
        cases.setdefault(_outcome(finding), []).append(case)
    if len(cases) == 1:
        return next(iter(cases))
    return "; ".join(f"{what} ({', '.join(names)})" for what, names in cases.items() if what != SAME)


def _outcome(finding: Any) -> str:
    return finding if isinstance(finding, str) else finding["outcome"]


def _counts(models: dict[str, Any]) -> list[str]:
    """A table of how many classes have which outcome at worst."""
    outcomes = [SAME, "clear error", "unclear error", "no end", "wrong tokens", NONE, NOT_RUN]
    counts = {mode: Counter(_worst(entry, mode, outcomes) for entry in models.values()) for mode in COLUMNS}
    lines = _row([f"{len(models)} classes, at worst", *COLUMNS.values()]), _row(["---"] * (1 + len(COLUMNS)))
    rows = [[what, *(str(counts[mode][what]) for mode in COLUMNS)] for what in outcomes]
    return [*lines, *(_row(row) for row in rows if any(cell != "0" for cell in row[1:]))]


def _over_pages(models: list[dict[str, Any]]) -> str:
    """How many causal language models keep their tokens in pages, and how many of them read these in place."""
    found = [[entry.get("modes", {}).get(mode) for mode in ("uncompiled", "gathered")] for entry in models]
    works = [[bool(cases) and set(map(_outcome, cases.values())) == {SAME} for cases in each] for each in found]
    in_place, at_all = sum(first for first, _ in works), sum(map(any, works))
    return (
        f"{at_all} of the {len(models)} causal language models that could be compared work over pages, {in_place} of "
        "them with `paged_flex`, the others with `sdpa` or `eager`."
    )


def _worst(entry: dict[str, Any], mode: str, outcomes: list[str]) -> str:
    found = entry.get("modes", {}).get(mode)
    if found is None:
        return NOT_RUN
    return max((_outcome(finding) for finding in found.values()), key=outcomes.index, default=NONE)


def _table(models: dict[str, Any]) -> list[str]:
    lines = [_row(["class", "what it has", *COLUMNS.values()]), _row(["---"] * (2 + len(COLUMNS)))]
    for name, entry in models.items():
        cells = [outcome(entry.get("modes", {}).get(mode)) for mode in COLUMNS]
        lines.append(_row([name, ", ".join(entry["has"]), *cells]))
    return lines


def _row(cells: list[str]) -> str:
    return ("| " + " | ".join(cells) + " |").replace("|  |", "| |")


def _messages(models: dict[str, Any], kind: str) -> list[str]:
    """Each message once, without the names and numbers of single models."""
    names: dict[str, list[str]] = {}
    for name, entry in models.items():
        for found in entry.get("modes", {}).values():
            for finding in found.values():
                if isinstance(finding, dict) and kind in finding["outcome"]:
                    message = re.sub(
                        r"\d+", "N", finding["message"].replace(name, "MODEL").replace(f"{entry['model_type']!r} ", "")
                    )
                    names.setdefault(message, []).append(name)
    lines = []
    for message, of in sorted(names.items(), key=lambda item: (-len(set(item[1])), item[0])):
        distinct = list(dict.fromkeys(of))
        some = ", ".join(distinct[:8]) + (f" and {len(distinct) - 8} more" if len(distinct) > 8 else "")
        lines.append(f"- {_short(message)} ({some})")
    return lines


def _short(text: str) -> str:
    text = " ".join(text.split())
    text = text if len(text) <= 300 else text[:297] + "…"
    return "`" + text.replace("`", "'").replace("|", "/") + "`"


if __name__ == "__main__":
    print(page(Results(RESULTS)), end="")
