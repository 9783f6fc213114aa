"""The figures of README and docs are those of the results."""

import json
import re
from pathlib import Path

import pytest

from hf_paged.tools.bench.report import fill, plot, tables
from tests.sweep.results import RESULTS, Results

README = Path(__file__).parent.parent / "README.md"


def speed_lines() -> list[str]:
    """The table of speed and memory."""

    def rows(name, scenario):
        results = json.loads((README.parent / "docs" / "results" / "bench" / f"{name}.json").read_text())[scenario]
        return {(row.get("context"), row["baseline"]): row for row in results["rows"]}, results

    mixed, results = rows("mixed-2", "mixed")
    latency, _ = rows("latency-2", "latency")
    assert all(row["same_tokens"] for row in (*mixed.values(), *latency.values()))
    names = {"dynamic": "dynamic", "paged": "paged-ragged", "paged-compiled": "paged-compiled"}
    minimum = results["minimum_bytes"] / 2**20
    lines = ["| | DynamicCache + sdpa | PagedCache | PagedCache, `compiled` |", "|---|---|---|---|"]
    for label, key, unit, form in (
        ("batch: all, s", "total_s", 1, ".1f"),
        ("batch: ms per decoding step", "ms_per_step", 1, ".0f"),
        (f"batch: KV cache, MiB (the tokens alone: {minimum:.0f})", "kv_bytes", 2**20, ".0f"),
        ("batch: peak memory beyond the model, MiB", "peak_bytes", 2**20, ".0f"),
    ):
        cells = [format(mixed[None, mixed_name][key] / unit, form) for mixed_name in names.values()]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    for context in (128, 2048, 8000):
        cells = [format(latency[context, name]["ms_per_step"], ".1f") for name in names]
        lines.append(f"| one row: ms per token after {context} tokens | {' | '.join(cells)} |")
    many, _ = rows("many", "many")
    assert all(row["same_tokens"] for row in many.values())
    for label, key, unit, form in (
        ("64 prompts: all, by `generate_many`, s", "total_s", 1, ".1f"),
        ("64 prompts: peak memory beyond the model, MiB", "peak_bytes", 2**20, ".0f"),
    ):
        cells = [format(many[None, name][key] / unit, form) for name in ("dynamic", "many", "many-compiled")]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def test_the_table_of_speed_and_memory_is_that_of_the_results():
    assert "\n".join(speed_lines()) in README.read_text()


def test_the_number_of_families_is_that_of_the_table():
    built = [entry for entry in Results(RESULTS).models.values() if "not built" not in entry]
    assert f"lists\n{len(built)} classes of models" in README.read_text()


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


def test_the_table_of_the_gpu_is_that_of_the_results():
    results = json.loads((README.parent / "docs" / "results" / "bench" / "gpu-shapes.json").read_text())
    baselines = "dynamic-no-cudnn", "static-compiled", "paged-compiled", "paged-compiled-loop"

    def cells(scenario, key, form, scale=1.0):
        by_name = {row["baseline"]: row[key] for row in results[scenario]["rows"] if key in row}
        return [format(scale * by_name[name], form) if name in by_name else "" for name in baselines]

    text = README.read_text()
    table = text[text.index("| | DynamicCache + sdpa | StaticCache") :].splitlines()[2:7]
    assert [[cell.strip() for cell in line.split("|")[2:-1]] for line in table] == [
        cells("latency", "ms_per_step", ".1f"),
        cells("latency", "first_token_s", ".0f", 1e3),
        cells("mixed", "ms_per_step", ".1f"),
        cells("mixed", "total_s", ".1f"),
        cells("mixed", "kv_bytes", ".0f", 2**-20),
    ]


def test_the_tables_of_the_performance_page_are_those_of_the_results():
    page = (README.parent / "docs" / "performance.md").read_text()
    assert fill(page, tables(README.parent / "docs" / "results" / "bench")) == page


def test_the_first_lines_are_eight():
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(code.strip().splitlines()) == 8


def test_the_plots_are_those_of_the_results(tmp_path):
    pytest.importorskip("matplotlib")
    docs = README.parent / "docs"
    plot((docs / "performance.md").read_text(), docs / "results" / "bench", tmp_path)
    assert len(made := sorted(tmp_path.iterdir())) == 2
    assert [path.read_text() for path in made] == [(docs / "assets" / path.name).read_text() for path in made]
