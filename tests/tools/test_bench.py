"""The bench gives the figures that it promises. No time is ever asserted."""

import dataclasses
import itertools
import json
import sys
import types
from xml.etree import ElementTree

import gguf
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_paged.compile import api
from hf_paged.packaged import load_packaged_model
from hf_paged.tools.bench import (
    allocator,
    beam,
    compile,
    fork,
    latency,
    mixed,
    peers,
    plan,
    profile,
    race,
    report,
    worker,
)
from hf_paged.tools.bench.bandwidth import Bandwidth, bandwidth_share
from hf_paged.tools.bench.contender import Contender
from hf_paged.tools.bench.contenders import CONTENDERS, Paged, line_up
from hf_paged.tools.bench.fit import fit_line
from hf_paged.tools.bench.growing import subjects
from hf_paged.tools.bench.plot import CHARTS, draw
from hf_paged.tools.bench.race import Lap, Race, race_once, summarize
from hf_paged.tools.bench.scenarios import DESCRIPTIONS, WITH_MODEL, WITHOUT_MODEL
from hf_paged.tools.bench.settings import Settings, load
from hf_paged.tools.lab.candidate import sharing_weights
from hf_paged.tools.lab.chart import apart
from hf_paged.tools.lab.memory import PeakMemory, kv_bytes, weight_bytes
from hf_paged.tools.lab.subject import Subject, random_llama
from hf_paged.tools.lab.table import table
from tests.models import random_ids, tiny_llama

TINY = Settings(random_llama=True, page_size=16, rounds=2, max_new_tokens=4)
LAP = {"contender", "first_token_s", "ms_per_step", "kv_bytes", "ratio", "paired_ratio", "same_tokens"}


@pytest.fixture(scope="module")
def subject():
    return load(TINY)


@pytest.fixture
def in_this_process(monkeypatch):
    """Workers work where the test is."""
    monkeypatch.setattr(worker, "start", lambda task, settings, name, **_: worker.perform(task, name, settings))


@pytest.fixture
def traced_only(monkeypatch):
    """Compiled contenders run what dynamo makes of the model, and nothing is compiled."""
    torch._dynamo.reset()
    monkeypatch.setattr(api, "compile_graph", lambda graph, *arguments: graph)


# Scenarios


def settings(**changes):
    return dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize(
    ("scenario", "changes", "keys"),
    [
        ("latency", {"contexts": (20, 40)}, LAP | {"context", "bandwidth_gb_s", "bandwidth_share"}),
        ("single", {"contexts": (20, 40), "chunk_size": 8}, LAP | {"model", "context", "resident_bytes"}),
        ("chat", {"contexts": (20, 40)}, LAP | {"model", "context", "resident_bytes"}),
        (
            "beam",
            {"contexts": (20,)},
            {"context", "contender", "ms_per_step", "peak_kv_bytes", "ratio", "same_tokens"},
        ),
        ("fork", {"contexts": (20, 40)}, {"context", "contender", "ms", "new_bytes"}),
        ("no-cache", {"contexts": (20,)}, LAP | {"context"}),
    ],
)
def test_a_scenario_gives_a_row_for_each_context_and_contender(subject, scenario, changes, keys):
    asked = settings(baselines=("dynamic", "paged"), **changes)
    results = WITH_MODEL[scenario](subject, asked)
    assert json.loads(json.dumps(results)) == results
    assert [(row["context"], row["contender"]) for row in results["rows"]] == [
        (context, name) for context in asked.contexts for name in asked.baselines
    ]
    for row in results["rows"]:
        assert set(row) == keys
        assert row.get("same_tokens", True)


def test_latency_fits_a_line_for_each_contender():
    rows = [
        {"contender": "paged", "context": context, "ms_per_step": 30 + context / 1000} for context in (128, 2048, 8000)
    ]
    (fit,) = latency.fits([*rows, {"contender": "flex", "context": 128, "error": "no"}])
    assert fit["contender"] == "paged"
    assert fit["slope_us"] == pytest.approx(1.0)
    assert fit["intercept_ms"] == pytest.approx(30)
    assert fit["r_squared"] == pytest.approx(1.0)
    assert fit["growth"] == pytest.approx(32.048 / 30.128)
    assert (fit["growth_from"], fit["growth_to"]) == (128, 2048)


def test_beyond_the_positions_of_the_model_a_random_one_goes_on():
    small = Subject("small", tiny_llama())
    contexts = (20, 5000)
    found = subjects(small, settings(contexts=contexts), ())
    assert [(model.name, reached) for model, reached in found] == [("small", [20]), ("random Llama", [20, 5000])]
    (only,) = subjects(small, settings(contexts=(20,)), ())
    assert only[0] is small


def test_mixed_accounts_for_padding_speed_and_memory(subject, in_this_process):
    asked = settings(prompt_lengths=(5, 18, 40), baselines=("dynamic", "paged", "paged-ragged", "generate_batch"))
    results = mixed.measure(subject, asked)
    token_bytes = 2 * 2 * 2 * 32 * 4  # keys and values, layers, heads, head size, float32
    assert results["minimum_bytes"] == (63 + 3 * 3) * token_bytes
    by_name = {row["contender"]: row for row in results["rows"]}
    assert list(by_name) == list(asked.baselines)
    for row in results["rows"]:
        assert {"total_s", "tokens_per_s", "last_tokens_per_s", "first_token_s", "peak_bytes"} <= set(row)
        assert row["least_peak_bytes"] <= row["peak_bytes"] <= row["most_peak_bytes"]
        assert row["same_tokens"]
    assert "most_peak_MiB" in table(results["rows"])
    assert by_name["dynamic"]["overhead"] == pytest.approx(3 * 43 / 72 - 1)
    assert by_name["paged"]["overhead"] == pytest.approx((1 + 2 + 3) * 16 / 72 - 1)
    assert by_name["paged-ragged"]["kv_bytes"] == by_name["paged"]["kv_bytes"]
    assert "kv_bytes" not in by_name["generate_batch"]


def test_page_sizes_are_compared_on_one_batch(subject):
    results = WITH_MODEL["page-size"](subject, settings(prompt_lengths=(5, 18, 300), max_new_tokens=3))
    assert [row["page_size"] for row in results["rows"]] == [None, 16, 32, 64, 128, 256]
    assert all(row["same_tokens"] for row in results["rows"])
    for row in results["rows"][1:]:
        pages = sum(-(-(length + 2) // row["page_size"]) for length in (5, 18, 300))
        assert row["overhead"] == pytest.approx(pages * row["page_size"] / (323 + 3 * 2) - 1)


def test_the_default_batch_is_sixteen_prompts_of_up_to_1024_tokens():
    lengths = mixed.prompt_lengths(Settings())
    assert len(lengths) == 16
    assert all(16 <= length <= 1024 for length in lengths)
    assert lengths == mixed.prompt_lengths(Settings())


def test_the_speed_at_the_end_is_that_of_the_last_256_tokens():
    assert mixed.last_tokens_per_s(Lap(step_s=[9.0] * 10 + [0.5] * 4), 64) == 128
    assert mixed.last_tokens_per_s(Lap(step_s=[0.5, 0.25, 0.25]), 2) == 6


def test_a_fork_holds_no_pages_and_a_copy_holds_everything(subject):
    rows = fork.measure(subject, settings(contexts=(40,)))["rows"]
    assert [row["new_bytes"] for row in rows] == [40 * subject.token_bytes(), 0]


def test_beams_share_their_prompt(subject):
    dynamic, paged = beam.measure(subject, settings(contexts=(64,)))["rows"]
    assert paged["peak_kv_bytes"] < dynamic["peak_kv_bytes"]


@pytest.mark.parametrize("scenario", [allocator, plan])
def test_host_work_is_measured_for_each_size_of_the_pool(monkeypatch, scenario):
    monkeypatch.setattr(scenario, "POOL_SIZES", (1000, 2000))
    results = scenario.measure(settings(rounds=1))
    assert {row["num_pages"] for row in results["rows"]} == {1000, 2000}
    assert all(row.get("us", row.get("us_per_page")) > 0 for row in results["rows"])


def test_a_process_starts_twice_on_one_cache_of_compiled_code(monkeypatch):
    folders = []

    def start(task, settings, name, **environment):
        folders.append(environment["TORCHINDUCTOR_CACHE_DIR"])
        return worker.perform(task, name, settings)

    monkeypatch.setattr(worker, "start", start)
    rows = compile.measure(settings(baselines=("dynamic",)))["rows"]
    assert [row["start"] for row in rows] == ["cold", "warm"]
    assert folders[0] == folders[1]
    for row in rows:
        assert set(row) == {
            "contender", "start", "first_token_s", "two_tokens_s", "ms_per_step", "compiled_files"
        }  # fmt: skip


def test_a_worker_is_a_process_of_its_own():
    asked = settings(prompt_lengths=(5, 18))
    figures = worker.start("peak", asked, "dynamic")
    assert figures["peak_bytes"] >= 0
    assert worker.read_settings(json.dumps(dataclasses.asdict(asked))) == asked


def test_a_worker_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    assert worker.start("peak", TINY, "dynamic") == {"error": "The process ended with 1."}


def test_a_step_is_taken_apart_into_what_it_is_spent_on(subject):
    rows = profile.measure(subject, settings(contexts=(24,), prompt_lengths=(5, 18), baselines=("dynamic", "paged")))
    assert [(row["context"], row["contender"]) for row in rows["rows"]] == [
        ("24", "dynamic"), ("24", "paged"), ("2 rows", "dynamic"), ("2 rows", "paged"),
        ("2 prompts", "dynamic"), ("2 prompts", "paged"),
    ]  # fmt: skip
    for row in rows["rows"]:
        assert row["linear_ms"] > 0
        assert row["attention_ms"] > 0
        assert row["guards_ms"] == row["graph_ms"] == 0


def test_what_is_not_an_operation_is_python():
    events = [("aten::mm", 40.0), ("aten::_scaled_dot_product_flash_attention_for_cpu", 2.0), ("aten::cat", 3.0)]
    events += [("mkldnn::_linear_pointwise", 5.0), ("aten::add", 1.0), ("hf_paged::write_and_attend", 4.0)]
    assert profile.by_kind(events, 60.0) == {
        "profiled_ms": 60.0, "linear_ms": 45.0, "attention_ms": 2.0, "copies_ms": 3.0, "guards_ms": 0.0,
        "graph_ms": 0.0, "other_operations_ms": 1.0, "python_ms": 9.0,
    }  # fmt: skip


# Contenders


@pytest.mark.parametrize("name", ["static", "no-cache", "paged", "paged-ragged", "paged-compiled", "generate_batch"])
@pytest.mark.parametrize("lengths", [[24], [9, 24]])
def test_contenders_give_the_same_tokens(subject, traced_only, name, lengths):
    ids, mask = subject.padded(lengths)
    with line_up(subject.model, ("dynamic", name), page_size=16) as contenders:
        laps = race_once(contenders, ids, mask if len(lengths) > 1 else None, 5)
    reference, row = summarize([laps])
    assert row.get("error") is None
    assert row["same_tokens"]
    assert reference["ratio"] == reference["paired_ratio"] == 1.0
    assert laps[name].tokens.shape == (len(lengths), 5)
    assert len(laps[name].step_s) == 4


def test_the_compiled_static_cache_is_compiled_for_constant_weights(subject, monkeypatch):
    seen = []

    def stand_in(function, **options):
        def run(**arguments):
            seen.append((options["options"]["freezing"], options["dynamic"], arguments["input_ids"].shape))
            return function(**arguments)

        return run

    monkeypatch.setattr(torch, "compile", stand_in)
    with line_up(subject.model, ("dynamic", "static-compiled"), 16) as contenders:
        laps = [race_once(contenders, subject.prompt(12), None, 3)]
        cache = contenders[1].new_cache(15)
        laps.append(race_once(contenders, subject.prompt(12), None, 3))
        assert contenders[1].new_cache(15) is cache, "its tensors are part of the graph"
        assert contenders[1].new_cache(16) is not cache
    assert summarize(laps)[1]["same_tokens"]
    assert seen == [(True, False, (1, 1))] * 4


@pytest.mark.parametrize("name", ["dynamic", "no-cache", "paged"])
def test_a_prompt_in_chunks_and_turns_is_the_same_prompt(subject, name):
    ids = subject.prompt(40)
    tokens = []
    for chunk_size in (None, 7):
        with line_up(subject.model, (name,), 16) as contenders:
            race = Race(contenders, 60)
            tokens.append([race.lap(piece, 3, chunk_size)[name].tokens for piece in ids.split([20, 20], dim=1)])
    for whole, chunked in zip(*tokens, strict=True):
        assert torch.equal(whole, chunked)


def test_model_objects_differ_and_their_weights_do_not():
    model = tiny_llama()
    other = sharing_weights(model)
    other.set_attn_implementation("paged_flex")
    assert model.config._attn_implementation == "sdpa"
    assert all(ours is theirs for ours, theirs in zip(model.parameters(), other.parameters(), strict=True))
    assert all(ours is theirs for ours, theirs in zip(model.buffers(), other.buffers(), strict=True))


def test_a_contender_that_fails_is_reported_and_the_others_go_on(subject, monkeypatch):
    def fail(self, max_length):
        raise RuntimeError("no pages today")

    monkeypatch.setattr(Paged, "new_cache", fail)
    rows = WITH_MODEL["latency"](subject, settings(contexts=(20,), baselines=("dynamic", "paged")))["rows"]
    assert rows[1] == {"context": 20, "contender": "paged", "error": "RuntimeError: no pages today"}
    assert rows[0]["ratio"] == 1.0
    searched = WITH_MODEL["beam"](subject, settings(contexts=(20,), rounds=1))["rows"]
    assert searched[1]["error"] == "RuntimeError: no pages today"


def test_without_the_reference_nothing_is_compared(subject):
    with line_up(subject.model, ("paged",), 16) as contenders:
        (row,) = summarize([race_once(contenders, subject.prompt(20), None, 3)])
    assert set(row) == {"contender", "first_token_s", "ms_per_step", "kv_bytes"}


def test_an_unknown_contender_is_an_error(subject):
    with (
        pytest.raises(ValueError, match=r"Baselines \['page'\] were asked for; there are dynamic, "),
        line_up(subject.model, ("dynamic", "page"), 16),
    ):
        pass


class Scripted:
    """Notes its turns; each takes as long as it is told."""

    cache = None

    def __init__(self, name, seconds, turns):
        self.name, self.seconds, self.turns = name, iter(seconds), turns
        self.tokens = []

    def begin(self, max_length, mask):
        pass

    def feed(self, ids, num_new_tokens, chunk_size):
        return self.step()

    def step(self):
        self.turns.append(self.name)
        self.tokens.append([len(self.tokens)])
        return next(self.seconds)


def test_contenders_take_turns_in_every_order(monkeypatch):
    monkeypatch.setattr(race, "_races", itertools.count())
    turns = []
    Race([Scripted(name, [1.0] * 9, turns) for name in "abc"], 9).lap(random_ids(1, 4), 6)
    assert "".join(turns) == "acb" + "bac" + "bca" + "cab" + "cba" + "abc"


@pytest.mark.parametrize("names", ["ab", "abc", "abcd", "abcde"])
def test_everybody_is_the_first_with_a_prompt_now_and_then(names):
    firsts = set()
    for _ in range(24):
        turns = []
        Race([Scripted(name, [1.0] * 9, turns) for name in names], 9).lap(random_ids(1, 4), 2)
        firsts.add(turns[0])
    assert firsts == set(names)


def test_medians_and_ratios_leave_the_first_two_steps_out():
    turns = []
    laps = Race(
        [Scripted("dynamic", [5, 9, 9, 2, 4, 8], turns), Scripted("paged", [4, 1, 1, 1, 4, 6], turns)], max_length=9
    ).lap(random_ids(1, 4), 6)
    reference, row = summarize([laps])
    assert (row["first_token_s"], row["ms_per_step"], reference["ms_per_step"]) == (4, 4000, 4000)
    assert (row["ratio"], row["paired_ratio"]) == (1.0, 0.75)
    assert laps["paged"].total_s == 17


# Arithmetic


def test_a_line_through_points_has_the_worked_numbers():
    fit = fit_line((1, 2, 3, 4), (2, 4, 5, 7))
    assert fit.slope == pytest.approx(1.6)
    assert fit.intercept == pytest.approx(0.5)
    assert fit.r_squared == pytest.approx(64 / 65)
    assert fit_line((0, 1), (3, 3)).r_squared == 1.0
    with pytest.raises(ValueError, match="at least two distinct ones"):
        fit_line((2, 2), (1, 3))


def test_the_share_of_the_bandwidth_has_the_worked_numbers():
    assert bandwidth_share(561_000_000, 0.030, 28.8e9) == pytest.approx(0.649, abs=1e-3)


def test_the_bandwidth_is_the_median_of_the_reads_since_the_last_one(monkeypatch):
    bandwidth = Bandwidth(torch.device("cpu"))
    bandwidth.measure()
    assert bandwidth.take_median() > 0
    rates = iter([3.0, 1.0, 2.0, 7.0])
    monkeypatch.setattr(bandwidth, "_rate", lambda read: next(rates))
    for _ in range(3):
        bandwidth.measure()
    assert bandwidth.take_median() == 2
    bandwidth.measure()
    assert bandwidth.take_median() == 7


def test_something_else_takes_its_turn_after_each_step_of_all(subject):
    calls = []
    with line_up(subject.model, ("dynamic", "paged"), 16) as contenders:
        race_once(contenders, subject.prompt(8), None, 4, lambda: calls.append([len(c.tokens) for c in contenders]))
    assert calls == [[2, 2], [3, 3], [4, 4]]


def test_a_step_reads_every_weight_once():
    sizes = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    tied, untied = (
        LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tie)) for tie in (True, False)
    )
    in_layers = 4 * (4 * 8 * 8 + 3 * 8 * 8 + 3 * 8)
    assert weight_bytes(tied) == weight_bytes(untied) == in_layers + 4 * 50 * 8


def test_the_bytes_of_a_cache_are_those_it_holds(subject):
    ids = subject.prompt(20)
    with line_up(subject.model, ("dynamic", "static", "paged", "no-cache"), 16) as contenders:
        race = Race(contenders, 30)
        laps = race.lap(ids, 1)
    held = [laps[name].kv_bytes / subject.token_bytes() for name in ("dynamic", "static", "paged", "no-cache")]
    assert held == [20, 30, 32, 0]
    assert kv_bytes(DynamicCache(config=subject.model.config)) == 0


def test_peak_memory_counts_from_where_it_began():
    memory = PeakMemory(torch.device("cpu"))
    held = torch.ones(2**24)
    assert memory.bytes >= 0.9 * held.nbytes


# Output


def test_a_table_has_the_worked_numbers():
    rows = [{"context": 128, "ms_per_step": 61.2345, "kv_bytes": 3145728}, {"context": 8, "error": "no"}]
    assert table(rows).splitlines() == [
        "context  ms_per_step  kv_MiB  error",
        "    128        61.23    3.00",
        "      8                       no",
    ]


def rows_of(scenario):
    for x in (100, 1000):
        for name in ("dynamic", "paged"):
            row = {chart.y: 1.0 + x for chart in CHARTS[scenario]}
            row |= {chart.x: x for chart in CHARTS[scenario] if chart.x is not None}
            yield {"contender": name, "num_threads": 1, "num_rows": 16} | row
    yield {"contender": "flex", "context": 100, "num_pages": 100, "error": "no"}


@pytest.mark.parametrize("scenario", DESCRIPTIONS)
def test_every_scenario_has_charts_that_name_their_lines(scenario, tmp_path):
    paths = draw(scenario, list(rows_of(scenario)), tmp_path / "plots")
    assert [path.name for path in paths] == [f"{scenario}-{chart.y}.svg" for chart in CHARTS[scenario]]
    for path, chart in zip(paths, CHARTS[scenario], strict=True):
        texts = {"".join(element.itertext()).strip() for element in ElementTree.parse(path).iter()}
        assert chart.title in texts
        names = {"contender": {"dynamic", "paged"}, "num_threads": {"1 thread"}, "num_rows": {"16 rows"}}
        assert names[chart.by] <= texts
        assert "flex" not in texts


def test_each_model_of_a_scenario_has_its_own_charts(tmp_path):
    rows = [{"model": model} | row for model in ("SmolLM2", "random Llama") for row in rows_of("chat")]
    names = {path.name for path in draw("chat", rows, tmp_path)}
    assert "chat-ms_per_step-SmolLM2.svg" in names
    assert "chat-ms_per_step-random-Llama.svg" in names


def test_labels_are_moved_apart():
    assert apart((1, 1.1, 5), 1) == [1, 2, 5]


def test_every_scenario_says_what_it_is():
    assert set(DESCRIPTIONS) == set(WITH_MODEL) | set(WITHOUT_MODEL) == set(CHARTS)
    assert all(line.endswith(".") for line in DESCRIPTIONS.values())
    assert "dynamic" in CONTENDERS
    assert CONTENDERS["dynamic"] is Contender


# Settings


def test_settings_that_make_no_sense_are_errors():
    with pytest.raises(ValueError, match="at least 1 round"):
        settings(rounds=0)
    with pytest.raises(ValueError, match="dtype='float33' was asked for"):
        load(settings(dtype="float33"))
    with pytest.raises(ValueError, match="beside random_llama"):
        load(settings(model="gpt2"))
    with pytest.raises(ValueError, match="more than lies between two of them"):
        WITH_MODEL["chat"](random_llama(), settings(contexts=(20, 22)))


def test_any_model_is_loaded_by_its_path(tmp_path, monkeypatch):
    tiny_llama().save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(
        "hf_paged.tools.lab.subject.AutoTokenizer", types.SimpleNamespace(from_pretrained=lambda _: None)
    )
    subject = load(Settings(model=str(tmp_path / "tiny")))
    assert (subject.name, subject.max_length) == ("tiny", 4096)
    assert not subject.model.training


# Peers


def test_peers_that_are_missing_are_named(monkeypatch):
    def fast(path, num_threads):
        return lambda rows, num_new: [[7] * num_new for _ in rows]

    monkeypatch.setattr(
        peers,
        "PEERS",
        {
            "missing": peers.Peer("no_such_module", "it", fast),
            "unnamed": peers.Peer("pytest", "pytest", fast),
            "short": peers.Peer("pytest", "pytest", lambda *_: lambda rows, num_new: [[7] for _ in rows]),
            "there": peers.Peer("pytest", "pytest", fast),
        },
    )
    missing, unnamed, short, there = peers.measure({"short": "x", "there": "x"}, [[1, 2], [3]], 4, 1, 1)
    assert missing["error"] == "no_such_module is not installed. Run: pip install it"
    assert unnamed["error"] == "No model was given. Add --model-path unnamed=PATH"
    assert "4 new tokens were asked for" in short["error"]
    assert set(there) == {"contender", "version", "total_s", "tokens_per_s"}


def test_peers_are_given_the_packaged_model_in_float16(tmp_path):
    peers.main(["--write-gguf", str(tmp_path / "model.gguf")])
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    packed = {tensor.name: tensor for tensor in reader.tensors}
    assert {str(tensor.data.dtype) for tensor in packed.values()} == {"float16", "float32"}
    model, tokenizer = load_packaged_model()
    embedding = torch.tensor(packed["token_embd.weight"].data)
    assert torch.equal(embedding, model.get_input_embeddings().weight.half())
    gate = torch.tensor(packed["blk.3.ffn_gate.weight"].data)
    assert torch.equal(gate, model.model.layers[3].mlp.gate_proj.weight.half())
    assert len(packed) == len(list(model.parameters()))
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == len(tokenizer)


# Tables for docs

RESULTS = {
    "latency": {
        "fits": [],
        "rows": [
            {"context": 128, "contender": "dynamic", "ms_per_step": 60.0, "first_token_s": 0.5, "same_tokens": True},
            {"context": 128, "contender": "paged", "ms_per_step": 40.0, "first_token_s": 1.0, "same_tokens": True},
            {"context": 512, "contender": "paged", "error": "RuntimeError: no"},
        ],
    },
}


def test_results_are_laid_out_beside_the_reference(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    made = report.tables(tmp_path)
    assert set(made) == {"results/latency", "results/fits"}
    laid_out = made["results/latency"]
    assert laid_out.splitlines()[2:] == [
        "| 128 | dynamic | 60.0 | 1.00 | 0.50 | 1.00 | yes |  |",
        "| 128 | paged | 40.0 | 1.50 | 1.00 | 0.50 | yes |  |",
        "| 512 | paged |  |  |  |  |  | RuntimeError: no |",
    ]
    page = "before\n\n<!-- table: results/latency -->\nold\n<!-- end -->\nafter\n"
    filled = report.fill(page, made)
    assert filled == page.replace("old", f"\n{laid_out}\n")
    assert report.fill(filled, made) == filled
    with pytest.raises(ValueError, match="wants a table of 'results/latency', but there are results of"):
        report.fill(page, {})
