"""Settings that are arguments of a command line too: a field of a dataclass says what it is for."""

import argparse
from collections.abc import Callable
from dataclasses import field, fields
from typing import Any, TypeVar

T = TypeVar("T")


def option(default: Any, words: str, read: Callable[[str], Any] = str, metavar: str | None = None) -> Any:
    """Make a field of a dataclass that is an argument too; `read` makes its value of a string."""
    return field(default=default, metadata={"help": words, "type": read, "metavar": metavar})


def numbers(text: str) -> tuple[int, ...]:
    """Read `16,64` as `(16, 64)`."""
    return tuple(int(number) for number in text.split(","))


def names(text: str) -> tuple[str, ...]:
    """Read `dynamic,paged` as `("dynamic", "paged")`."""
    return tuple(text.split(","))


def add_options(parser: argparse.ArgumentParser, settings: type, *but: str) -> None:
    """Add an argument for each field of a dataclass but some."""
    for each in fields(settings):
        if each.name in but:
            continue
        more: dict[str, Any] = dict(each.metadata)
        if isinstance(each.default, bool):
            more = {"help": more["help"], "action": "store_true"}
        elif each.default is not None:
            shown = ",".join(map(str, each.default)) if isinstance(each.default, tuple) else each.default
            more["help"] += f" (default: {shown})"
        parser.add_argument(f"--{each.name.replace('_', '-')}", default=each.default, **more)


def read_options(settings: type[T], arguments: argparse.Namespace) -> T:
    """Make the dataclass from the arguments."""
    return settings(**{each.name: getattr(arguments, each.name) for each in fields(settings)})  # type: ignore[arg-type]
