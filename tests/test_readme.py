"""What the README shows can be run."""

import json
import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.parametrize("page_size", [128, 16])
def test_the_figures_of_the_table_are_those_of_the_results(page_size):
    results = json.loads((README.parent / "docs" / "results" / f"demo-page-{page_size}.json").read_text())
    figures = results["ragged_batch"]
    column = {128: (1, 2), 16: (3, 4)}[page_size]
    for name, form in (("KV cache, MiB", ".1f"), ("first token, s", ".2f"), ("ms per decoding step", ".1f")):
        (line,) = [line for line in README.read_text().splitlines() if line.startswith(f"| {name}")]
        cells = [cell.strip(" *") for cell in line.split("|")[1:-1]]
        assert cells[column[0]] == format(figures["DynamicCache"][name], form)
        assert cells[column[1]] == format(figures["PagedCache"][name], form)


@pytest.mark.real_model
def test_the_first_lines_run(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(code.strip().splitlines()) == 8
    exec(code, {})
    assert "The capital of France, everyone knows, is" in capsys.readouterr().out
