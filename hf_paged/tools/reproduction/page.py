"""The page about the reproduction, made from the results files alone."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_paged.tools.bench.report import tables
from hf_paged.tools.commands import long_context, ppl
from hf_paged.tools.lab.table import table
from hf_paged.tools.reproduction.claim import CLAIMS, NOT_MEASURED, Results
from hf_paged.tools.reproduction.stage import STAGES

_HEAD = """# The paper's evaluation, run again

*Paged Attention Meets FlexAttention: Unlocking Long-Context Efficiency in Deployed Inference* (Joshi, Saini, Dhillon,
Viros i Martin, El Maghraoui; 2025, arXiv:2506.07311) measures LLaMA models on NVIDIA GPUs. Here is what becomes of its
claims with this package, on the machine named below. `make reproduce` runs everything again and writes this page; each
section names its command. A verdict follows from the figures by the rule beside it.
"""

_HELD = ("minimum", "active", "reserved", "resident", "padded", "static")
_AUDIT = ("page_size", *(f"{name}_bytes" for name in _HELD), "overhead", "worst_overhead", "agrees")


def read_results(folder: Path) -> Results:
    """Read the results files of all stages that were run."""
    paths = {stage.name: stage.path(folder) for stage in STAGES}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.is_file()}


def make_page(folder: Path, page_folder: Path) -> str:
    """Make the page.

    Args:
        folder: has the results files and the pictures.
        page_folder: where the page will be, which its links begin from.
    """
    results = read_results(folder)
    link = Path(os.path.relpath(folder, page_folder)).as_posix()
    parts = [_HEAD, *_machines(results), "## Claims\n", _claims(results)]
    made = tables(folder)
    for stage in STAGES:
        names = [name for name in results if name == stage.name or _is_perplexity(name, stage.name)]
        if not stage.title or not names:
            continue
        parts += [f"\n## {stage.title}\n", f"{stage.words}\n", *(f"    {_command(results[name])}" for name in names)]
        parts += ["", "\n\n".join(_tables(stage.name, results, made))]
        pictures = sorted(folder.glob(f"{stage.name}-*.svg"), key=lambda path: (len(path.stem), path.stem))
        parts += [f"\n![{picture.stem}]({link}/{picture.name})" for picture in pictures]
    return "\n".join(parts) + "\n"


def _is_perplexity(*names: str) -> bool:
    return all(name.startswith("perplexity") for name in names)


def _machines(results: Results) -> Iterator[str]:
    """Where the figures come from; a line for each set of machine, versions and commit."""
    stages: dict[str, list[str]] = {}
    for name, own in results.items():
        versions = ", ".join(f"{package} {version}" for package, version in own["versions"].items())
        place = f"{own['machine']}, {own['num_threads']} threads; {versions}; commit {own['commit']}"
        stages.setdefault(place, []).append(name)
    for place, names in stages.items():
        yield f"{', '.join(names)}: {place}.\n" if len(stages) > 1 else f"Measured on {place}.\n"


def _claims(results: Results) -> str:
    rows = []
    for claim in CLAIMS:
        verdict, figures = claim.finding(results)
        shown = verdict if verdict == NOT_MEASURED else f"**{verdict}**"
        about = {"claim": claim.words, "by": claim.source, "holds if": claim.rule}
        rows.append(about | {"verdict": shown, "our figures": figures})
    return table(rows, markdown=True)


def _command(results: dict[str, Any]) -> str:
    """The command without where its figures went."""
    words = results["command"].split()
    for option in ("--json", "--plot"):
        if option in words:
            at = words.index(option)
            del words[at : at + 2]
    return " ".join(words)


def _tables(name: str, results: Results, made: dict[str, str]) -> list[str]:
    if _is_perplexity(name):
        return [table(_perplexity_rows(results), ("dtype", "chunk_size", "num_tokens", *ppl.COLUMNS), markdown=True)]
    if name == "audit":
        return [table(_audit_rows(results), _AUDIT, markdown=True)]
    if name == "long-context":
        return [table(results[name]["rows"], long_context.COLUMNS, markdown=True)]
    return [text for key, text in made.items() if key.startswith(f"{name}/") and key != "no-cache/fits"]


def _perplexity_rows(results: Results) -> Iterator[dict[str, Any]]:
    for name, own in results.items():
        if _is_perplexity(name):
            about = {key: own["settings"][key] for key in ("dtype", "chunk_size")}
            for row in own["figures"]["figures"]:
                yield about | {"num_tokens": own["figures"]["num_tokens"]} | row


def _audit_rows(results: Results) -> Iterator[dict[str, Any]]:
    for part in results["audit"]["audit"]:
        last = [step for step in part["steps"] if step["event"] == "pass"][-1]
        worst = part["summary"]["overheads"]["active"]["worst"]
        yield {"page_size": part["page_size"], "worst_overhead": worst} | last
