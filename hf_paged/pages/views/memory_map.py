"""Where the rows of a cache are: a picture in text, or in a notebook."""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from hf_paged.pages.block_table import BlockTable
from hf_paged.pages.group import PageGroup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Kind = Literal["full", "partial", "shared", "other", "cached", "free"]

COLORS: dict[Kind, str] = {
    "full": "#2e9e5b",
    "partial": "#e0a526",
    "shared": "#4a7fd6",
    "other": "#8a8a8a",
    "cached": "#9a6fc4",
    "free": "#8a8a8a40",
}
"""Of pages, as CSS has them."""

WORDS: dict[Kind, str] = {
    "full": "full",
    "partial": "partly full",
    "shared": "shared",
    "other": "held by another cache",
    "cached": "cached",
    "free": "free",
}

_MARKS: dict[Kind, str] = {"full": "#", "partial": "1-9", "shared": "S", "other": "o", "cached": "c", "free": "."}
_TERMINAL: dict[Kind, str] = {
    "full": "32",
    "partial": "33",
    "shared": "34",
    "other": "90",
    "cached": "35",
    "free": "2",
}
_MOST_SQUARES = 4096  # in one place of a notebook: each is an element of its page


@dataclass(frozen=True)
class MappedPage:
    """A page.

    Attributes:
        number: its id.
        num_used: slots that the rows of the cache use; None if they don't hold it.
        num_holders: rows that hold it, those of other caches included.
        size: its slots.
        is_cached: whether nobody holds it, but it can be found by its tokens.
    """

    number: int
    num_used: int | None
    num_holders: int
    size: int
    is_cached: bool = False

    @property
    def kind(self) -> Kind:
        """What is to be said of it first."""
        if self.num_used is None:
            return "other" if self.num_holders else "cached" if self.is_cached else "free"
        if self.num_holders > 1:
            return "shared"
        return "full" if self.num_used == self.size else "partial"

    @property
    def mark(self) -> str:
        """A character for it."""
        if self.kind == "partial":
            assert self.num_used is not None
            return str(max(1, 10 * self.num_used // self.size))
        return _MARKS[self.kind]

    @property
    def fill(self) -> float:
        """The share of its slots that rows of the cache use; 1 where they don't hold it."""
        return 1.0 if self.num_used is None else self.num_used / self.size

    def __str__(self) -> str:
        used = "" if self.num_used is None else f", {self.num_used} of {self.size} tokens"
        holders = f", {self.num_holders} holders" if self.num_holders > 1 else ""
        return f"page {self.number}: {WORDS[self.kind]}{used}{holders}"


@dataclass(frozen=True)
class MappedRow:
    """A row: its tokens, how many at its beginning have been dropped, and the ids of its pages."""

    length: int
    start: int
    pages: tuple[int, ...]


@dataclass(frozen=True)
class MappedGroup:
    """The pages of the layers that keep the same tokens, and the rows in them.

    Attributes:
        title: how many pages there are, and for which layers.
        page_size: tokens per page.
        pages: all of them, by their ids.
        rows: of the cache.
    """

    title: str
    page_size: int
    pages: tuple[MappedPage, ...]
    rows: tuple[MappedRow, ...]


@dataclass(frozen=True, repr=False)
class MemoryMap:
    """Where the rows of a cache are: in which pages, how full these are, and which are shared.

    `print` draws it as text, in colours where the output is a terminal, unless `NO_COLOR` is set in the environment. A
    notebook shows it as a picture.

    Attributes:
        groups: one for each kind of layer.
        width: pages on a line of text.
    """

    groups: tuple[MappedGroup, ...]
    width: int = 64

    @classmethod
    def of(cls, tables: Sequence[BlockTable], width: int) -> "MemoryMap":
        """Look at what the rows of a cache hold in each group of layers."""
        return cls(tuple(_group(table, names_layers=len(tables) > 1) for table in tables), width)

    def __str__(self) -> str:
        return self.text(in_color=sys.stdout.isatty() and "NO_COLOR" not in os.environ)

    __repr__ = __str__

    def text(self, in_color: bool = False) -> str:
        """Draw it as text, with the colours of a terminal if asked for."""
        return "\n".join(line for group in self.groups for line in _lines(group, self.width, in_color))

    def plot(self) -> "Figure":
        """Draw it by matplotlib: each row of the batch as a bar of its pages.

        Raises:
            ModuleNotFoundError: if matplotlib isn't installed.
        """
        from hf_paged.pages.views.plot import plot  # made of this module

        return plot(self)

    def _repr_html_(self) -> str:
        return "\n".join(_html(group) for group in self.groups)


def _group(table: BlockTable, names_layers: bool) -> MappedGroup:
    group = table.group
    used: dict[int, int] = {}
    for page, _, num_tokens in table.held_pages():
        used[page] = max(num_tokens, used.get(page, 0))
    pages = tuple(_page(page, used.get(page), group) for page in range(group.num_pages))
    rows = tuple(
        MappedRow(int(table.lengths[row]), int(table.starts[row]), tuple(table.row_pages(row)))
        for row in range(table.num_rows)
    )
    return MappedGroup(_title(group, names_layers), group.page_size, pages, rows)


def _page(number: int, num_used: int | None, group: PageGroup) -> MappedPage:
    num_holders = group.allocator.num_holders(number)
    is_cached = num_holders == 0 < group.allocator.ref_count(number)
    return MappedPage(number, num_used, num_holders, group.page_size, is_cached)


def _title(group: PageGroup, names_layers: bool) -> str:
    window = "no window" if group.window is None else f"a window of {group.window}"
    layers = f" for layers with {window}" if names_layers else ""
    return f"{group.num_pages} pages of {group.page_size} tokens{layers}"


# Text


def _lines(group: MappedGroup, width: int, in_color: bool) -> Iterator[str]:
    def painted(text: str, kind: Kind) -> str:
        return f"\033[{_TERMINAL[kind]}m{text}\033[0m" if in_color else text

    words = WORDS | {"partial": "tenths full"}
    yield f"{group.title}: " + "   ".join(painted(f"{_MARKS[kind]} {words[kind]}", kind) for kind in _MARKS)
    for start in range(0, len(group.pages), width):
        line = group.pages[start : start + width]
        kinds = groupby(line, lambda page: page.kind)
        yield f"{start:6} " + "".join(painted("".join(page.mark for page in pages), kind) for kind, pages in kinds)
    for number, row in enumerate(group.rows):
        pages = " ".join(painted(str(page), group.pages[page].kind) for page in row.pages)
        yield f"row {number}: {row.length} tokens in pages {pages or '-'}"


# HTML


def _html(group: MappedGroup) -> str:
    legend = " ".join(f"{_square(kind)}&nbsp;{WORDS[kind]}" for kind in WORDS)
    heads = "".join(f"<th style='text-align:left'>{head}</th>" for head in ("row", "tokens", "shared", "pages"))
    rows = "".join(_html_row(number, row, group) for number, row in enumerate(group.rows))
    return (
        f"<div><b>{group.title}</b></div><div>{legend}</div>"
        f"<div style='max-width:60em;line-height:1;margin:.4em 0'>{_squares(group.pages)}</div>"
        f"<table><tr>{heads}</tr>{rows}</table>"
    )


def _html_row(number: int, row: MappedRow, group: MappedGroup) -> str:
    pages = [group.pages[page] for page in row.pages]
    num_shared = sum(page.kind == "shared" for page in pages)
    cells = f"{number}", f"{row.length:,}", f"{num_shared:,} of {len(pages):,} pages", _squares(pages)
    return "<tr>" + "".join(f"<td style='text-align:left'>{cell}</td>" for cell in cells) + "</tr>"


def _squares(pages: Sequence[MappedPage]) -> str:
    shown = pages[:_MOST_SQUARES]
    more = f" … and {len(pages) - len(shown):,} more" if len(shown) < len(pages) else ""
    return "".join(_square(page.kind, str(page), page.fill) for page in shown) + more


def _square(kind: Kind, title: str = "", fill: float = 1.0) -> str:
    """A square that is filled from below."""
    color, level = COLORS[kind], f"{fill:.0%}"
    return (
        f"<span title='{title}' style='display:inline-block;width:.75em;height:.75em;margin:1px;"
        f"vertical-align:middle;background:linear-gradient(to top,{color} {level},{COLORS['free']} {level})'></span>"
    )
