"""`hf-paged long-context`: tasks over long contexts, answered from several caches."""

import argparse
from dataclasses import asdict
from typing import Any

from hf_paged.tools.commands.arguments import add_model, keep, listed, prepare
from hf_paged.tools.lab.baselines import CACHES
from hf_paged.tools.lab.model import load_model
from hf_paged.tools.lab.options import add_options, read_options
from hf_paged.tools.lab.table import table
from hf_paged.tools.long_context import TASKS, Settings, evaluate_long_context

COLUMNS = ("task", "context", "examples", "cache", "score", "same_answers", "total_s", "kv_bytes")


def add(parser: Any) -> None:
    """Add what is evaluated, and how."""
    parser.description += f"\n\ntasks:\n{listed({task.name: task.description for task in TASKS.values()})}"
    parser.epilog = f"caches: {', '.join(CACHES)}"
    add_model(parser)
    add_options(parser, Settings)


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, print the table, and write."""
    settings = read_options(Settings, arguments)
    prepare(arguments)
    model = load_model(arguments.model, arguments.dtype, arguments.device)
    about: dict[str, Any] = {"model": model.name, "settings": asdict(settings)}
    results: dict[str, list[dict[str, Any]]] = {}
    try:
        evaluate_long_context(model, settings, results)
    finally:
        if results.get("rows"):
            print(table(results["rows"], COLUMNS), flush=True)
            keep(arguments, about | results)
