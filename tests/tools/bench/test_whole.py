"""Whole runs of generate() decode what steps decode, and say what they took."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from hf_paged.compile import api
from hf_paged.tools.bench import whole
from hf_paged.tools.bench.race import Race, laps_of, race_once
from hf_paged.tools.bench.scenario import with_speed
from hf_paged.tools.bench.scenarios import SCENARIOS
from hf_paged.tools.bench.settings import Settings, line_up_for, load
from hf_paged.tools.bench.whole import WHOLE, of_kernels
from hf_paged.tools.lab import baselines as lab
from hf_paged.tools.lab.baseline import Baseline
from hf_paged.tools.lab.baselines import PagedRagged, line_up
from hf_paged.tools.lab.memory import token_bytes

pytestmark = pytest.mark.usefixtures("quick_collection")  # a bench collects before it measures memory

TINY = Settings(shape="tiny", whole=True, page_size=16, rounds=1, max_new_tokens=5)


@pytest.fixture(scope="module")
def model():
    return load(TINY)


@pytest.fixture(autouse=True)
def traced_only(monkeypatch):
    """Compiled baselines run what dynamo makes of the model, and nothing is compiled."""
    torch._dynamo.reset()
    monkeypatch.setattr(api, "compile_graph", lambda graph, *arguments: graph)


def tokens_by_steps(model, lengths, num_new):
    ids, mask = model.padded(lengths)
    baseline = Baseline(model.model, 16)
    return ids, mask, race_once([baseline], ids, mask if len(lengths) > 1 else None, num_new)["dynamic"].tokens


@pytest.mark.parametrize("lengths", [(40,), (5, 40, 18)])
@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_run_gives_the_tokens_of_its_steps(model, name, lengths):
    ids, mask, expected = tokens_by_steps(model, lengths, 6)
    with line_up(model.model, [name], 16, WHOLE) as baselines:
        lap = race_once(baselines, ids, mask if len(lengths) > 1 else None, 6)[name]
    assert lap.error is None
    assert torch.equal(lap.tokens, expected)
    assert len(lap.step_s) == 5
    assert min(lap.first_token_s, *lap.step_s) > 0


@pytest.mark.parametrize("name", ["dynamic", "static-compiled", "paged", "paged-compiled"])
@pytest.mark.parametrize("chunk_size", [None, 7])
def test_a_whole_run_goes_on_from_its_cache(model, name, chunk_size):
    pieces = model.prompt(40).split([20, 20], dim=1)
    tokens = []
    for kinds in (WHOLE, {name: Baseline}):
        with line_up(model.model, [name], 16, kinds) as baselines:
            race = Race(baselines, 60)
            tokens.append([race.lap(piece, 4, chunk_size)[baselines[0].name].tokens for piece in pieces])
    for ours, theirs in zip(*tokens, strict=True):
        assert torch.equal(ours, theirs)


def test_no_token_is_the_end(model):
    ids, _, tokens = tokens_by_steps(model, (40,), 6)
    baseline = WHOLE["dynamic"](model.model, 16)
    baseline.model.generation_config.eos_token_id = int(tokens[0, 2])
    assert torch.equal(race_once([baseline], ids, None, 6)["dynamic"].tokens, tokens)


def test_another_loop_is_given_to_generate(model):
    def loop(model, input_ids, **more):
        raise RuntimeError(f"{len(input_ids)} rows for another loop")

    kind = whole._driven(PagedRagged, name="paged-loop", loop=staticmethod(loop))
    ids, mask = model.padded((5, 40))
    lap = race_once([kind(model.model, 16)], ids, mask, 4)["paged-loop"]
    assert lap.error == "RuntimeError: 2 rows for another loop"


@pytest.mark.parametrize("scenario", ["latency", "mixed", "single"])
def test_rows_of_whole_runs_have_their_memory_beside_the_least(model, scenario):
    settings = dataclasses.replace(
        TINY, contexts=(40,), prompt_lengths=(5, 40), caches=("dynamic-no-cudnn", "static-compiled", "paged")
    )
    rows = {row["baseline"]: row for row in SCENARIOS[scenario].measure(settings)["rows"]}
    num_tokens = 45 + 2 * 4 if scenario == "mixed" else 40 + 4
    for row in rows.values():
        assert row["minimum_bytes"] == num_tokens * token_bytes(model.model)
        assert row["peak_bytes"] >= 0
        assert row["same_tokens"], "as the first of the references"
        assert "resident_bytes" not in row
    assert rows["paged"]["reserved_bytes"] >= rows["paged"]["kv_bytes"]
    assert "reserved_bytes" not in rows["dynamic-no-cudnn"]
    fast = [row | {"ms_per_step": 2.0 if row["baseline"] == "dynamic-no-cudnn" else 1.0} for row in rows.values()]
    assert with_speed(fast)[-1]["ms_per_step_speed"] == 2


def test_who_is_out_stays_out_and_the_others_go_on(model, monkeypatch):
    tried = []

    def fail(self, max_length):
        tried.append(self.name)
        raise torch.OutOfMemoryError("no memory today")

    monkeypatch.setattr(lab.StaticCompiled, "new_cache", fail)
    settings = dataclasses.replace(TINY, rounds=2)
    with line_up_for(settings, model, ("dynamic", "static-compiled")) as baselines:
        laps = laps_of(settings, baselines, model.prompt(20), None, int)
    assert tried == ["static-compiled"]
    assert len(laps) == 2
    for lap in laps:
        assert lap["static-compiled"].error == "OutOfMemoryError: no memory today"
        assert lap["dynamic"].error is None


def test_the_first_of_the_whole_runs_is_not_counted(model, monkeypatch):
    begun = []
    new_cache = Baseline.new_cache
    monkeypatch.setattr(Baseline, "new_cache", lambda *arguments: begun.append(1) or new_cache(*arguments))
    settings = dataclasses.replace(TINY, rounds=2)
    with line_up_for(settings, model, ("dynamic",)) as baselines:
        assert len(laps_of(settings, baselines, model.prompt(20), None, int)) == 2
    assert len(begun) == 3


def kernel(start, end, name, device="CUDA", is_user_annotation=False):
    return SimpleNamespace(
        device_type=SimpleNamespace(name=device),
        time_range=SimpleNamespace(start=start, end=end),
        name=name,
        is_user_annotation=is_user_annotation,
    )


def test_a_gpu_is_busy_while_any_kernel_runs():
    events = [
        kernel(1000, 2000, "gemm"),
        kernel(0, 9000, "aten::mm", "CPU"),
        kernel(0, 9000, "a graph", is_user_annotation=True),
        kernel(2000, 2500, "copy"),
        kernel(3400, 3800, "gemm"),
        kernel(3600, 4000, "copy"),
        kernel(4500, 5000, "gemm"),
    ]
    figures = of_kernels(events, 2)
    assert figures["kernels"] == pytest.approx({"gemm": 0.95, "copy": 0.45})
    assert list(figures["kernels"]) == ["gemm", "copy"]
    assert figures["kernel_ms"] == pytest.approx(1.4)
    assert figures["busy_share"] == pytest.approx((600 + 500) / 2000), "from 3000 to 5000"
    assert of_kernels(events[1:3], 2) == {}
