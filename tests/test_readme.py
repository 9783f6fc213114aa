"""What README and docs show can be run, and their figures are those of the results."""

import json
import re
from pathlib import Path

import pytest
import torch

from hf_paged.bench.report import fill, tables
from tests.families import FAMILIES

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


def test_the_number_of_families_is_that_of_the_table():
    assert f"lists\n{len(FAMILIES)} model families" in README.read_text()


def test_the_figures_of_beams_and_copies_are_those_of_the_results():
    results = json.loads((README.parent / "docs" / "results" / "beams.json").read_text())
    beams, copies = results["beams"], results["copies"]
    for name, theirs, ours in (
        (
            "peak of the KV cache, MiB",
            format(beams["peak_MiB"]["DynamicCache"], ".1f"),
            beams["peak_MiB"]["PagedCache"],
        ),
        ("pages copied per row and step, at most", "all", beams["max_copied_pages_per_row_and_step"]),
        (
            "`copy.deepcopy`, ms",
            format(copies["milliseconds"]["DynamicCache"], ".1f"),
            copies["milliseconds"]["PagedCache"],
        ),
    ):
        (line,) = [line for line in README.read_text().splitlines() if line.startswith(f"| {name}")]
        cells = [cell.strip(" *") for cell in line.split("|")[2:-1]]
        assert cells == [theirs, format(ours, ".2f" if theirs == "all" else ".1f")]
    assert beams["same_sequences"]
    assert beams["largest_score_difference"] < 1e-6


def test_the_tables_of_the_performance_page_are_those_of_the_results():
    page = (README.parent / "docs" / "performance.md").read_text()
    assert fill(page, tables(README.parent / "docs" / "results" / "bench")) == page


@pytest.mark.real_model
def test_the_first_lines_run(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(code.strip().splitlines()) == 8
    exec(code, {})
    assert "The capital of France, everyone knows, is" in capsys.readouterr().out


@pytest.mark.real_model
def test_the_page_about_generate_runs_from_top_to_bottom(capsys):
    page = (README.parent / "docs" / "generate.md").read_text()
    names: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, names)
    assert torch.equal(names["compiled"][:, : names["inputs"].input_ids.shape[1]], names["inputs"].input_ids)
    assert names["samples"].shape[0] == 4
    assert "pages are held by several beams" in capsys.readouterr().out
