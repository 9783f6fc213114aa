"""The command `hf-paged`: finds the subcommand that is asked for, and runs it."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from typing_extensions import override

import hf_paged

COMMANDS = {
    "generate": "answer the prompts of a file, in batches that are filled up again as answers end",
    "bench": "measure speed and memory beside Transformers' own caches",
    "ppl": "compute the perplexity of texts through several caches in one run",
    "audit": "account for the memory of a batch of prompts, step by step",
    "long-context": "compare the answers from several caches to tasks over long contexts",
    "reproduce": "run the evaluation of the paper again, and write a page about it",
    "env": "print versions, devices, and which tricks are on",
}
INTERRUPTED = 128 + 2  # what shells make of SIGINT


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the arguments."""

    @override
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. {self.prog} --help lists what there is.\n")


def make_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Make the parser of the command, with the arguments of the subcommand that these ask for.

    The others are not imported: they may need packages that this one does without.
    """
    parser = Parser(prog="hf-paged", description="Paged KV cache for Hugging Face Transformers.")
    parser.add_argument("--version", action="version", version=f"hf-paged {hf_paged.__version__}")
    subcommands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        description = f"{summary[0].upper()}{summary[1:]}."
        formatter = argparse.RawDescriptionHelpFormatter  # keeps lines
        own = subcommands.add_parser(name, help=summary, description=description, formatter_class=formatter)
        if name in arguments[:1]:
            command = importlib.import_module(f"hf_paged.tools.commands.{name.replace('-', '_')}")
            command.add(own)
            own.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Returns:
        The exit status: 2 for a caller's mistake, a missing package or a hub out of reach, 130 if it is interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    namespace = argparse.Namespace()
    try:
        parser = make_parser(arguments)
        parser.parse_args(arguments, namespace)
        namespace.command = " ".join([parser.prog, *arguments])
        namespace.run(namespace)
    except KeyboardInterrupt:
        _say("Interrupted." + getattr(namespace, "kept", ""))
        return INTERRUPTED
    except ModuleNotFoundError as error:
        _say(f"{error}." + ("" if error.name is None else f" Run: pip install {error.name.partition('.')[0]}"))
    except (ValueError, OSError) as error:
        _say(str(error))
    else:
        return 0
    return 2


def _say(message: str) -> None:
    print("hf-paged:", " ".join(message.split()), file=sys.stderr)
