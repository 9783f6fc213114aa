"""`hf-paged env`: what a bug report needs."""

import argparse

from hf_paged import support


def add(parser: argparse.ArgumentParser) -> None:
    """Add nothing but words."""
    parser.description = (
        "Print versions, devices, and for each trick whether it is on, switched off by HF_PAGED_DISABLE,\n"
        "or replaced since this torch lacks something. Put it into bug reports."
    )


def run(arguments: argparse.Namespace) -> None:
    """Print it."""
    print(support())
