"""`hf-paged bench`: speed and memory beside Transformers' own caches."""

import argparse
import sys
from typing import Any

from hf_paged.pages.pool import PAGE_SIZES
from hf_paged.tools.bench.baselines import BASELINES
from hf_paged.tools.bench.plot import draw
from hf_paged.tools.bench.scenarios import DESCRIPTIONS, WITH_MODEL, WITHOUT_MODEL
from hf_paged.tools.bench.settings import Settings, load
from hf_paged.tools.commands.arguments import add_place, add_plot, names, numbers, prepare
from hf_paged.tools.lab.provenance import provenance, write_results
from hf_paged.tools.lab.table import table


def add(subcommands: Any) -> None:
    """Add `bench`."""
    width = max(map(len, DESCRIPTIONS))
    scenarios = "\n".join(f"  {name:{width}}  {line}" for name, line in DESCRIPTIONS.items())
    parser = subcommands.add_parser(
        "bench",
        help="measure speed and memory beside Transformers' own caches",
        description=f"Measure speed and memory beside Transformers' own caches.\n\nscenarios:\n{scenarios}",
        epilog=f"baselines: {', '.join(BASELINES)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    default = Settings()
    parser.add_argument("scenarios", nargs="+", choices=list(DESCRIPTIONS), metavar="SCENARIO", help="see above")
    parser.add_argument("--model", metavar="NAME_OR_PATH", help="a causal LM (default: the packaged SmolLM2-135M)")
    parser.add_argument("--random-llama", action="store_true", help="a tiny random model of 131,072 positions instead")
    parser.add_argument("--page-size", type=int, default=default.page_size, choices=PAGE_SIZES, help="%(default)s")
    parser.add_argument("--rounds", type=int, default=default.rounds, help="of each figure (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=default.max_new_tokens, help="(default: %(default)s)")
    parser.add_argument("--contexts", type=numbers, metavar="N,N,...", help="tokens (default: the scenario's own)")
    parser.add_argument("--prompt-lengths", type=numbers, metavar="N,N,...", help="of mixed (default: 16 to 1024)")
    parser.add_argument("--baselines", type=names, metavar="NAME,...", help="baselines (default: the scenario's own)")
    parser.add_argument("--chunk-size", type=int, default=default.chunk_size, help="of long prompts (%(default)s)")
    add_place(parser)
    add_plot(parser)


def run(arguments: argparse.Namespace) -> None:
    """Run scenarios one after the other, printing the tables of each; then write."""
    prepare(arguments)
    settings = Settings(**{name: getattr(arguments, name) for name in Settings.__dataclass_fields__})
    subject = load(settings) if any(name in WITH_MODEL for name in arguments.scenarios) else None
    results: dict[str, Any] = provenance() | {
        "command": arguments.command,
        "model": None if subject is None else subject.name,
        "settings": {name: getattr(settings, name) for name in Settings.__dataclass_fields__},
    }
    for name in dict.fromkeys(arguments.scenarios):
        if name in WITHOUT_MODEL:
            results[name] = WITHOUT_MODEL[name](settings)
        else:
            assert subject is not None
            results[name] = WITH_MODEL[name](subject, settings)
        print(f"\n{DESCRIPTIONS[name]}\n")
        for figures in results[name].values():
            if isinstance(figures, list) and figures and isinstance(figures[0], dict):
                print(table(figures), end="\n\n")
            sys.stdout.flush()
        if arguments.json:
            write_results(arguments.json, results)  # after each, so that what is measured is not lost
        if arguments.plot:
            draw(name, results[name]["rows"], arguments.plot)
