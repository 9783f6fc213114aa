"""What several subcommands share: their arguments, and what these ask for."""

import argparse
import importlib.util
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_paged.tools.lab.options import count
from hf_paged.tools.lab.provenance import provenance, write_results


def listed(descriptions: Mapping[str, str]) -> str:
    """Lay out names and a line about each."""
    width = max(map(len, descriptions))
    return "\n".join(f"  {name:{width}}  {line}" for name, line in descriptions.items())


def add_model(parser: Any, is_positional: bool = True) -> None:
    """Add which model, how it is held and where it runs, and where the figures go."""
    either = parser.add_mutually_exclusive_group()
    words = "name or path of a causal LM (default: the packaged SmolLM2-135M)"
    if is_positional:
        either.add_argument("model", nargs="?", metavar="MODEL", default=argparse.SUPPRESS, help=words)
    either.add_argument("--model", metavar="MODEL", help="the same" if is_positional else words)
    parser.add_argument("--dtype", default="float32", help="of the weights (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where the model runs (default: %(default)s)")
    add_num_threads(parser)
    add_json(parser)


def add_num_threads(parser: Any) -> None:
    """Add the number of threads."""
    parser.add_argument("--num-threads", type=count, metavar="N", help="CPU threads (default: torch's choice)")


def add_json(parser: Any) -> None:
    """Add where the figures go."""
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE, and where they come from")


def add_plot(parser: Any) -> None:
    """Add where pictures go."""
    parser.add_argument("--plot", metavar="FOLDER", type=Path, help="draw the figures into FOLDER, as SVG")


def prepare(arguments: argparse.Namespace) -> None:
    """Look whether there is what the arguments ask for, before anything is computed, and set the number of threads.

    What would get between the lines that are printed is silenced.

    Raises:
        ModuleNotFoundError: if pictures are asked for, and can't be drawn.
        ValueError: if there is no such device, or a file can't be written where it is to be.
    """
    for package in ("matplotlib", "pandas") if getattr(arguments, "plot", None) else ():
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    if getattr(arguments, "plot", None):
        _check_folder("--plot", arguments.plot, arguments.plot)
    if arguments.json:
        check_file("--json", arguments.json)
    _check_device(arguments.device)
    if arguments.num_threads is not None:
        torch.set_num_threads(arguments.num_threads)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("transformers").setLevel(logging.ERROR)


def keep(arguments: argparse.Namespace, results: dict[str, Any]) -> None:
    """Write what has been found so far, and where it comes from, if it is to be written; an interrupt then says so."""
    if arguments.json:
        write_results(arguments.json, provenance() | {"command": arguments.command} | results)
        arguments.kept = f" What was done is in {arguments.json}."


def check_file(option: str, path: str | Path) -> None:
    """Raise ValueError unless a file can be written where an option wants it."""
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"{option} {path} was asked for, but that is no file. Name a file that may be written.")
    if not Path(path).parent.is_dir():
        raise ValueError(f"{option} {path} was asked for, but there is no folder {Path(path).parent}. Make one.")
    _check_folder(option, path, Path(path).parent)


def _check_folder(option: str, asked: str | Path, folder: Path) -> None:
    """Fail unless a file can be made in a folder, which is made if there is none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"{option} {asked} was asked for, but nothing can be written to {folder}: {error.strerror}."
        ) from error


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
        module = torch.get_device_module(device)
        is_there = module.is_available() and (device.index or 0) < module.device_count()
    except RuntimeError as error:
        raise ValueError(f"--device {name} was asked for; give one of torch's, such as cpu or cuda:0.") from error
    if not is_there:
        raise ValueError(f"--device {name} was asked for, but there is none here that this torch can use.")
