"""`hf-paged ppl`: perplexity through the caches of Transformers and of this package."""

import argparse
from pathlib import Path
from typing import Any

import torch

from hf_paged.pages.pool import PAGE_SIZES
from hf_paged.tools.commands.arguments import add_model, add_place, names, prepare
from hf_paged.tools.evaluation.journal import delete, files
from hf_paged.tools.evaluation.perplexity import Perplexity, perplexity
from hf_paged.tools.evaluation.processes import Processes
from hf_paged.tools.evaluation.texts import load_texts
from hf_paged.tools.lab.candidate import CANDIDATES
from hf_paged.tools.lab.provenance import provenance, write_results
from hf_paged.tools.lab.subject import load_subject
from hf_paged.tools.lab.table import table

_OF_TEXTS = ("split", "text_column")
_OF_PERPLEXITY = ("caches", "page_size", "max_length", "stride", "chunk_size", "batch_size", "max_tokens")
_SETTINGS = ("model", "dataset", *_OF_TEXTS, *_OF_PERPLEXITY, "dtype", "device", "num_threads")


def add(subcommands: Any) -> None:
    """Add `ppl`."""
    parser = subcommands.add_parser(
        "ppl",
        help="compare perplexity through the caches",
        description="Compute the perplexity of texts through several caches in one run, chunk after chunk, and "
        "compare all predictions with those of the first cache.",
        epilog="Several processes share the work: accelerate launch --multi_gpu --num_processes 2 -m hf_paged ppl ...",
    )
    parser.set_defaults(run=run)
    add_model(parser)
    parser.add_argument("--dataset", metavar="NAME_OR_FILE", help="texts (default: the packaged prose)")
    parser.add_argument("--split", default="test", help="of the data set (default: %(default)s)")
    parser.add_argument("--text-column", default="text", help="of the data set (default: %(default)s)")
    parser.add_argument(
        "--caches",
        type=names,
        default=("dynamic", "paged"),
        metavar="NAME,...",
        help=f"out of {', '.join(CANDIDATES)}; the first is the reference (default: dynamic,paged)",
    )
    parser.add_argument("--page-size", type=int, default=128, choices=PAGE_SIZES, help="(default: %(default)s)")
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens in a window (default: all positions)")
    parser.add_argument("--stride", type=int, metavar="N", help="from window to window (default: the window's length)")
    parser.add_argument("--chunk-size", type=int, default=256, help="tokens run at once (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=1, help="windows run at once (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="tokens to score (default: all)")
    add_place(parser)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from where a run was interrupted: what is finished is in FILE.journal.0 (.1, ... for further "
        "processes) until FILE is written; without --resume, a journal that was left is an error",
    )


def run(arguments: argparse.Namespace) -> None:
    """Compute and print; then write, and delete the journal."""
    processes = Processes(torch.device(arguments.device))
    journal = processes.from_main(lambda: _journal(arguments))
    prepare(arguments)
    texts = load_texts(arguments.dataset, **{name: getattr(arguments, name) for name in _OF_TEXTS})
    subject = load_subject(arguments.model, arguments.dtype, str(processes.device))
    assert subject.tokenizer is not None  # it was loaded by its name
    settings = {name: getattr(arguments, name) for name in _OF_PERPLEXITY}
    figures = perplexity(subject.model, subject.tokenizer, texts, journal=journal, **settings)
    if not processes.is_main:
        return
    _print(subject.name, figures)
    if journal is not None:
        results = provenance() | {
            "command": arguments.command,
            "num_processes": processes.count,
            "model": subject.name,
            "settings": {name: getattr(arguments, name) for name in _SETTINGS},
            "figures": figures.to_dict(),
        }
        write_results(arguments.json, results)
        delete(journal)


def _journal(arguments: argparse.Namespace) -> Path | None:
    """Where the journal is; None without `--json`."""
    if arguments.json is None:
        if arguments.resume:
            raise ValueError("--resume was asked for without --json FILE, beside which the journal lies. Give both.")
        return None
    path = Path(f"{arguments.json}.journal")
    if not path.parent.is_dir():
        raise ValueError(f"--json {arguments.json} was asked for, but there is no folder {path.parent}. Make one.")
    left = files(path)
    if left and not arguments.resume:
        raise ValueError(
            f"{', '.join(map(str, left))} was left by a run that did not get to its end. Go on from there with "
            "--resume, or delete it to begin anew."
        )
    return path


def _print(model: str, result: Perplexity) -> None:
    windows = "1 window of" if result.num_windows == 1 else f"{result.num_windows:,} windows of at most"
    print(f"\n{model}: {result.num_tokens:,} tokens scored in {windows} {result.max_length:,}.")
    print(f"Keys and values of the tokens alone: {result.minimum_bytes / 2**20:.2f} MiB at most.\n")
    shown = [name for name in vars(result.figures[0]) if name != "text_perplexities"]
    print(table([{name: getattr(row, name) for name in shown} for row in result.figures]), end="\n\n")
    reference, *others = result.figures
    for row in others:
        print(
            f"The perplexity of {row.cache} ({row.perplexity:.6f}) differs from that of {reference.cache} "
            f"({reference.perplexity:.6f}) by {row.difference:.2g}, which is {row.relative_difference:.2g} of it; the "
            f"scatter of the tokens leaves {row.standard_error:.2g} open (the standard error)."
        )
