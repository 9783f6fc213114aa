"""Settings that are arguments of a command line too: a field of a dataclass says what it is for."""

import argparse
from collections.abc import Callable
from dataclasses import field, fields
from typing import Any, TypeVar

T = TypeVar("T")


def count(text: str) -> int:
    """Read `16` as 16; what is below 1 is refused."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} was given, but a whole number of at least 1 is needed")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    """Read `16,64` as `(16, 64)`."""
    return tuple(count(number) for number in text.split(","))


def names(text: str) -> tuple[str, ...]:
    """Read `dynamic,paged` as `("dynamic", "paged")`."""
    return tuple(text.split(","))


_METAVARS: dict[Callable[[str], Any], str] = {count: "N", int: "N", counts: "N,N,...", names: "NAME,..."}


def option(
    default: Any, words: str, read: Callable[[str], Any] = str, metavar: str | None = None, old_name: str | None = None
) -> Any:
    """Make a field of a dataclass that is an argument too.

    Args:
        default: of the field.
        words: for the help.
        read: makes the value of a string.
        metavar: what stands for the value in the help.
        old_name: of the argument, by which it is taken too.
    """
    shown = _METAVARS.get(read) if metavar is None else metavar
    return field(default=default, metadata={"help": words, "type": read, "metavar": shown, "old_name": old_name})


def add_options(parser: argparse.ArgumentParser, settings: type, *but: str) -> None:
    """Add an argument for each field of a dataclass but some."""
    for each in fields(settings):
        if each.name in but:
            continue
        more: dict[str, Any] = dict(each.metadata)
        old_name = more.pop("old_name")
        if isinstance(each.default, bool):
            more = {"help": more["help"], "action": "store_true"}
        elif each.default is not None:
            shown = ",".join(map(str, each.default)) if isinstance(each.default, tuple) else each.default
            more["help"] += f" (default: {shown})"
        parser.add_argument(f"--{each.name.replace('_', '-')}", default=each.default, **more)
        if old_name is not None:
            hidden = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
            parser.add_argument(old_name, dest=each.name, **more | hidden)


def read_options(settings: type[T], arguments: argparse.Namespace) -> T:
    """Make the dataclass from the arguments."""
    return settings(**{each.name: getattr(arguments, each.name) for each in fields(settings)})  # type: ignore[arg-type]
