"""What several subcommands share: their arguments, and what these ask for."""

import argparse
import importlib.util
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

Run = Callable[[argparse.Namespace], None]


def add_command(subcommands: Any, name: str, run: Run, summary: str, description: str = "", epilog: str = "") -> Any:
    """Add a subcommand, whose description keeps its lines, and return its parser."""
    parser = subcommands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.{description}",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def listed(descriptions: Mapping[str, str]) -> str:
    """Lay out names and a line about each."""
    width = max(map(len, descriptions))
    return "\n".join(f"  {name:{width}}  {line}" for name, line in descriptions.items())


def add_model(parser: Any) -> None:
    """Add which model, how it is held and where it runs, and where the figures go."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="name or path (default: the packaged SmolLM2-135M)")
    parser.add_argument("--dtype", default="float32", help="of the weights (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--num-threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    add_json(parser)


def add_json(parser: Any) -> None:
    """Add where the figures go."""
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE, and where they come from")


def add_plot(parser: Any) -> None:
    """Add where pictures go."""
    parser.add_argument("--plot", metavar="FOLDER", type=Path, help="draw the figures into FOLDER, as SVG")


def prepare(arguments: argparse.Namespace) -> None:
    """Set the number of threads, and silence what would get between the lines that are printed.

    Raises:
        ModuleNotFoundError: if pictures are asked for, and can't be drawn.
    """
    for package in ("matplotlib", "pandas") if getattr(arguments, "plot", None) else ():
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    if arguments.num_threads is not None:
        torch.set_num_threads(arguments.num_threads)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("transformers").setLevel(logging.ERROR)
