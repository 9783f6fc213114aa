"""The command `hf-paged`: finds the subcommand that is asked for, and runs it."""

import argparse
import sys
from collections.abc import Callable, Sequence

from hf_paged.tools.commands import audit, bench, env, long_context, ppl, reproduce

COMMANDS = (bench, ppl, audit, long_context, reproduce, env)
Run = Callable[[argparse.Namespace], None]


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command with all its subcommands."""
    parser = argparse.ArgumentParser(prog="hf-paged", description="Paged KV cache for Hugging Face Transformers.")
    subcommands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(subcommands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; return the exit code, 2 for a caller's mistake or a hub out of reach."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    namespace = parser.parse_args(arguments)
    namespace.command = " ".join([parser.prog, *arguments])
    run: Run = namespace.run
    try:
        run(namespace)
    except (ValueError, ConnectionError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0
