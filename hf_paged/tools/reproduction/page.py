"""The page about the reproduction, made from the results files alone."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_paged.tools.bench.report import tables
from hf_paged.tools.lab.page import Column, answer, digits, markdown, mib
from hf_paged.tools.reproduction.claim import CLAIMS, NOT_MEASURED, Results
from hf_paged.tools.reproduction.stage import STAGES

_HEAD = """# The paper's evaluation, run again

*Paged Attention Meets FlexAttention: Unlocking Long-Context Efficiency in Deployed Inference* (Joshi, Saini, Dhillon,
Viros i Martin, El Maghraoui; 2025, arXiv:2506.07311) measures LLaMA models on NVIDIA GPUs. Here is what becomes of its
claims with this package, on the machine named below. `make reproduce` runs everything again and writes this page; each
section names its command. A verdict follows from the figures by the rule beside it.
"""

_SECTIONS: dict[str, tuple[str, str]] = {
    "perplexity-256": (
        "Perplexity",
        "Text is scored chunk after chunk through each cache, so that all but the first chunk of a window depend on "
        "what the cache gives back. The caches take turns on the same chunks.",
    ),
    "latency": (
        "Time against length",
        "One row. `paged-compiled` is `with compiled(model):`. *Times as fast* compares with `dynamic`.",
    ),
    "no-cache": ("Without a cache", "Every token computes everything before it again."),
    "single": (
        "One long sequence",
        "Run in chunks of 1024 tokens; *first token* counts from the point before. A tiny random Llama stands in "
        "where the real model has no more positions.",
    ),
    "mixed": ("A mixed batch of 16", "Prompts of 16 to 1024 tokens, from nothing to the last new token."),
    "chat": (
        "A growing conversation",
        "Each turn adds to the cache of the last; *first token* is the time to read what was said since.",
    ),
    "page-size": ("Page size", "The mixed batch with pages of each size, beside DynamicCache."),
    "audit": (
        "Memory, step by step",
        "The mixed batch, all figures at its last step, in MiB: the tokens alone, the pages held, the pool's storage, "
        "what of it is resident, and what contiguous caches would hold. *Agree*: resident memory and accounting.",
    ),
    "long-context": ("Long contexts", "Tasks over long contexts; the score is the model's, the answers are compared."),
}

_PERPLEXITY: tuple[Column, ...] = (
    ("dtype", "dtype", str),
    ("chunk_size", "tokens at once", str),
    ("num_tokens", "tokens scored", "{:,}".format),
    ("cache", "cache", str),
    ("perplexity", "perplexity", digits(6)),
    ("relative_difference", "difference", "{:.1e}".format),
    ("standard_error", "standard error", "{:.1e}".format),
    ("max_logit_difference", "largest of a logit", "{:.1e}".format),
    ("kl", "KL, nats", "{:.1e}".format),
    ("agreement", "same likeliest token", lambda share: f"{100 * share:.2f} %"),
    ("tokens_per_s", "tokens/s", digits(0)),
)
_AUDIT: tuple[Column, ...] = (
    ("page_size", "page size", str),
    ("minimum_bytes", "tokens alone", mib),
    ("active_bytes", "pages held", mib),
    ("overhead", "beyond", lambda share: f"{100 * share:.1f} %"),
    ("worst", "at worst", lambda share: f"{100 * share:.1f} %"),
    ("reserved_bytes", "reserved", mib),
    ("resident_bytes", "resident", mib),
    ("padded_bytes", "DynamicCache", mib),
    ("static_bytes", "StaticCache", mib),
    ("agrees", "agree", answer),
)
_LONG_CONTEXT: tuple[Column, ...] = (
    ("task", "task", str),
    ("context", "context", str),
    ("examples", "examples", str),
    ("cache", "cache", str),
    ("score", "score", digits(2)),
    ("same_answers", "same answers", answer),
    ("total_s", "seconds", digits(1)),
    ("kv_bytes", "KV cache, MiB", mib),
)


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
    for name, (title, words) in _SECTIONS.items():
        stages = [stage for stage in results if stage == name or (name == "perplexity-256" and "perplexity" in stage)]
        if not stages:
            continue
        parts += [f"\n## {title}\n", f"{words}\n", _commands(results, stages), _table(name, results, made)]
        parts += [f"\n![{picture.stem}]({link}/{picture.name})" for picture in _pictures(folder, name)]
    return "\n".join(parts) + "\n"


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
    lines = ["| claim | by | holds if | verdict | our figures |", "|---|---|---|---|---|"]
    for claim in CLAIMS:
        finding = claim.finding(results)
        verdict = finding.verdict if finding.verdict == NOT_MEASURED else f"**{finding.verdict}**"
        lines.append(f"| {claim.words} | {claim.source} | {claim.rule} | {verdict} | {finding.words} |")
    return "\n".join(lines)


def _commands(results: Results, stages: list[str]) -> str:
    """The commands without where their figures went."""
    lines = []
    for stage in stages:
        words = results[stage]["command"].split()
        for option in ("--json", "--plot"):
            if option in words:
                at = words.index(option)
                del words[at : at + 2]
        lines.append(" ".join(words))
    return "\n".join(f"    {line}" for line in lines) + "\n"


def _table(name: str, results: Results, made: dict[str, str]) -> str:
    match name:
        case "perplexity-256":
            return markdown(_perplexity_rows(results), _PERPLEXITY)
        case "audit":
            return markdown(_audit_rows(results), _AUDIT)
        case "long-context":
            return markdown(results[name]["rows"], _LONG_CONTEXT)
        case "latency":
            return f"{made['latency/latency']}\n\n{made['latency/fits']}"
    return made[f"{name}/{name}"]


def _perplexity_rows(results: Results) -> Iterator[dict[str, Any]]:
    for name, own in results.items():
        if name.startswith("perplexity"):
            about = {key: own["settings"][key] for key in ("dtype", "chunk_size")}
            for row in own["figures"]["figures"]:
                yield about | {"num_tokens": own["figures"]["num_tokens"]} | row


def _audit_rows(results: Results) -> Iterator[dict[str, Any]]:
    for part in results["audit"]["audit"]:
        last = [step for step in part["steps"] if step["event"] == "pass"][-1]
        worst = part["summary"]["overheads"]["active"]["worst"]
        yield {"page_size": part["page_size"], "worst": worst} | last


def _pictures(folder: Path, name: str) -> list[Path]:
    return sorted(folder.glob(f"{name}-*.svg"), key=lambda path: (len(path.stem), path.stem))
