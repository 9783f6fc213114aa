"""`hf-paged bench`: speed and memory beside Transformers' own caches."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_paged.tools.bench.scenario import FITS, with_speed
from hf_paged.tools.bench.scenarios import SCENARIOS
from hf_paged.tools.bench.settings import Settings
from hf_paged.tools.bench.whole import WHOLE
from hf_paged.tools.commands.arguments import add_command, add_json, add_plot, listed, prepare
from hf_paged.tools.lab.baselines import BASELINES
from hf_paged.tools.lab.options import add_options, read_options
from hf_paged.tools.lab.provenance import provenance, write_results
from hf_paged.tools.lab.table import table


def add(subcommands: Any) -> None:
    """Add `bench`."""
    scenarios = listed({scenario.name: scenario.description for scenario in SCENARIOS.values()})
    parser = add_command(
        subcommands,
        "bench",
        run,
        "measure speed and memory beside Transformers' own caches",
        f"\n\nscenarios:\n{scenarios}",
        f"baselines: {', '.join(BASELINES | WHOLE)}",
    )
    parser.add_argument("scenarios", nargs="+", choices=list(SCENARIOS), metavar="SCENARIO", help="see above")
    add_options(parser, Settings)
    add_json(parser)
    add_plot(parser)


def run(arguments: argparse.Namespace) -> None:
    """Run scenarios one after the other; print, write and draw the figures of each when it is done."""
    prepare(arguments)
    settings = read_options(Settings, arguments)
    about = {"command": arguments.command, "model": settings.model_name, "settings": asdict(settings)}
    results = provenance() | about
    asked = [SCENARIOS[name] for name in dict.fromkeys(arguments.scenarios)]
    for scenario in asked:
        measured = results[scenario.name] = scenario.measure(settings)
        print(f"\n{scenario.name}: {scenario.description}\n")
        print(table(with_speed(measured["rows"]), scenario.columns), end="\n\n", flush=True)
        if measured.get("fits"):
            print(table(measured["fits"], FITS), end="\n\n", flush=True)
        if arguments.json:
            write_results(arguments.json, results)
        if arguments.plot:
            prefix = Path(arguments.json).stem if arguments.json and len(asked) == 1 else scenario.name
            scenario.draw(measured["rows"], arguments.plot, prefix)
