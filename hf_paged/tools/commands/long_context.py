"""`hf-paged long-context`: tasks over long contexts, answered from several caches."""

import argparse
from dataclasses import asdict
from typing import Any

from hf_paged.tools.commands.arguments import add_command, add_model, listed, prepare
from hf_paged.tools.lab.baselines import CACHES
from hf_paged.tools.lab.model import load_model
from hf_paged.tools.lab.options import add_options, read_options
from hf_paged.tools.lab.provenance import provenance, write_results
from hf_paged.tools.lab.table import table
from hf_paged.tools.long_context import TASKS, Settings, evaluate_long_context

COLUMNS = ("task", "context", "examples", "cache", "score", "same_answers", "total_s", "kv_bytes")


def add(subcommands: Any) -> None:
    """Add `long-context`."""
    parser = add_command(
        subcommands,
        "long-context",
        run,
        "compare the answers from several caches to tasks over long contexts",
        f"\n\ntasks:\n{listed({task.name: task.description for task in TASKS.values()})}",
        f"caches: {', '.join(CACHES)}",
    )
    add_model(parser)
    add_options(parser, Settings)


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, print the table, and write."""
    settings = read_options(Settings, arguments)
    prepare(arguments)
    model = load_model(arguments.model, arguments.dtype, arguments.device)
    results = evaluate_long_context(model, settings)
    print(table(results["rows"], COLUMNS))
    if arguments.json:
        about = {"command": arguments.command, "model": model.name, "settings": asdict(settings)}
        write_results(arguments.json, provenance() | about | results)
