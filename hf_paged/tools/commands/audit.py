"""`hf-paged audit`: where the memory of a run goes, and whether the system says the same."""

import argparse
from pathlib import Path
from typing import Any

from hf_paged.pages.pool import PAGE_SIZES, check_page_size
from hf_paged.tools.bench.mixed import prompt_lengths
from hf_paged.tools.bench.settings import Settings, load
from hf_paged.tools.commands.arguments import add_model, add_place, add_plot, numbers, prepare
from hf_paged.tools.evaluation.audit import PASS, AuditStep, MemoryAudit, agreement, overhead_rows
from hf_paged.tools.evaluation.audited_batch import audit_batch
from hf_paged.tools.lab.chart import Chart, save
from hf_paged.tools.lab.progress import progress
from hf_paged.tools.lab.provenance import provenance, write_results
from hf_paged.tools.lab.table import table

_MIB = 2.0**20
_LINES = {"live": "live", "active": "active", "reserved": "reserved", "padded": "contiguous, padded"}
_BYTES = ("minimum", "live", "active", "wasted", "shared", "reserved", "resident", "padded", "static")


def add(subcommands: Any) -> None:
    """Add `audit`."""
    parser = subcommands.add_parser(
        "audit",
        help="account for the memory of a run, step by step",
        description="Account for the memory of a batch of prompts, step by step, beside what contiguous caches would "
        "hold and what the system says is resident.",
    )
    parser.set_defaults(run=run)
    default = Settings()
    sizes = ",".join(map(str, PAGE_SIZES))
    add_model(parser)
    parser.add_argument("--random-llama", action="store_true", help="a tiny random model of 131,072 positions instead")
    parser.add_argument("--page-sizes", type=numbers, default=(16, 64, 128), metavar="N,N,...", help=f"of {sizes}")
    parser.add_argument("--prompt-lengths", type=numbers, metavar="N,N,...", help="(default: 16 of 16 to 1024 tokens)")
    parser.add_argument("--max-new-tokens", type=int, default=default.max_new_tokens, help="(default: %(default)s)")
    parser.add_argument("--num-beams", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--max-length", type=int, help="of a static cache (default: the columns that are used)")
    add_place(parser)
    add_plot(parser)


def run(arguments: argparse.Namespace) -> None:
    """Audit the batch with each page size, printing what comes of it; then write."""
    prepare(arguments)
    page_sizes = [check_page_size(page_size) for page_size in dict.fromkeys(arguments.page_sizes)]
    settings = Settings(
        model=arguments.model,
        random_llama=arguments.random_llama,
        dtype=arguments.dtype,
        device=arguments.device,
        num_threads=arguments.num_threads,
        prompt_lengths=arguments.prompt_lengths,
    )
    run_settings = {name: getattr(arguments, name) for name in ("max_new_tokens", "num_beams", "max_length")}
    lengths, subject = prompt_lengths(settings), load(settings)
    results: dict[str, Any] = provenance() | {
        "command": arguments.command,
        "model": subject.name,
        "settings": {"dtype": settings.dtype, "device": settings.device, "prompt_lengths": lengths} | run_settings,
        "audit": [],
    }
    audits = {}
    for page_size in progress(page_sizes, "audit"):
        audits[page_size] = audit = audit_batch(subject, lengths, page_size=page_size, **run_settings)
        steps = [step.row() for step in audit.steps]
        results["audit"].append({"page_size": page_size, "summary": audit.summary(), "steps": steps})
        if arguments.json:
            write_results(arguments.json, results)  # after each, so that what is measured is not lost
        if arguments.plot:
            _draw(audit, page_size, subject.name, arguments.plot)
    _print(audits)


def _print(audits: dict[int, MemoryAudit]) -> None:
    summaries = {page_size: audit.summary() for page_size, audit in audits.items()}
    print("\nBytes after the prompts, where the active pages were furthest from the minimum, and at the end\n")
    print(table([row for page_size, audit in audits.items() for row in _moments(page_size, audit.steps)]))
    print("\nBeyond the minimum: pages held, storage of the pool, DynamicCache (padded), StaticCache (static)\n")
    print(table([{"page_size": size} | row for size, each in summaries.items() for row in overhead_rows(each)]))
    print()
    for page_size, summary in summaries.items():
        print(f"Pages of {page_size} tokens: {agreement(summary)}")


def _moments(page_size: int, steps: list[AuditStep]) -> list[dict[str, Any]]:
    """Three passes that say most: that of the prompts, the worst, and the last."""
    passes = [step for step in steps if step.event == PASS]
    worst = max(passes, key=lambda step: step.cache.overhead)
    rows = []
    for moment, step in {"prompts": passes[0], "worst": worst, "end": passes[-1]}.items():
        figures = step.row()
        chosen = {f"{name}_bytes": figures[f"{name}_bytes"] for name in _BYTES}
        rows.append({"page_size": page_size, "moment": moment, "tokens": figures["tokens"]} | chosen)
    return rows


def _draw(audit: MemoryAudit, page_size: int, model: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"step": number, "bytes": figures[f"{key}_bytes"], "kind": name}
        for number, figures in enumerate(step.row() for step in audit.steps if step.event == PASS)
        for key, name in _LINES.items()
    ]
    title = f"Keys and values, pages of {page_size} tokens"
    chart = Chart(title, "bytes", "MiB", "step", "decoding step", unit=_MIB, by="kind")
    save(chart, rows, folder / f"audit-{page_size}.svg", {}, model)
