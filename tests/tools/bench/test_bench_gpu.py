"""The script for a GPU keeps to its limit, and says of each case what it gave."""

import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hf_paged.compile import api
from hf_paged.tools.bench import report
from hf_paged.tools.bench.scenarios import SCENARIOS
from hf_paged.tools.bench.whole import WHOLE

pytestmark = pytest.mark.usefixtures("quick_collection")  # a bench collects before it measures memory

TRIAL = ["--shape", "tiny", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("bench_gpu", Path(__file__).parents[3] / "examples" / "bench_gpu.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "bench_gpu", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "_new_process", lambda environment: ThreadPoolExecutor(1))
    return module


@pytest.fixture
def run(script, tmp_path):
    def run(*arguments):
        script.main([*TRIAL, "--json", str(tmp_path / "gpu-shapes.json"), *arguments])
        return json.loads((tmp_path / "gpu-shapes.json").read_text())

    return run


def test_every_case_can_be_asked_for(script):
    arguments = script.argparse.Namespace(shape=None, device="cuda", dtype="bfloat16")
    assert len({case.name for case in script.CASES}) == len(script.CASES)
    for case in script.CASES:
        settings = case.settings(arguments)
        assert case.scenario in SCENARIOS
        assert settings.whole
        assert (settings.shape or "") == case.shape
        assert set(settings.caches or ()) <= WHOLE.keys()


def test_a_case_that_does_not_fit_is_a_row_that_says_so(script, run):
    results = run("--seconds", "0")
    rows = [row for name in SCENARIOS if name in results for row in results[name]["rows"]]
    assert len(rows) == len(script.CASES)
    assert all(row["error"].startswith("not measured: takes about ") for row in rows)


def test_a_case_that_fails_is_a_row_and_the_next_one_is_measured(script, run, monkeypatch):
    def fail(settings):
        raise torch.AcceleratorError("an illegal memory access")

    def measure(scenario, settings):
        return fail(settings) if settings.max_new_tokens == 64 else {"rows": [{"baseline": "dynamic"}]}

    monkeypatch.setattr(script, "measure", measure)
    results = run("--seconds", "1000", "--cases", "8b-512,7b-100000")
    (failed,), (measured,) = (results[name]["rows"] for name in ("latency", "single"))
    assert failed["error"] == "AcceleratorError: an illegal memory access"
    assert measured == {"model": "llama-2-7b", "context": "7b-100000", "baseline": "dynamic"}


def test_a_trial_gives_rows_that_a_page_can_show(script, run, monkeypatch, tmp_path):
    torch._dynamo.reset()
    monkeypatch.setattr(api, "compile_graph", lambda graph, *arguments: graph)
    cases = [replace(case, more=case.more | {"max_new_tokens": 4, "rounds": 1}) for case in script.CASES[1:]]
    monkeypatch.setattr(script, "CASES", (script.CASES[0], *cases))
    results = run("--seconds", "1000", "--cases", "attention,8b-8192,135m-32-rows")
    assert "versions" in results
    assert list(results["seconds"]) == ["attention", "8b-8192", "135m-32-rows"]
    assert len(results["attention"]["rows"]) == 1
    compared = [row["baseline"] for row in results["latency"]["rows"]]
    assert compared[:2] == ["dynamic-no-cudnn", "paged-compiled"]
    assert all("error" not in row for name in ("latency", "mixed") for row in results[name]["rows"])
    made = report.tables(tmp_path)
    assert set(made) == {f"gpu-shapes/{name}" for name in ("attention", "latency", "mixed")}
    assert "| llama-3-8b | 24 | dynamic-no-cudnn |" in made["gpu-shapes/latency"]
    assert "| smollm2-135m | 135m-32-rows | paged-ragged |" in made["gpu-shapes/mixed"]


def test_an_unknown_case_is_an_error(run, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("--cases", "8b-512,9b")
    assert "there are ['attention', '8b-512'" in capsys.readouterr().err
