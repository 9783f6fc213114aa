"""The bench gives the figures that it promises. No time is ever asserted."""

import dataclasses
import itertools
import json
import math
import types
from concurrent.futures import ThreadPoolExecutor
from xml.etree import ElementTree

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_paged.compile import api
from hf_paged.tools.bench import race, report, worker
from hf_paged.tools.bench.bandwidth import Bandwidth
from hf_paged.tools.bench.race import Lap, Race, race_once, summarize
from hf_paged.tools.bench.scenario import notes
from hf_paged.tools.bench.scenarios import SCENARIOS, latency, mixed
from hf_paged.tools.bench.scenarios.growing import reaching
from hf_paged.tools.bench.scenarios.inside import ablation, compile, host, profile
from hf_paged.tools.bench.settings import Settings, load
from hf_paged.tools.lab.baseline import Baseline, sharing_weights
from hf_paged.tools.lab.baselines import BASELINES, Paged, line_up
from hf_paged.tools.lab.memory import PeakMemory, kv_bytes, token_bytes, weight_bytes
from hf_paged.tools.lab.model import MeasuredModel
from hf_paged.tools.lab.table import table
from tests.models import random_ids, tiny_llama

TINY = Settings(random_llama=True, page_size=16, rounds=2, max_new_tokens=4)
LAP = {"baseline", "first_token_s", "ms_per_step", "kv_bytes", "same_tokens"}
LAP |= {"ratio", "paired_ratio", "ratio_interval"}
BOUNDED = LAP | {"context", "minimum_bytes"}


@pytest.fixture(scope="module")
def model():
    return load(TINY)


@pytest.fixture
def traced_only(monkeypatch):
    """Compiled baselines run what dynamo makes of the model, and nothing is compiled."""
    torch._dynamo.reset()
    monkeypatch.setattr(api, "compile_graph", lambda graph, *arguments: graph)


# Scenarios


def measure(scenario, **changes):
    return SCENARIOS[scenario].measure(settings(**changes))


def settings(**changes):
    return dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize(
    ("scenario", "changes", "keys"),
    [
        ("latency", {"contexts": (20, 40)}, BOUNDED | {"bandwidth_gb_s", "bandwidth_share"}),
        ("single", {"contexts": (20, 40), "chunk_size": 8}, BOUNDED | {"model", "resident_bytes"}),
        ("chat", {"contexts": (20, 40)}, BOUNDED | {"model", "resident_bytes"}),
        ("beam", {"contexts": (64,)}, {"context", "baseline", "ms_per_step", "peak_kv_bytes", "ratio", "same_tokens"}),
    ],
)
def test_a_scenario_gives_a_row_for_each_context_and_baseline(scenario, changes, keys):
    results = measure(scenario, caches=("dynamic", "paged"), **changes)
    assert json.loads(json.dumps(results)) == results
    assert [(row["context"], row["baseline"]) for row in results["rows"]] == [
        (context, name) for context in changes["contexts"] for name in ("dynamic", "paged")
    ]
    for row in results["rows"]:
        assert set(row) == keys
        assert row["same_tokens"]
    if scenario == "beam":
        dynamic, paged = results["rows"]
        assert paged["peak_kv_bytes"] < dynamic["peak_kv_bytes"], "beams share their prompt"


def test_latency_fits_a_line_for_each_baseline():
    rows = [
        {"baseline": "paged", "context": context, "ms_per_step": ms}
        for context, ms in ((128, 2), (256, 4), (384, 5), (512, 7))
    ]
    (fit,) = latency.fits([*rows, {"baseline": "flex", "context": 128, "error": "no"}])
    assert fit["baseline"] == "paged"
    assert fit["slope_us"] == pytest.approx(1600 / 128)
    assert fit["intercept_ms"] == pytest.approx(0.5)
    assert fit["r_squared"] == pytest.approx(64 / 65)
    assert (fit["growth"], fit["growth_from"], fit["growth_to"]) == (3.5, 128, 512)


def test_beyond_the_positions_of_the_model_a_random_one_goes_on():
    small = MeasuredModel("small", tiny_llama())
    found = reaching(small, settings(contexts=(20, 5000)), ())
    assert [(model.name, reached) for model, reached in found] == [("small", [20]), ("random Llama", [20, 5000])]
    (only,) = reaching(small, settings(contexts=(20,)), ())
    assert only[0] is small


def test_mixed_accounts_for_padding_speed_and_memory(monkeypatch):
    names = ("dynamic", "paged", "paged-ragged", "generate_batch")
    peaks = itertools.cycle((7, 5, 6))

    def start(function, asked, name):
        assert function is mixed.peak
        return {"peak_bytes": next(peaks), "kept_bytes": 3} if name != "paged" else {"error": "no room"}

    monkeypatch.setattr(mixed, "in_new_process", start)
    results = measure("mixed", prompt_lengths=(5, 18, 40), caches=names, rounds=1)
    bytes_per_token = 2 * 2 * 2 * 32 * 4  # keys and values, layers, heads, head size, float32
    assert results["minimum_bytes"] == (63 + 3 * 3) * bytes_per_token
    by_name = {row["baseline"]: row for row in results["rows"]}
    assert tuple(by_name) == names
    memory = {"peak_bytes": 6, "least_peak_bytes": 5, "most_peak_bytes": 7, "peak_noise_bytes": 2 + 3}
    for name, row in by_name.items():
        assert {"total_s", "tokens_per_s", "last_tokens_per_s", "first_token_s"} <= set(row)
        assert (memory if name != "paged" else {"peak_error": "no room"}).items() <= row.items()
        assert row["same_tokens"]
    assert by_name["dynamic"]["overhead"] == pytest.approx(3 * 43 / 72 - 1)
    assert by_name["paged"]["overhead"] == pytest.approx((1 + 2 + 3) * 16 / 72 - 1)
    assert by_name["paged-ragged"]["kv_bytes"] == by_name["paged"]["kv_bytes"]
    assert "kv_bytes" not in by_name["generate_batch"]


def test_page_sizes_are_compared_on_one_batch():
    rows = measure("page-size", prompt_lengths=(5, 18, 300), max_new_tokens=3)["rows"]
    assert [row["page_size"] for row in rows] == [None, 16, 32, 64, 128, 256]
    assert all(row["same_tokens"] for row in rows)
    for row in rows[1:]:
        pages = sum(-(-(length + 2) // row["page_size"]) for length in (5, 18, 300))
        assert row["overhead"] == pytest.approx(pages * row["page_size"] / (323 + 3 * 2) - 1)


def test_the_default_batch_is_sixteen_prompts_of_up_to_1024_tokens():
    lengths = mixed.prompt_lengths()
    assert len(lengths) == 16
    assert all(16 <= length <= 1024 for length in lengths)
    assert lengths == mixed.prompt_lengths()


def test_the_speed_at_the_end_is_that_of_the_last_256_tokens():
    assert mixed.last_tokens_per_s(Lap(step_s=[9.0] * 10 + [0.5] * 4), 64) == 128
    assert mixed.last_tokens_per_s(Lap(step_s=[0.5, 0.25, 0.25]), 2) == 6


@pytest.mark.parametrize(("scenario", "num_rows"), [("allocator", 4), ("plan", 2)])
def test_host_work_is_measured_for_each_size_of_the_pool(monkeypatch, scenario, num_rows):
    monkeypatch.setattr(host, "ALLOCATED_POOLS", (1000, 2000))
    monkeypatch.setattr(host, "PLANNED_POOLS", (1000, 2000))
    rows = measure(scenario, rounds=1)["rows"]
    assert {row["num_pages"] for row in rows} == {1000, 2000}
    assert len(rows) == num_rows


def test_each_trick_is_compared_with_everything_in_turns(monkeypatch):
    asked = []

    def process(trick):
        asked.append(trick)
        return ThreadPoolExecutor(1)

    monkeypatch.setattr(ablation, "_process", process)
    names = ["decode_writer", "split_kv_cpu"]
    monkeypatch.setattr(ablation, "TRICKS", {name: ablation.TRICKS[name] for name in names})
    figures = measure("ablation", caches=("paged",), contexts=(20,), rounds=2)["rows"]
    assert asked == ["", *names]
    assert [(row["without"], row["num_rows"]) for row in figures] == [
        (name, rows) for name in names for rows in (1, 8)
    ]
    assert all(row["ms_per_step"] > 0 < row["ms_per_step_without"] and "error" not in row for row in figures)


def test_a_process_starts_twice_on_one_cache_of_compiled_code(monkeypatch):
    folders = []

    def start(function, asked, name, folder):
        folders.append(folder)
        return {"first_token_s": 1.0, "two_tokens_s": 2.0, "ms_per_step": 3.0}

    monkeypatch.setattr(compile, "in_new_process", start)
    rows = measure("compile", caches=("dynamic", "paged"))["rows"]
    assert [(row["baseline"], row["start"]) for row in rows] == [
        (name, start) for name in ("dynamic", "paged") for start in ("cold", "warm")
    ]
    assert folders[0] == folders[1] != folders[2]


def test_a_start_has_its_first_two_tokens_apart_from_the_others(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    figures = compile.start_up(settings(), "dynamic", str(tmp_path))
    assert figures["first_token_s"] < figures["two_tokens_s"]
    assert figures["ms_per_step"] < 1e3 * figures["two_tokens_s"]


def test_a_new_process_gives_figures_or_says_why_not():
    figures = worker.in_new_process(mixed.peak, settings(prompt_lengths=(5, 18)), "dynamic")
    assert set(figures) == {"peak_bytes", "kept_bytes"}
    assert worker.in_new_process(int, "page")["error"].startswith("ValueError: invalid literal for int()")


def test_a_step_is_taken_apart_into_what_it_is_spent_on():
    rows = measure("profile", contexts=(24,), prompt_lengths=(5, 18), caches=("dynamic", "paged"))["rows"]
    assert [(row["context"], row["baseline"]) for row in rows] == [
        (context, name) for context in ("24", "2 rows", "2 prompts") for name in ("dynamic", "paged")
    ]
    for row in rows:
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


# Baselines


@pytest.mark.parametrize("name", ["static", "no-cache", "paged", "paged-ragged", "paged-compiled", "generate_batch"])
@pytest.mark.parametrize("lengths", [[24], [9, 24]])
def test_baselines_give_the_same_tokens(model, traced_only, name, lengths):
    ids, mask = model.padded(lengths)
    with line_up(model.model, ("dynamic", name), page_size=16) as baselines:
        laps = race_once(baselines, ids, mask if len(lengths) > 1 else None, 5)
    reference, row = summarize([laps])
    assert row.get("error") is None
    assert row["same_tokens"]
    assert reference["ratio"] == reference["paired_ratio"] == 1.0
    assert laps[name].tokens.shape == (len(lengths), 5)
    assert len(laps[name].step_s) == 4


def test_the_compiled_static_cache_has_a_graph_with_frozen_weights_for_each_length(model, monkeypatch):
    import torch._inductor.config as inductor

    seen, codes = [], []

    def stand_in(function, **options):
        codes.append(function.__code__)

        def run(own, **arguments):
            seen.append((inductor.freezing, inductor.max_autotune, arguments["input_ids"].shape))
            return function(own, **arguments)

        return run

    monkeypatch.setattr(torch, "compile", stand_in)
    with line_up(model.model, ("dynamic", "static-compiled"), 16) as baselines:
        laps = [race_once(baselines, model.prompt(12), None, 3) for _ in range(2)]
        cache = baselines[1].new_cache(15)
        assert baselines[1].new_cache(15) is cache, "its tensors are part of the graph"
        assert baselines[1].new_cache(16) is not cache
    assert summarize(laps)[1]["same_tokens"]
    assert seen == [(True, True, (1, 1))] * 4
    assert codes[0] != codes[1]
    assert not inductor.freezing


@pytest.mark.parametrize("name", ["dynamic", "no-cache", "paged"])
def test_a_prompt_in_chunks_and_turns_is_the_same_prompt(model, name):
    ids = model.prompt(40)
    tokens = []
    for chunk_size in (None, 7):
        with line_up(model.model, (name,), 16) as baselines:
            race = Race(baselines, 60)
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


def test_a_baseline_that_fails_is_reported_and_the_others_go_on(model, monkeypatch):
    def fail(self, max_length):
        raise RuntimeError("no pages today")

    monkeypatch.setattr(Paged, "new_cache", fail)
    rows = measure("latency", contexts=(20,), caches=("dynamic", "paged"))["rows"]
    assert rows[1] == {"context": 20, "baseline": "paged", "error": "RuntimeError: no pages today"}
    assert rows[0]["ratio"] == 1.0
    searched = measure("beam", contexts=(20,), rounds=1)["rows"]
    assert searched[1]["error"] == "RuntimeError: no pages today"


def test_without_the_reference_nothing_is_compared(model):
    with line_up(model.model, ("paged",), 16) as baselines:
        (row,) = summarize([race_once(baselines, model.prompt(20), None, 3)])
    assert set(row) == {"baseline", "first_token_s", "ms_per_step", "kv_bytes"}


def test_an_unknown_baseline_is_an_error(model):
    with (
        pytest.raises(ValueError, match=r"caches=\['page'\] were asked for; there are dynamic, "),
        line_up(model.model, ("dynamic", "page"), 16),
    ):
        pass


class Scripted:
    """Notes its turns; each takes as long as it is told."""

    cache = None
    figures = {}  # noqa: RUF012 (nobody writes to it)

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


def test_baselines_take_turns_in_every_order(monkeypatch):
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
    assert row["ratio_interval"] == [0.5, 1.0]
    assert laps["paged"].total_s == 17


@pytest.mark.parametrize(
    ("count", "interval"), [(1, [0, 0]), (2, [0, 1]), (5, [0, 4]), (9, [1, 7]), (10, [1, 8]), (100, [39, 60])]
)
def test_the_median_is_between_the_two_that_the_binomial_distribution_gives(count, interval):
    assert race._interval_of_median(range(count)) == interval
    below = [math.comb(count, k) / 2**count for k in range(count + 1)]
    assert sum(below[interval[0] + 1 : interval[1] + 1]) >= 0.95 or interval == [0, count - 1]


def test_notes_name_what_differs_by_less_than_it_scatters():
    def row(name, low, high, **more):
        return {"baseline": name, "ratio_interval": [low, high]} | more

    reference = row("dynamic", 1, 1, kv_bytes=2**20)
    assert notes([reference, row("paged", 0.8, 0.9, kv_bytes=2**19), {"baseline": "flex", "error": "no"}]) == []
    assert notes([row("paged", 0.9, 1.1), row("flex", 1.1, 1.2), row("static", 1.0, 1.2)]) == [
        "ms per step: no difference from the reference beyond the noise: paged, static."
    ]
    assert notes([row("paged", 0.9, 1.1, context=8), row("paged", 0.9, 1.1, context=16)]) == [
        "ms per step: no difference from the reference beyond the noise: paged (8, 16)."
    ]
    assert notes([reference, {"baseline": "paged", "kv_bytes": 2**19, "peak_noise_bytes": 2**20}]) == []
    assert notes([reference, {"baseline": "paged", "kv_bytes": 2**19, "peak_noise_bytes": 2**21}]) == [
        "peak over the model: below the noise. The caches hold 1.0 MiB at most; what a process keeps of its warm-up, "
        "and scatters by, is up to 2.0 MiB. Take longer prompts."
    ]


# Arithmetic


def test_the_bandwidth_is_the_median_of_the_reads_since_the_last_one(monkeypatch):
    bandwidth = Bandwidth(torch.device("cpu"))
    bandwidth.measure()
    assert bandwidth.take_median() > 0
    rates = iter([3.0, 1.0, 2.0, 7.0])
    monkeypatch.setattr(bandwidth, "_rate", lambda: next(rates))
    for _ in range(3):
        bandwidth.measure()
    assert bandwidth.take_median() == 2
    bandwidth.measure()
    assert bandwidth.take_median() == 7


def test_something_else_takes_its_turn_after_each_step_of_all(model):
    calls = []
    with line_up(model.model, ("dynamic", "paged"), 16) as baselines:
        race_once(baselines, model.prompt(8), None, 4, lambda: calls.append([len(c.tokens) for c in baselines]))
    assert calls == [[2, 2], [3, 3], [4, 4]]


def test_a_step_reads_every_weight_once():
    sizes = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    tied, untied = (
        LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tie)) for tie in (True, False)
    )
    in_layers = 4 * (4 * 8 * 8 + 3 * 8 * 8 + 3 * 8)
    assert weight_bytes(tied) == weight_bytes(untied) == in_layers + 4 * 50 * 8


def test_the_bytes_of_a_cache_are_those_it_holds(model):
    names = ("dynamic", "static", "paged", "no-cache")
    with line_up(model.model, names, 16) as baselines:
        laps = Race(baselines, 30).lap(model.prompt(20), 1)
    assert [laps[name].kv_bytes / token_bytes(model.model) for name in names] == [20, 30, 32, 0]
    assert kv_bytes(DynamicCache(config=model.model.config)) == 0


def test_peak_memory_counts_from_where_it_began():
    memory = PeakMemory(torch.device("cpu"))
    held = torch.ones(2**24)
    assert memory.bytes >= 0.9 * held.nbytes
    assert memory.held_bytes >= 0.9 * held.nbytes


# Output


def test_a_table_has_the_worked_numbers():
    rows = [{"context": 128, "ms_per_step": 61.2345, "kv_bytes": 3145728}, {"context": 8, "error": "no"}]
    assert table(rows).splitlines() == [
        "  context    ms per step    KV cache, MiB",
        "      128           61.2              3.0",
        "        8                                  no",
    ]


def rows_of(scenario):
    for x in (100, 1000):
        for name in ("dynamic", "paged"):
            about = {"baseline": name, "num_threads": 1, "num_rows": 16, "context": x}
            yield about | dict.fromkeys(scenario.drawn, 1.0 + x)
    yield {"baseline": "flex", "context": 100, "num_threads": 1, "num_rows": 16, "error": "no"}


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_the_pictures_of_a_scenario_name_their_lines(scenario, tmp_path):
    scenario.draw(list(rows_of(scenario)), tmp_path / "plots", "own")
    paths = list((tmp_path / "plots").glob("*"))
    assert {path.name for path in paths} == {f"own-{figure}.svg" for figure in scenario.drawn}
    for path in paths:
        texts = {"".join(element.itertext()).strip() for element in ElementTree.parse(path).iter()}
        assert scenario.name in texts
        assert ({"dynamic", "paged"} if scenario.by == "baseline" else {scenario.by}) <= texts
        assert "flex" not in texts


def test_each_model_of_a_scenario_has_its_own_pictures(tmp_path):
    chat = SCENARIOS["chat"]
    rows = [{"model": model} | row for model in ("SmolLM2", "random Llama") for row in rows_of(chat)]
    chat.draw(rows, tmp_path, "chat")
    names = {path.name for path in tmp_path.iterdir()}
    assert {"chat-ms_per_step-SmolLM2.svg", "chat-ms_per_step-random-Llama.svg"} <= names


def test_the_reference_is_one_of_the_baselines():
    assert BASELINES["dynamic"] is Baseline


# Settings


def test_settings_that_make_no_sense_are_errors():
    with pytest.raises(ValueError, match="at least 1 round"):
        settings(rounds=0)
    with pytest.raises(ValueError, match="page_size=17 was asked for"):
        settings(page_size=17)
    with pytest.raises(ValueError, match="dtype='float33' was asked for"):
        load(settings(dtype="float33"))
    with pytest.raises(ValueError, match="beside random_llama"):
        settings(model="gpt2")
    with pytest.raises(ValueError, match="shape='tiny' was asked for beside another model"):
        settings(shape="tiny")
    with pytest.raises(ValueError, match="shape='llama' was asked for; there are tiny, "):
        Settings(shape="llama")
    with pytest.raises(ValueError, match="more than lies between two of them"):
        measure("chat", contexts=(20, 22))


def test_any_model_is_loaded_by_its_path(tmp_path, monkeypatch):
    tiny_llama().save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(
        "hf_paged.tools.lab.model.AutoTokenizer", types.SimpleNamespace(from_pretrained=lambda _: None)
    )
    asked = Settings(model=str(tmp_path / "tiny"))
    loaded = load(asked)
    assert (loaded.name, asked.model_name, loaded.max_length) == ("tiny", "tiny", 4096)
    assert not loaded.model.training


# Tables for docs

RESULTS = {
    "latency": {
        "fits": [],
        "rows": [
            {"context": 128, "baseline": "dynamic", "ms_per_step": 60.0, "first_token_s": 0.5, "same_tokens": True},
            {"context": 128, "baseline": "paged", "ms_per_step": 40.0, "first_token_s": 1.0, "same_tokens": True},
            {"context": 512, "baseline": "paged", "error": "RuntimeError: no"},
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
