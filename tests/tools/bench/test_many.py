"""`hf-paged bench many`: the same prompts and lengths of answers for every way, and tokens that are the same."""

import dataclasses

import pytest
import torch

from hf_paged.compile import api
from hf_paged.tools.bench.scenarios import SCENARIOS, many
from hf_paged.tools.bench.settings import Settings, load

pytestmark = pytest.mark.usefixtures("quick_collection")  # a bench collects before it measures memory

TINY = Settings(random_llama=True, page_size=16, rounds=1, prompt_lengths=(5, 18, 33, 9, 2))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few rows and short answers; what is to run in a new process runs where the test is; graphs aren't compiled."""
    monkeypatch.setattr(many, "MAX_ROWS", 2)
    monkeypatch.setattr(many, "ANSWER", (2, 9))
    monkeypatch.setattr(many, "in_new_process", lambda function, *arguments: function(*arguments))
    torch._dynamo.reset()
    monkeypatch.setattr(api, "compile_graph", lambda graph, *arguments: graph)


@pytest.mark.parametrize(
    ("name", "case", "ways"),
    [
        ("many", many.PLAIN, many._OF_CASE[many.PLAIN]),
        ("many-alike", many.ALIKE, ("dynamic", "many")),
        ("many-short", many.SHORT, many._OF_CASE[many.SHORT]),
    ],
)
def test_every_way_answers_all_prompts_by_the_same_tokens(name, case, ways):
    rows = SCENARIOS[name].measure(dataclasses.replace(TINY, caches=ways))["rows"]
    assert [(row["case"], row["baseline"]) for row in rows] == [(case, way) for way in ways]
    for row in rows:
        assert "error" not in row, row
        assert row["same_tokens"] == 1
        assert row["tokens_per_s"] > 0
        assert row["peak_bytes"] >= 0


def test_a_way_that_fails_is_reported_and_the_others_go_on(monkeypatch):
    def fail(self, work):
        raise RuntimeError("no pages today")

    monkeypatch.setattr(many.Many, "run", fail)
    asked = dataclasses.replace(TINY, caches=("dynamic", "many"))
    rows = SCENARIOS["many"].measure(asked)["rows"]
    assert [row.get("error") for row in rows] == [None, "RuntimeError: no pages today"]


def test_an_unknown_way_is_an_error():
    with pytest.raises(ValueError, match=r"caches=\['page'\] were asked for; there are dynamic, "):
        SCENARIOS["many"].measure(dataclasses.replace(TINY, caches=("page",)))
    with pytest.raises(ValueError, match=r"caches=\['dynamic'\] were asked for; there are many, many-short"):
        SCENARIOS["many-short"].measure(dataclasses.replace(TINY, caches=("dynamic",)))


def test_work_is_the_same_each_time_with_few_long_answers(monkeypatch):
    monkeypatch.setattr(many, "ANSWER", (8, 256))
    measured = load(TINY)
    work = many.make_work(measured, None, 0.0)
    assert work == many.make_work(measured, None, 0.0)
    lengths = sorted(map(len, work.prompts))
    assert 16 <= lengths[0] <= 32
    assert 512 <= lengths[-1] <= 1024
    answers = sorted(work.answers)
    assert (answers[0], answers[-1]) == (8, 256)
    assert answers[32] <= 20
    shared = many.make_work(measured, None, 0.9)
    assert list(map(len, shared.prompts)) == list(map(len, work.prompts))
    longest = max(shared.prompts, key=len)
    assert all(ids[: int(0.9 * len(ids))] == longest[: int(0.9 * len(ids))] for ids in shared.prompts)


def test_pages_for_a_third_of_the_rows_hold_the_longest(monkeypatch):
    monkeypatch.setattr(many, "MAX_ROWS", 12)
    work = many.Work([[1] * 14, [1] * 30, [1] * 46], [2, 2, 2])
    assert work.num_pages(16) == 8  # 12 rows of 2 pages, a third of them
    assert many.Work([[1] * 158, [1]], [2, 2]).num_pages(16) == 22
    monkeypatch.setattr(many, "MAX_ROWS", 2)
    assert many.Work([[1] * 158, [1]], [2, 2]).num_pages(16) == 10
