"""`hf-paged reproduce`: the paper's evaluation, and a page about it."""

import argparse
import sys
from pathlib import Path
from typing import Any

from hf_paged.tools.commands.arguments import add_num_threads
from hf_paged.tools.reproduction.page import make_page
from hf_paged.tools.reproduction.stage import STAGES, Stage


def add(parser: Any) -> None:
    """Add which stages, at which size, and where the page goes."""
    parser.description += (
        " It takes about half an hour on 2 cores.\nFOLDER/reproduction.md is made from FOLDER/results/reproduction."
    )
    parser.epilog = f"stages: {', '.join(stage.name for stage in STAGES)}"
    parser.add_argument("--full", action="store_true", help="at the full size, which takes hours")
    parser.add_argument("--stages", type=_stages, default=STAGES, metavar="NAME,...", help="see below (default: all)")
    parser.add_argument("--page-only", action="store_true", help="run nothing, make the page from what there is")
    parser.add_argument("--folder", type=Path, default=Path("reproduction"), help="of the page (default: %(default)s)")
    add_num_threads(parser)


def run(arguments: argparse.Namespace) -> None:
    """Run the stages one after the other, and write the page after each.

    Raises:
        ValueError: if a stage failed; the page then is about the others.
    """
    results: Path = arguments.folder / "results" / "reproduction"
    results.mkdir(parents=True, exist_ok=True)
    page: Path = arguments.folder / "reproduction.md"
    failed = []
    stages: tuple[Stage, ...] = () if arguments.page_only else arguments.stages
    for index, stage in enumerate(stages):
        print(f"\n[{index + 1}/{len(stages)}] {stage.name}", flush=True)
        left = ",".join(stage.name for stage in stages[index:])
        arguments.kept = f" The page {page} has what was done before; go on with --stages {left}."
        if stage.run(results, arguments.full, arguments.num_threads):
            failed.append(stage.name)
        page.write_text(make_page(results, arguments.folder), encoding="utf-8")
    page.write_text(make_page(results, arguments.folder), encoding="utf-8")
    print(f"\nThe page is {page}.", file=sys.stderr)
    if failed:
        raise ValueError(f"These stages failed, and are not on the page anew: {', '.join(failed)}.")


def _stages(text: str) -> tuple[Stage, ...]:
    by_name = {stage.name: stage for stage in STAGES}
    unknown = [name for name in text.split(",") if name not in by_name]
    if unknown:
        raise argparse.ArgumentTypeError(f"stages {unknown} were asked for; there are {', '.join(by_name)}")
    return tuple(by_name[name] for name in text.split(","))
