"""The reproduction: its stages can be run, its verdicts follow from the figures, its page is that of the results."""

from pathlib import Path

import pytest

from hf_paged.tools.cli import main
from hf_paged.tools.commands import reproduce
from hf_paged.tools.reproduction import stage as stages
from hf_paged.tools.reproduction.claim import CLAIMS, FAILS, HOLDS, NOT_MEASURED
from hf_paged.tools.reproduction.page import make_page, read_results
from hf_paged.tools.reproduction.stage import STAGES, Stage

DOCS = Path(__file__).parents[2] / "docs"
LATENCY = (128, 256, 512, 1024, 2048)


def perplexity(difference, num_tokens=100):
    rows = [
        {"cache": "dynamic", "perplexity": 7.31, "standard_error": 0.0},
        {"cache": "paged", "perplexity": 7.31 * (1 + difference), "standard_error": 1e-4},
    ]
    return {"figures": {"num_tokens": num_tokens, "figures": rows}}


def times(baseline, ms, **more):
    return [
        {"baseline": baseline, "context": context, "ms_per_step": own}
        | {key: value(context) for key, value in more.items()}
        for context, own in zip(LATENCY, ms, strict=True)
    ]


def latency(paged=(40.0,) * 5, kv_bytes=lambda context: 1000 * context):
    rows = (
        times("dynamic", (50.0,) * 5) + times("paged", paged, kv_bytes=kv_bytes) + times("paged-compiled", (20.0,) * 5)
    )
    fits = [
        {"baseline": name, "growth": growth, "growth_from": 128, "growth_to": 2048, "r_squared": 0.99}
        for name, growth in (("paged", paged[-1] / paged[0]), ("paged-compiled", 1.0))
    ]
    return {"latency": {"rows": rows, "fits": fits, "weight_bytes": 10_000_000}}


def scenario(name, baseline="paged", **changes):
    reference = {"baseline": "dynamic", "context": 5, "ms_per_step": 10.0, "kv_bytes": 100, "same_tokens": True}
    return {name: {"rows": [reference, reference | {"baseline": baseline, "ms_per_step": 9.0} | changes]}}


def mixed(**changes):
    return scenario("mixed", "paged-ragged", **changes)


def audit(mean):
    overheads = {"active": {"mean": mean, "worst": mean}, "padded": {"mean": 0.9}}
    return {"audit": [{"page_size": 16, "summary": {"overheads": overheads}}]}


def page_sizes(ms):
    rows = [{"page_size": None, "ms_per_step": 9.0}, {"page_size": 16, "ms_per_step": ms}]
    return {"page-size": {"rows": [*rows, {"page_size": 256, "ms_per_step": 10.0}]}}


def verdict(words, results):
    (claim,) = [claim for claim in CLAIMS if words in claim.words]
    found, figures = claim.finding(results)
    assert figures
    return found


@pytest.mark.parametrize(
    ("words", "stage", "good", "bad"),
    [
        ("twofold", "latency", latency(), latency(paged=(40.0, 40.0, 50.0, 60.0, 90.0))),
        ("at least as fast", "latency", latency(), latency(paged=(51.0, 40.0, 40.0, 40.0, 40.0))),
        ("Weights and activations", "latency", latency(), latency(kv_bytes=lambda context: 2000 * context)),
        ("powers of two", "latency", latency(kv_bytes=lambda context: 7), latency()),
        (
            "exponentially",
            "no-cache",
            {"latency": {"rows": times("no-cache", [2 ** (context / 128) for context in LATENCY])}},
            {"latency": {"rows": times("no-cache", [context**1.2 for context in LATENCY])}},
        ),
        ("theoretical minimum", "audit", audit(0.02), audit(0.06)),
        ("100,000", "single", scenario("single"), scenario("single", same_tokens=False)),
        ("32,000", "chat", scenario("chat"), scenario("chat", kv_bytes=106)),
        (
            "mixed batch",
            "mixed",
            scenario("mixed", "paged-ragged"),
            scenario("mixed", "paged-ragged", ms_per_step=11.0),
        ),
        (
            "mixed batch",
            "mixed",
            scenario("mixed", "paged-ragged"),
            scenario("mixed", "paged-ragged", error="no room"),
        ),
        ("page size", "page-size", page_sizes(11.0), page_sizes(13.0)),
        (
            "answered alike",
            "long-context",
            {"rows": [{"cache": "paged", "same_answers": True}]},
            {"rows": [{"cache": "paged", "same_answers": True}, {"cache": "paged", "same_answers": False}]},
        ),
    ],
)
def test_a_verdict_follows_from_the_figures(words, stage, good, bad):
    assert verdict(words, {stage: good}) == HOLDS
    assert verdict(words, {stage: bad}) == FAILS
    assert verdict(words, {}) == NOT_MEASURED


def test_perplexity_holds_if_each_run_does_in_float32_and_all_together_in_bfloat16():
    results = {stage.name: perplexity(5e-6) for stage in STAGES if stage.name.startswith("perplexity")}
    assert verdict("perplexity", results) == HOLDS
    assert verdict("perplexity", results | {"perplexity-7": perplexity(-5e-4)}) == FAILS
    assert verdict("perplexity", results | {"perplexity-7-bf16": perplexity(-2e-3)}) == HOLDS
    assert verdict("perplexity", results | {"perplexity-7-bf16": perplexity(-2e-3, num_tokens=1000)}) == FAILS
    both = {"perplexity-7-bf16": perplexity(-2e-3, 1000), "perplexity-1-bf16": perplexity(2e-3, 1000)}
    assert verdict("perplexity", results | both) == HOLDS


def test_what_no_machine_was_there_for_is_said():
    assert verdict("L4", {stage.name: {} for stage in STAGES}) == NOT_MEASURED


@pytest.mark.parametrize("is_full", [False, True])
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_the_command_of_a_stage_is_one_that_is_understood(stage, is_full, monkeypatch, tmp_path):
    ran = []
    command = stage.arguments(tmp_path, is_full, num_threads=2)
    monkeypatch.setattr(f"hf_paged.tools.commands.{command[0].replace('-', '_')}.run", ran.append)
    assert main(command) == 0
    assert ran[0].json == str(tmp_path / f"{stage.name}.json")


def test_the_page_is_that_of_the_results():
    results = DOCS / "results" / "reproduction"
    assert set(read_results(results)) == {stage.name for stage in STAGES}
    assert (DOCS / "reproduction.md").read_text() == make_page(results, DOCS)


def test_stages_that_are_asked_for_run_and_one_that_fails_is_named(monkeypatch, tmp_path, capfd):
    tiny = "bench latency --caches dynamic,no-cache --random-llama --contexts 20,40 --rounds 1 --max-new-tokens 3"
    own = (
        Stage("no-cache", tiny, "", "", "Without a cache"),
        Stage("latency", "bench latency --caches none", "", "", "Time"),
    )
    monkeypatch.setattr(stages, "STAGES", own)
    monkeypatch.setattr(reproduce, "STAGES", own)  # imported before, or it would keep them
    monkeypatch.setattr("hf_paged.tools.reproduction.page.STAGES", own)
    assert main(["reproduce", "--folder", str(tmp_path), "--num-threads", "1"]) == 2
    assert "These stages failed, and are not on the page anew: latency." in capfd.readouterr().err
    page = (tmp_path / "reproduction.md").read_text()
    assert "| 20 | no-cache |" in page
    assert "![no-cache-ms_per_step](results/reproduction/no-cache-ms_per_step.svg)" in page
    assert f"    hf-paged {tiny} --num-threads 1\n" in page
    assert "No results of latency." in page
    assert main(["reproduce", "--folder", str(tmp_path), "--page-only"]) == 0
    assert (tmp_path / "reproduction.md").read_text() == page


def test_an_unknown_stage_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["reproduce", "--stages", "latency,speed"])
    assert "stages ['speed'] were asked for" in capsys.readouterr().err
