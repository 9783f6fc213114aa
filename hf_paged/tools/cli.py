"""The command `hf-paged`: finds the subcommand that is asked for, and runs it."""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence

COMMANDS = ("bench", "ppl", "audit", "long_context", "reproduce", "env")
Run = Callable[[argparse.Namespace], None]


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command with all its subcommands."""
    parser = argparse.ArgumentParser(prog="hf-paged", description="Paged KV cache for Hugging Face Transformers.")
    subcommands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f"hf_paged.tools.commands.{name}").add(subcommands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; return the exit code, 2 for a caller's mistake, a missing package or a hub out of reach."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        parser = make_parser()
        namespace = parser.parse_args(arguments)
        namespace.command = " ".join([parser.prog, *arguments])
        run: Run = namespace.run
        run(namespace)
    except ModuleNotFoundError as error:
        told = "" if error.name is None else ' Run: pip install "hf-paged[bench,demo,eval]"'
        print(f"hf-paged: {error}.{told}", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"hf-paged: {error}", file=sys.stderr)
    else:
        return 0
    return 2
