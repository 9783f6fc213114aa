"""How far something is: a bar in a terminal, and lines where the output goes elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

_MOST_LINES = 20


def progress(items: Iterable[T], name: str, total: int | None = None) -> Iterator[T]:
    """Give items one by one, and tell on stderr which one it is, by 20 lines at most where that is no terminal.

    Args:
        items: to go through.
        name: of the whole.
        total: how many there are; None: as many as `items` says.
    """
    if sys.stderr.isatty():
        yield from tqdm(items, name, total)
        return
    start = time.monotonic()
    if total is None:
        assert isinstance(items, Sized)  # or it was to be said
        total = len(items)
    for index, item in enumerate(items):
        if index == 0 or index * _MOST_LINES // total > (index - 1) * _MOST_LINES // total:
            print(f"{name}: {index + 1} of {total}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        yield item
