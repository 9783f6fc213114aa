"""`hf-paged ppl`: perplexity through the caches of Transformers and of this package."""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from hf_paged.tools.commands.arguments import add_model, keep, prepare
from hf_paged.tools.evaluation.perplexity import Perplexity, perplexity
from hf_paged.tools.evaluation.texts import load_texts
from hf_paged.tools.lab.model import load_model
from hf_paged.tools.lab.options import add_options, count, names, option, read_options
from hf_paged.tools.lab.table import table

COLUMNS = (
    "cache",
    "perplexity",
    "relative_difference",
    "standard_error",
    "max_logit_difference",
    "kl",
    "agreement",
    "tokens_per_s",
    "kv_bytes",
)


@dataclass(frozen=True)
class Texts:
    """What is scored."""

    dataset: str | None = option(None, "texts (default: the packaged prose)", metavar="NAME_OR_FILE")
    split: str = option("test", "of the data set")
    text_column: str = option("text", "of the data set")


@dataclass(frozen=True)
class Settings:
    """How."""

    caches: tuple[str, ...] = option(("dynamic", "paged"), "the first is the reference", names)
    page_size: int = option(128, "tokens per page", count)
    max_length: int | None = option(None, "tokens in a window (default: all positions)", count)
    stride: int | None = option(None, "from window to window (default: the window's length)", count)
    chunk_size: int = option(256, "tokens run at once", count)
    batch_size: int = option(1, "windows run at once", count)
    max_tokens: int | None = option(None, "tokens to score (default: all)", count)


def add(parser: Any) -> None:
    """Add the model, the texts, and how they are run."""
    parser.description += " All predictions are compared with\nthose of the first cache."
    parser.epilog = (
        "Several processes share the work: accelerate launch --multi_gpu --num_processes 2 -m hf_paged ppl ..."
    )
    add_model(parser)
    add_options(parser, Texts)
    add_options(parser, Settings)
    words = "go on from where a run was interrupted: what is finished is in FILE.journal until FILE is written"
    parser.add_argument("--resume", action="store_true", help=words)


def run(arguments: argparse.Namespace) -> None:
    """Compute and print; then write, and delete the journal."""
    prepare(arguments)
    processes = PartialState(cpu=arguments.device == "cpu")
    journal = _journal(arguments)
    processes.wait_for_everyone()  # so that all have looked before one writes
    about, settings = read_options(Texts, arguments), read_options(Settings, arguments)
    texts = load_texts(**asdict(about))
    device = processes.device if processes.num_processes > 1 else arguments.device
    model = load_model(arguments.model, arguments.dtype, device)
    assert model.tokenizer is not None  # it was loaded by its name
    figures = perplexity(model.model, model.tokenizer, texts, journal=journal, **asdict(settings))
    if not processes.is_main_process:
        return
    _print(model.name, figures)
    if journal is not None:
        place = {name: getattr(arguments, name) for name in ("model", "dtype", "device", "num_threads")}
        results = {
            "num_processes": processes.num_processes,
            "model": model.name,
            "settings": asdict(about) | asdict(settings) | place,
            "figures": figures.to_dict(),
        }
        keep(arguments, results)
        journal.unlink()


def _journal(arguments: argparse.Namespace) -> Path | None:
    """Where the journal is; None without `--json`."""
    if arguments.json is None:
        if arguments.resume:
            raise ValueError("--resume was asked for without --json FILE, beside which the journal lies. Give both.")
        arguments.kept = " Nothing is kept without --json FILE; with it, --resume goes on."
        return None
    path = Path(f"{arguments.json}.journal")
    if path.exists() and not arguments.resume:
        raise ValueError(
            f"{path} was left by a run that did not get to its end. Go on from there with --resume, or delete it to "
            "begin anew."
        )
    arguments.kept = f" What was done is in {path}; the same command with --resume goes on from there."
    return path


def _print(model: str, result: Perplexity) -> None:
    windows = "1 window of" if result.num_windows == 1 else f"{result.num_windows:,} windows of at most"
    print(f"\n{model}: {result.num_tokens:,} tokens scored in {windows} {result.max_length:,}.")
    print(f"Keys and values of the tokens alone: {result.minimum_bytes / 2**20:.2f} MiB at most.\n")
    print(table(map(vars, result.figures), COLUMNS), end="\n\n")
    reference, *others = result.figures
    for row in others:
        print(
            f"The perplexity of {row.cache} ({row.perplexity:.6f}) differs from that of {reference.cache} "
            f"({reference.perplexity:.6f}) by {row.difference:.2g}, which is {row.relative_difference:.2g} of it; the "
            f"scatter of the tokens leaves {row.standard_error:.2g} open (the standard error)."
        )
