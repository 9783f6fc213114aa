"""`hf-paged long-context`: tasks over long contexts, answered from several caches."""

import argparse
from typing import Any

from hf_paged.pages.pool import PAGE_SIZES
from hf_paged.tools.commands.arguments import add_model, add_place, names, numbers, prepare
from hf_paged.tools.evaluation.long_context import TASKS, Settings, evaluate_long_context
from hf_paged.tools.lab.candidate import CANDIDATES
from hf_paged.tools.lab.provenance import provenance, write_results
from hf_paged.tools.lab.subject import load_subject
from hf_paged.tools.lab.table import table


def add(subcommands: Any) -> None:
    """Add `long-context`."""
    width = max(map(len, TASKS))
    tasks = "\n".join(f"  {task.name:{width}}  {task.description}" for task in TASKS.values())
    parser = subcommands.add_parser(
        "long-context",
        help="compare the answers from several caches to tasks over long contexts",
        description="Do tasks over long contexts with several caches, and compare the answers.\n\n"
        f"tasks (those of LongBench are downloaded):\n{tasks}",
        epilog=f"caches: {', '.join(CANDIDATES)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    default = Settings()
    add_model(parser)
    parser.add_argument("--tasks", type=names, default=default.tasks, metavar="NAME,...", help="see above")
    parser.add_argument("--contexts", type=numbers, default=default.contexts, metavar="N,N,...", help="prompt tokens")
    parser.add_argument("--limit", type=int, default=default.limit, help="examples of each (default: %(default)s)")
    parser.add_argument(
        "--caches", type=names, default=default.caches, metavar="NAME,...", help="the first is the reference"
    )
    parser.add_argument("--page-size", type=int, default=default.page_size, choices=PAGE_SIZES, help="%(default)s")
    parser.add_argument("--batch-size", type=int, default=default.batch_size, help="(default: %(default)s)")
    parser.add_argument("--prefill-chunk-size", type=int, metavar="N", help="of long prompts (default: all at once)")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer (default: the task's own)")
    parser.add_argument("--seed", type=int, default=default.seed, help="of the examples (default: %(default)s)")
    add_place(parser)


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, print the table, and write."""
    settings = Settings(**{name: getattr(arguments, name) for name in Settings.__dataclass_fields__})
    prepare(arguments)
    try:
        subject = load_subject(arguments.model, arguments.dtype, arguments.device)
        results = evaluate_long_context(subject, settings)
    except ModuleNotFoundError as error:
        raise ValueError(str(error)) from error
    print(table(results["rows"]))
    if arguments.json:
        asked = {name: getattr(settings, name) for name in Settings.__dataclass_fields__}
        about = {"command": arguments.command, "model": subject.name, "settings": asked}
        write_results(arguments.json, provenance() | about | results)
