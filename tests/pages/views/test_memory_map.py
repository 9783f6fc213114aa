"""Pictures of the memory: in a terminal, in a notebook, and drawn. tests/cache has what the map of a cache says."""

import importlib.util
import io
import re
from html.parser import HTMLParser

import pytest

from hf_paged import PagedCache
from hf_paged.pages.views import memory_map
from hf_paged.pages.views.memory_map import MappedGroup, MappedPage, MappedRow, MemoryMap
from tests.reference import filled, tiny_config

SIZE = 16
PAGES = (
    MappedPage(0, num_used=16, num_holders=2, size=SIZE),
    MappedPage(1, num_used=16, num_holders=1, size=SIZE),
    MappedPage(2, num_used=4, num_holders=1, size=SIZE),
    MappedPage(3, num_used=None, num_holders=1, size=SIZE),
    MappedPage(4, num_used=None, num_holders=0, size=SIZE),
    MappedPage(5, num_used=None, num_holders=0, size=SIZE, is_cached=True),
)
ROWS = (MappedRow(36, 0, (0, 1, 2)), MappedRow(0, 0, ()))
GROUP = MappedGroup("6 pages of 16 tokens", SIZE, PAGES, ROWS)
MAP = MemoryMap((GROUP,), width=3)
TEXT = """\
6 pages of 16 tokens: # full   1-9 tenths full   S shared   o held by another cache   c cached   . free
     0 S#2
     3 o.c
row 0: 36 tokens in pages 0 1 2
row 1: 0 tokens in pages -"""


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Titles(HTMLParser):
    """Titles of the elements, in order; every element that is opened is closed."""

    def __init__(self, html):
        super().__init__()
        self.found, self.opened = [], []
        self.feed(html)
        assert self.opened == []

    def handle_starttag(self, tag, attributes):
        self.opened.append(tag)
        self.found += [value for name, value in attributes if name == "title" and value]

    def handle_endtag(self, tag):
        assert self.opened.pop() == tag


# In a terminal


def test_what_is_printed_is_in_colours_in_a_terminal_alone(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert str(MAP) == repr(MAP) == MAP.text() == TEXT
    monkeypatch.setattr("sys.stdout", Terminal())
    assert str(MAP) == repr(MAP) == MAP.text(in_color=True) != TEXT
    monkeypatch.setenv("NO_COLOR", "1")
    assert str(MAP) == TEXT


def test_colours_tell_the_kinds_of_pages_apart_and_change_nothing_else():
    coloured = MAP.text(in_color=True)
    assert re.sub(r"\033\[\d+m", "", coloured) == TEXT
    colours = [re.search(rf"\033\[(\d+)m{re.escape(mark)}", coloured)[1] for mark in "S#2o.c"]
    assert len(set(colours)) == 6
    assert coloured.splitlines()[3] == "row 0: 36 tokens in pages " + " ".join(
        f"\033[{colour}m{page}\033[0m" for colour, page in zip(colours, range(3), strict=False)
    )


# In a notebook


def test_a_notebook_shows_pages_rows_and_what_is_shared():
    html = MAP._repr_html_()
    pages = [
        "page 0: shared, 16 of 16 tokens, 2 holders",
        "page 1: full, 16 of 16 tokens",
        "page 2: partly full, 4 of 16 tokens",
        "page 3: held by another cache",
        "page 4: free",
        "page 5: cached",
    ]
    assert Titles(html).found == pages + pages[:3]
    cells = re.findall(r"<td[^>]*>([^<]*)", html)
    assert cells == ["0", "36", "1 of 3 pages", "", "1", "0", "0 of 0 pages", ""]
    assert f"{memory_map.COLORS['partial']} 25%" in html
    assert all(words in html for words in memory_map.WORDS.values())


def test_a_notebook_is_not_given_more_squares_than_it_can_show(monkeypatch):
    monkeypatch.setattr(memory_map, "_MOST_SQUARES", 2)
    html = MAP._repr_html_()
    assert len(Titles(html).found) == 2 + 2
    assert "… and 4 more" in html
    assert "… and 1 more" in html


# Drawn


def test_a_plot_has_a_bar_for_each_row_and_names_what_there_is():
    (axes,) = MAP.plot().axes
    assert axes.get_title(loc="left") == "6 pages of 16 tokens"
    bars = {bar.get_label(): bar.get_paths() for bar in axes.collections}
    ends = {name: [path.get_extents().intervalx.tolist() for path in paths] for name, paths in bars.items()}
    assert {name: ends[name] for name in ends if not name.startswith("_")} == {
        "shared": [[0, 16]],
        "full": [[16, 32]],
        "partly full": [[32, 36]],
    }
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["shared", "full", "partly full"]


def test_a_plot_has_axes_for_each_kind_of_layer_and_shows_what_a_window_left(tmp_path):
    pages = MappedPage(0, num_used=3, num_holders=1, size=SIZE), MappedPage(1, num_used=4, num_holders=1, size=SIZE)
    windowed = MappedGroup("2 pages for a window", SIZE, pages, (MappedRow(36, 29, (0, 1)),))
    figure = MemoryMap((windowed, GROUP)).plot()
    first, second = figure.axes
    (bars,) = [bar for bar in first.collections if bar.get_label() == "partly full"]
    assert [path.get_extents().intervalx.tolist() for path in bars.get_paths()] == [[29, 32], [32, 36]]
    assert second.get_title(loc="left") == GROUP.title
    figure.savefig(tmp_path / "map.svg")
    assert (tmp_path / "map.svg").stat().st_size > 0


def test_a_plot_of_a_cache_is_that_of_its_memory_map(generator):
    cache = PagedCache(tiny_config(), num_pages=4, page_size=16)
    filled(cache, generator, 1, 20)
    (axes,) = cache.plot().axes
    assert axes.get_title(loc="left") == cache.memory_map().groups[0].title == "4 pages of 16 tokens"


def test_without_matplotlib_a_plot_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"plot\(\) draws with matplotlib, .* Run: pip install matplotlib"):
        MAP.plot()
