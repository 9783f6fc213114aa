"""`hf-paged audit`: where the memory of a run goes, and whether the system says the same."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_paged.pages.pool import check_page_size
from hf_paged.tools.bench.scenarios.mixed import prompt_lengths
from hf_paged.tools.bench.settings import Settings, load
from hf_paged.tools.commands.arguments import add_model, add_plot, keep, prepare
from hf_paged.tools.evaluation.audit import PASS, AuditStep, MemoryAudit, agreement, overhead_rows
from hf_paged.tools.evaluation.audited_batch import audit_batch
from hf_paged.tools.lab.chart import draw
from hf_paged.tools.lab.options import add_options, count, counts, option
from hf_paged.tools.lab.table import table
from hf_paged.tools.progress import progress

_LINES = {"live": "live", "active": "active", "reserved": "reserved", "padded": "contiguous, padded"}
_BYTES = ("minimum", "live", "active", "wasted", "shared", "reserved", "resident", "padded", "static")
_COLUMNS = ("page_size", "moment", "tokens", *(f"{name}_bytes" for name in _BYTES))


@dataclass(frozen=True)
class Options:
    """What is audited."""

    random_llama: bool = option(False, "a tiny random model of 131,072 positions instead")
    page_size: tuple[int, ...] = option((16, 64, 128), "tokens per page", counts, old_name="--page-sizes")
    prompt_lengths: tuple[int, ...] | None = option(None, "tokens (default: 16 prompts of 16 to 1024)", counts)
    max_new_tokens: int = option(32, "of each row", count)
    num_beams: int = option(1, "of each prompt", count)
    max_length: int | None = option(None, "columns of a static cache (default: those that are used)", count)


def add(parser: Any) -> None:
    """Add what is audited."""
    parser.description += " Beside it stands what contiguous caches would\nhold, and what the system says is resident."
    add_model(parser)
    add_options(parser, Options)
    add_plot(parser)


def run(arguments: argparse.Namespace) -> None:
    """Audit the batch with each page size, printing what comes of it; then write."""
    prepare(arguments)
    page_sizes = [check_page_size(page_size) for page_size in dict.fromkeys(arguments.page_size)]
    about = {name: getattr(arguments, name) for name in ("dtype", "device")}
    model = load(Settings(arguments.model, arguments.random_llama, num_threads=arguments.num_threads, **about))
    lengths = prompt_lengths(arguments.prompt_lengths)
    how = {name: getattr(arguments, name) for name in ("max_new_tokens", "num_beams", "max_length")}
    settings = about | {"prompt_lengths": lengths} | how
    results: dict[str, Any] = {"model": model.name, "settings": settings, "audit": []}
    audits: dict[int, MemoryAudit] = {}
    try:
        for page_size in progress(page_sizes, "audit"):
            audits[page_size] = audit = audit_batch(model, lengths, page_size=page_size, **how)
            steps = [step.row() for step in audit.steps]
            results["audit"].append({"page_size": page_size, "summary": audit.summary(), "steps": steps})
            keep(arguments, results)
            if arguments.plot:
                _draw(steps, page_size, model.name, arguments.plot)
    finally:
        if audits:
            _print(audits)


def _print(audits: dict[int, MemoryAudit]) -> None:
    summaries = {page_size: audit.summary() for page_size, audit in audits.items()}
    print("\nAfter the prompts, where the active pages were furthest from the minimum, and at the end\n")
    print(table((row for size, audit in audits.items() for row in _moments(size, audit.steps)), _COLUMNS))
    print("\nBeyond the minimum: pages held, storage of the pool, DynamicCache (padded), StaticCache (static)\n")
    print(table({"page_size": size} | row for size, each in summaries.items() for row in overhead_rows(each)))
    print()
    for page_size, summary in summaries.items():
        print(f"Pages of {page_size} tokens: {agreement(summary)}")


def _moments(page_size: int, steps: list[AuditStep]) -> list[dict[str, Any]]:
    """Three passes that say most: that of the prompts, the worst, and the last."""
    passes = [step for step in steps if step.event == PASS]
    worst = max(passes, key=lambda step: step.cache.overhead)
    moments = {"prompts": passes[0], "worst": worst, "end": passes[-1]}
    return [{"page_size": page_size, "moment": moment} | step.row() for moment, step in moments.items()]


def _draw(steps: list[dict[str, Any]], page_size: int, model: str, folder: Path) -> None:
    rows = [
        {"step": number, "bytes": figures[f"{key}_bytes"], "kind": name}
        for number, figures in enumerate(figures for figures in steps if figures["event"] == PASS)
        for key, name in _LINES.items()
    ]
    title = f"Keys and values, pages of {page_size} tokens, {model}"
    draw(rows, "bytes", folder / f"audit-{page_size}.svg", title, by="kind")
