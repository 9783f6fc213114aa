"""Examples run as they are, and what they print is so."""

import importlib.util
import io
import json
import os
import re
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.real_model


@pytest.fixture
def example(monkeypatch):
    """Load an example, to be run as with these arguments."""

    def load(name: str, *arguments: str) -> ModuleType:
        torch.manual_seed(0)
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        spec.loader.exec_module(module)
        return module

    return load


def numbers(pattern: str, text: str) -> list[tuple[float, ...]]:
    """What stands in place of each # of a pattern, wherever it is found."""
    found = re.findall(re.escape(pattern).replace(r"\#", r"([\d.]+)"), text)
    return [tuple(map(float, row if isinstance(row, tuple) else (row,))) for row in found]


@pytest.mark.usefixtures("few_layers")
def test_a_chat_from_a_pipe_finds_its_history_when_it_goes_on_back_and_in_a_fork(example, monkeypatch, capsys):
    lines = (
        "Name a colour.",
        "Another one.",
        "/fork",
        "A third?",
        "/back",
        "A fourth?",
        "/switch 0",
        "And now?",
        "/no",
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    example("chat", "--max-new-tokens", "8").main()
    printed = capsys.readouterr().out
    turns = numbers("[# of # tokens found]", printed)
    assert len(turns) == 5
    assert turns[0][0] == 0
    histories = (0, 1, 1, 1)  # the turn before each of the others
    for (num_found, num_tokens), history in zip(turns[1:], histories, strict=True):
        assert turns[history][1] // 16 * 16 <= num_found < num_tokens
    assert "/back, /fork, /switch and a number below 2, /save or /load and a file" in printed


@pytest.mark.usefixtures("few_layers")
def test_a_chat_that_was_saved_is_resumed_without_computing_its_history(example, monkeypatch, capsys, tmp_path):
    for lines in (f"Name a colour.\nAnother one.\n/save {tmp_path / 'chat'}", f"/load {tmp_path / 'chat'}\nA third?"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        example("chat", "--max-new-tokens", "8").main()  # with a pool and a model of its own
    turns = numbers("[# of # tokens found]", capsys.readouterr().out)
    assert len(turns) == 3
    assert turns[1][1] // 16 * 16 <= turns[2][0] < turns[2][1]


@pytest.mark.usefixtures("few_layers")
def test_a_chat_goes_on_where_a_file_can_t_be_read_or_written(example, monkeypatch, capsys, tmp_path):
    damaged = tmp_path / "damaged"
    damaged.write_bytes(b"no cache")
    damaged.with_suffix(".json").write_text("[]")
    none = tmp_path / "none"
    lines = f"/load {none}\n/load {damaged}\nName a colour.\n/save {none / 'chat'}\nAnother one."
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    example("chat", "--max-new-tokens", "4").main()
    printed = capsys.readouterr().out
    assert printed.count("No such file or directory") == 2
    assert f"{damaged} can't be loaded" in printed
    assert len(numbers("[# of # tokens found]", printed)) == 2


@pytest.mark.usefixtures("few_layers")
def test_requests_behind_a_system_prompt_find_it(example, monkeypatch, capsys):
    module = example("shared_prefix")
    monkeypatch.setattr(module, "QUESTIONS", module.QUESTIONS[:2])
    monkeypatch.setattr(module, "SYSTEM", module.SYSTEM[:800])
    module.main()
    ((num_found, num_tokens),) = numbers("# of # tokens were found, not computed", capsys.readouterr().out)
    assert 0.4 * num_tokens < num_found < 0.5 * num_tokens


def test_threads_that_share_a_pool_answer_as_one_thread_does_and_leave_no_page_held(example, monkeypatch, capsys):
    module = example("threads")
    monkeypatch.setattr(module, "QUESTIONS", module.QUESTIONS[:4])
    module.main()
    printed = capsys.readouterr().out
    assert "the answers that one thread gives: yes" in printed
    assert numbers("# pages are held", printed) == [(0,)]


def test_the_leaves_of_a_tree_hold_a_fraction_of_copies(example, monkeypatch, capsys):
    module = example("tree")
    monkeypatch.setattr(module, "NUM_EXPANSIONS", 3)
    module.main()
    sizes = numbers("# leaves: # MiB, as copies # MiB", capsys.readouterr().out)
    assert [num_leaves for num_leaves, _, _ in sizes] == [3, 5, 6]
    assert sizes[-1][1] < sizes[-1][2] / 4


def test_an_actor_that_is_killed_loses_no_prompt(example, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    module = example("ray_batch")
    ray.cloudpickle.register_pickle_by_value(module)
    was_killed = tmp_path / "was_killed"

    class Killed(module.Answerer):
        def __call__(self, batch):
            if not was_killed.exists():
                was_killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(batch)

    monkeypatch.setattr(module, "BATCH", 2)
    texts = [f"Name {number} colours." for number in range(2, 8)]
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": str(EXAMPLES.parent)}})
    try:
        prompts = ray.data.from_items([{"prompt": text} for text in texts], override_num_blocks=3)
        rows = module.answered(prompts, actors=2, max_new_tokens=4, answerer=Killed).take_all()
    finally:
        ray.shutdown()
    assert was_killed.exists()
    expected = module.Answerer(max_new_tokens=4)({"prompt": texts})["answer"]
    assert {row["prompt"]: row["answer"] for row in rows} == dict(zip(texts, expected, strict=True))


def test_the_tour_runs_cell_by_cell(capsys):
    cells = json.loads((EXAMPLES / "tour.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    names = {}
    torch.manual_seed(0)
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    printed = capsys.readouterr().out
    assert "the same tokens: True" in printed
    assert "loop: hf_paged.sample" in printed
    assert 16 * names["num_pages"] < names["num_tokens"]  # as the fork shares some
    assert names["num_found"] >= 16
    assert names["longer"].shape[1] > names["answer"].shape[1]
