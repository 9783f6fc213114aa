"""`hf-paged bench`: speed and memory beside Transformers' own caches."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_paged.tools.bench.scenario import FITS, Scenario, notes, with_speed
from hf_paged.tools.bench.scenarios import SCENARIOS
from hf_paged.tools.bench.settings import Settings
from hf_paged.tools.bench.whole import WHOLE
from hf_paged.tools.commands.arguments import add_model, add_plot, keep, listed, prepare
from hf_paged.tools.lab.baselines import BASELINES
from hf_paged.tools.lab.options import add_options, read_options
from hf_paged.tools.lab.table import table


def add(parser: Any) -> None:
    """Add what is measured, of which model, and how."""
    scenarios = listed({scenario.name: scenario.description for scenario in SCENARIOS.values()})
    parser.description += f"\n\nscenarios:\n{scenarios}"
    parser.epilog = f"caches: {', '.join(BASELINES | WHOLE)}"
    words = "see above; a word with a slash, or a folder, is MODEL"
    parser.add_argument("scenarios", nargs="+", metavar="SCENARIO", help=words)
    add_model(parser, is_positional=False)
    add_options(parser, Settings, "model", "dtype", "device", "num_threads")
    add_plot(parser)


def run(arguments: argparse.Namespace) -> None:
    """Run scenarios one after the other; print, write and draw the figures of each when it is done.

    Of one that is interrupted, or fails, these are the figures so far.
    """
    asked = [SCENARIOS[name] for name in _without_model(arguments)]
    prepare(arguments)
    settings = read_options(Settings, arguments)
    results: dict[str, Any] = {"model": settings.model_name, "settings": asdict(settings)}
    for scenario in asked:
        rows: list[dict[str, Any]] = []
        measured: dict[str, Any] = {"rows": rows, "is_complete": False}
        try:
            measured = scenario.measure(settings, rows)
        finally:
            if rows:
                results[scenario.name] = measured
                _print(scenario, measured)
                keep(arguments, results)
                if arguments.plot:
                    prefix = Path(arguments.json).stem if arguments.json and len(asked) == 1 else scenario.name
                    scenario.draw(rows, arguments.plot, prefix)


def _without_model(arguments: argparse.Namespace) -> list[str]:
    """The names of the scenarios, each once; the word among them that is a model becomes `arguments.model`.

    Raises:
        ValueError: for a word that is neither, or two models.
    """
    others = [word for word in arguments.scenarios if word not in SCENARIOS]
    unknown = [word for word in others if "/" not in word and not Path(word).is_dir()]
    scenarios = [word for word in dict.fromkeys(arguments.scenarios) if word in SCENARIOS]
    if unknown or not scenarios:
        raise ValueError(
            f"{unknown or others} were asked for, but scenarios are {', '.join(SCENARIOS)}. Name one of these, and a "
            "model that isn't a folder here with --model."
        )
    if len(others) + (arguments.model is not None) > 1:
        raise ValueError(f"Models {[*others, *filter(None, [arguments.model])]} were asked for. Give one.")
    arguments.model = next(iter(others), arguments.model)
    return scenarios


def _print(scenario: Scenario, measured: dict[str, Any]) -> None:
    print(f"\n{scenario.name}: {scenario.description}\n")
    print(table(with_speed(measured["rows"]), scenario.columns), end="\n\n", flush=True)
    if measured.get("fits"):
        print(table(measured["fits"], FITS), end="\n\n", flush=True)
    for note in notes(measured["rows"]):
        print(note, flush=True)
