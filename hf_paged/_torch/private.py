"""Names of torch that are not public, each looked up once, when it is first needed."""

import importlib
import logging
from collections.abc import Callable
from functools import reduce
from threading import RLock
from typing import Any

import torch

logger = logging.getLogger(__name__)

NAMES: list["Private"] = []
"""All of them."""


class MissingNameError(Exception):
    """A private name is gone, or is not what it was."""


class Private:
    """A name of torch that is not public, and may be another one, or none, in any release.

    Args:
        paths: `"module:attribute.attribute"`, with the newest of its names first; the first that there is counts.
        check: takes what was found; whatever it raises says that this is not what it was.
    """

    def __init__(self, *paths: str, check: Callable[[Any], object] | None = None) -> None:
        self.paths = paths
        self._check = check
        self._found: Any = None
        self._error: MissingNameError | None = None
        self._is_looked_up = False
        self._lock = RLock()
        NAMES.append(self)

    def __repr__(self) -> str:
        return self.paths[-1].replace(":", ".")

    @property
    def value(self) -> Any:
        """What it names.

        Raises:
            MissingNameError: if there is no such thing, or it fails the check.
        """
        if not self._is_looked_up:
            with self._lock:
                if not self._is_looked_up:
                    self._look_up()
        if self._error is not None:
            raise self._error
        return self._found

    @property
    def is_missing(self) -> bool:
        """Whether it was looked for in vain."""
        return self._error is not None

    def value_or(self, otherwise: Any, without: str) -> Any:
        """What it names; where that is missing, something else, and a log message says `without`, once."""
        is_first = not self._is_looked_up
        try:
            return self.value
        except MissingNameError as error:
            if is_first:
                logger.warning("%s: %s.", error, without)
            return otherwise

    def _look_up(self) -> None:
        try:
            self._found = find(self)
            if self._check is not None:
                self._check(self._found)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            self._error = MissingNameError(f"torch {torch.__version__} has no {self} as it was ({reason})")
        self._is_looked_up = True


def find(name: Private) -> Any:
    """Import what a name names, by the first of its paths that there is."""
    *newer, oldest = name.paths
    for path in newer:
        try:
            return _follow(path)
        except (ImportError, AttributeError):
            continue
    return _follow(oldest)


def _follow(path: str) -> Any:
    module, _, attributes = path.partition(":")
    return reduce(getattr, filter(None, attributes.split(".")), importlib.import_module(module))
