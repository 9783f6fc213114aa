"""`hf-paged env`: what a bug report needs."""

import argparse
from typing import Any

from hf_paged import support


def add(subcommands: Any) -> None:
    """Add `env`."""
    parser = subcommands.add_parser(
        "env",
        help="print versions, devices, and which tricks are on",
        description="Print versions, devices, and for each trick whether it is on, switched off by HF_PAGED_DISABLE, "
        "or replaced since this torch lacks something. Put it into bug reports.",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print it."""
    print(support())
