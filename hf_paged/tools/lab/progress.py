"""Progress bars, where somebody looks."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm  # type: ignore[import-untyped]

T = TypeVar("T")


def progress(items: Sequence[T], title: str) -> Iterator[T]:
    """Go through items with a bar on the terminal; silently where the output goes elsewhere."""
    yield from tqdm(items, desc=title, disable=None, leave=False)
