"""How far something is can be seen in a terminal and in a file."""

import io
import sys
from itertools import pairwise

import pytest

from hf_paged.tools.progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def lines(capsys, total):
    assert list(progress(range(total), "tea")) == list(range(total))
    return [line.rpartition(",")[0] for line in capsys.readouterr().err.splitlines()]


@pytest.mark.parametrize("total", [0, 1, 5, 20])
def test_each_of_a_few_items_has_a_line_when_it_begins(capsys, total):
    assert lines(capsys, total) == [f"tea: {number} of {total}" for number in range(1, total + 1)]


@pytest.mark.parametrize("total", [21, 100, 1999])
def test_many_items_have_twenty_lines_at_even_distances(capsys, total):
    told = lines(capsys, total)
    assert len(told) == 20
    assert told[0] == f"tea: 1 of {total}"
    numbers = [int(line.split()[1]) for line in told]
    distances = {after - before for before, after in pairwise(numbers)}
    assert max(distances) - min(distances) <= 1


def test_a_line_is_there_before_its_item_is_worked_on(capsys):
    for number in progress([1, 2], "tea"):
        assert f"tea: {number} of 2, 0 s\n" in capsys.readouterr().err


def test_a_terminal_has_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress([7, 8, 9], "tea")) == [7, 8, 9]
    assert "tea: 100%" in sys.stderr.getvalue()
    assert "3/3" in sys.stderr.getvalue()
