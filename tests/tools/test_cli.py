"""The command line: what is printed, written and drawn."""

import json
import re
import subprocess
import sys

import pytest

from hf_paged.tools.cli import main

TINY = ["--random-llama", "--page-size", "16", "--rounds", "1", "--max-new-tokens", "3"]


def test_a_scenario_prints_a_table_and_writes_json_and_pictures(tmp_path, capsys):
    path, folder = tmp_path / "own.json", tmp_path / "plots"
    arguments = ["bench", "beam", *TINY, "--contexts", "20,40", "--json", str(path), "--plot", str(folder)]
    assert main(arguments) == 0
    results = json.loads(path.read_text())
    assert results["command"] == " ".join(["hf-paged", *arguments])
    assert results["model"] == "random Llama"
    assert results["settings"]["contexts"] == [20, 40]
    assert {"machine", "versions", "commit", "num_threads"} <= set(results)
    assert [row["context"] for row in results["beam"]["rows"]] == [20, 20, 40, 40]
    assert {picture.name for picture in folder.iterdir()} == {"own-peak_kv_bytes.svg", "own-ms_per_step.svg"}
    printed = capsys.readouterr().out
    assert re.search(r"context +ms per step +times as fast", printed)
    assert re.search(r"20 +dynamic", printed)


def test_several_scenarios_go_into_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_paged.tools.bench.scenarios.inside.host.ALLOCATED_POOLS", (1000,))
    monkeypatch.setattr("hf_paged.tools.bench.scenarios.inside.host.PLANNED_POOLS", (100,))
    path = tmp_path / "both.json"
    assert main(["bench", "allocator", "plan", *TINY, "--json", str(path), "--plot", str(tmp_path)]) == 0
    results = json.loads(path.read_text())
    assert (len(results["allocator"]["rows"]), len(results["plan"]["rows"])) == (2, 1)
    assert {"allocator-us_per_page.svg", "plan-us.svg"} <= {picture.name for picture in tmp_path.iterdir()}


def test_a_mistake_is_said_without_a_traceback(capsys):
    assert main(["bench", "latency", *TINY, "--caches", "page"]) == 2
    assert "hf-paged: caches=['page'] were asked for" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["matplotlib", "pandas"])
def test_pictures_that_can_not_be_drawn_are_refused_before_measuring(monkeypatch, tmp_path, capsys, missing):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else name)
    assert main(["bench", "latency", *TINY, "--plot", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told == f"hf-paged: No module named '{missing}'. Run: pip install {missing}\n"


def test_a_package_that_the_command_needs_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert main(["ppl", "--dataset", "owner/name"]) == 2
    assert "Run: pip install datasets\n" in capsys.readouterr().err


def test_the_help_lists_scenarios_and_baselines(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "latency time to the first token" in printed
    assert "generate_batch" in printed


def test_importing_the_package_prints_no_warnings():
    process = subprocess.run([sys.executable, "-c", "import hf_paged"], capture_output=True, text=True, check=True)
    assert process.stderr == ""
