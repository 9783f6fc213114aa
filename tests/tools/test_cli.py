"""The command line: what is printed, written and drawn."""

import json
import subprocess
import sys

import pytest

from hf_paged.tools.cli import main

TINY = ["--random-llama", "--page-size", "16", "--rounds", "1", "--max-new-tokens", "3"]


def test_a_scenario_prints_a_table_and_writes_json_and_pictures(tmp_path, capsys):
    path, folder = tmp_path / "fork.json", tmp_path / "plots"
    arguments = ["bench", "fork", *TINY, "--contexts", "20,40", "--json", str(path), "--plot", str(folder)]
    assert main(arguments) == 0
    results = json.loads(path.read_text())
    assert results["command"] == " ".join(["hf-paged", *arguments])
    assert results["model"] == "random Llama"
    assert results["settings"]["contexts"] == [20, 40]
    assert {"machine", "versions", "commit", "num_threads"} <= set(results)
    assert [row["context"] for row in results["fork"]["rows"]] == [20, 20, 40, 40]
    assert [picture.name for picture in folder.iterdir()] == ["fork-ms.svg"]
    printed = capsys.readouterr().out
    assert "context  baseline" in printed
    assert "     20  dynamic" in printed


def test_several_scenarios_go_into_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_paged.tools.bench.allocator.POOL_SIZES", (1000,))
    path = tmp_path / "both.json"
    assert main(["bench", "allocator", "fork", *TINY, "--contexts", "20", "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    assert len(results["allocator"]["rows"]) == len(results["fork"]["rows"]) == 2


def test_a_mistake_is_said_without_a_traceback(capsys):
    assert main(["bench", "fork", *TINY, "--baselines", "page"]) == 2
    assert "hf-paged: Baselines ['page'] were asked for" in capsys.readouterr().err


def test_pictures_without_matplotlib_are_refused_before_anything_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["bench", "fork", *TINY, "--plot", str(tmp_path)]) == 2
    assert 'Run: pip install "hf-paged[bench]"' in capsys.readouterr().err


def test_the_help_lists_scenarios_and_baselines(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "--help"])
    printed = capsys.readouterr().out
    assert "latency    Latency: time to the first token" in printed
    assert "generate_batch" in printed


def test_importing_the_package_prints_no_warnings():
    process = subprocess.run([sys.executable, "-c", "import hf_paged"], capture_output=True, text=True, check=True)
    assert process.stderr == ""
