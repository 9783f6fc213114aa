"""What several subcommands share: their arguments, and what these ask for."""

import argparse
import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
import transformers


def numbers(text: str) -> tuple[int, ...]:
    """Read `16,64` as `(16, 64)`."""
    return tuple(int(number) for number in text.split(","))


def names(text: str) -> tuple[str, ...]:
    """Read `dynamic,paged` as `("dynamic", "paged")`."""
    return tuple(text.split(","))


def add_model(parser: Any) -> None:
    """Add the model's name, for a subcommand that is about one model."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="name or path (default: the packaged SmolLM2-135M)")


def add_place(parser: Any) -> None:
    """Add how a model is held, where it runs, and where the figures go."""
    parser.add_argument("--dtype", default="float32", help="of the weights (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--num-threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE, and where they come from")


def add_plot(parser: Any) -> None:
    """Add where pictures go."""
    parser.add_argument("--plot", metavar="FOLDER", type=Path, help="draw the figures into FOLDER, as SVG")


def prepare(arguments: argparse.Namespace) -> None:
    """Set the number of threads, and silence what would get between the lines that are printed.

    Raises:
        ValueError: if pictures are asked for, and can't be drawn.
    """
    if getattr(arguments, "plot", None) and importlib.util.find_spec("matplotlib") is None:
        raise ValueError('--plot needs matplotlib, which is not installed. Run: pip install "hf-paged[bench]"')
    if arguments.num_threads is not None:
        torch.set_num_threads(arguments.num_threads)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("transformers").setLevel(logging.ERROR)
