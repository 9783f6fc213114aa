"""Ctrl-C: what is done is written, one line says so and how to go on, and the exit status is 130."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_paged.tools.bench.race import Race
from hf_paged.tools.cli import main
from hf_paged.tools.commands import audit
from hf_paged.tools.lab.model import MeasuredModel
from hf_paged.tools.long_context import evaluation
from hf_paged.tools.reproduction.stage import STAGES, Stage
from tests.models import letter_tokenizer, letters, tiny_llama, tiny_model
from tests.tools.test_long_context import byte_tokenizer

ROOT = Path(__file__).parents[3]
TINY = ["--random-llama", "--caches", "dynamic", "--rounds", "1", "--max-new-tokens", "3", "--num-threads", "1"]


@pytest.fixture(autouse=True)
def as_many_threads_as_before():
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    (folder / "letters.txt").write_text(letters(4000))
    return folder


@pytest.fixture
def path(tmp_path):
    return tmp_path / "figures.json"


def _as_from_a_terminal():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which what runs in the background ignores, and its children


def interrupted(arguments, moment):
    """Start a command, and interrupt it and its processes, as a terminal does, when it says something.

    Returns:
        What it printed, and what it said under its name.
    """
    with subprocess.Popen(
        [sys.executable, "-m", "hf_paged", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_as_from_a_terminal,
    ) as process:
        before = []
        for line in process.stderr:
            before.append(line)
            if line.startswith(moment):
                break
        else:
            pytest.fail(f"It ended before it said {moment!r}: {''.join(before)}")
        os.killpg(process.pid, signal.SIGINT)
        printed, told = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in printed + told
    return printed, [line for line in told.splitlines() if line.startswith("hf-paged: ")]


# Real processes


def test_perplexity_goes_on_with_resume(model, path):
    asked = ["ppl", model, "--dataset", model / "letters.txt", "--caches", "dynamic,static", "--chunk-size", "4"]
    asked += ["--max-length", "20", "--num-threads", "1", "--json", path]
    _, told = interrupted(asked, "perplexity: 11 of 200")
    journal = f"{path}.journal"
    words = f"What was done is in {journal}; the same command with --resume goes on from there."
    assert told == [f"hf-paged: Interrupted. {words}"]
    assert Path(journal).stat().st_size > 0
    assert not path.exists()
    assert main([*map(str, asked), "--resume"]) == 0
    assert json.loads(path.read_text())["figures"]["num_tokens"] == 4000 - 200
    assert not Path(journal).exists()


def test_bench_writes_finished_scenarios_and_the_rows_of_the_one_under_way(path):
    asked = ["bench", "allocator", "latency", *TINY, "--contexts", "20,100000", "--json", path]
    printed, told = interrupted(asked, "latency: 2 of 2")
    assert told == [f"hf-paged: Interrupted. What was done is in {path}."]
    results = json.loads(path.read_text())
    assert len(results["allocator"]["rows"]) == 8
    assert [row["context"] for row in results["latency"]["rows"]] == [20]
    assert results["latency"]["is_complete"] is False
    assert printed.count("allocator: time to take") == printed.count("latency: time to the first token") == 1


def test_processes_of_a_bench_end_with_it_and_say_nothing(path):
    asked = ["bench", "mixed", *TINY, "--prompt-lengths", "5,18", "--json", path]
    printed, told = interrupted(asked, "memory: 1 of 1")
    assert told == [f"hf-paged: Interrupted. What was done is in {path}."]
    (row,) = json.loads(path.read_text())["mixed"]["rows"]
    assert row["ms_per_step"] > 0
    assert "peak_bytes" not in row
    assert "dynamic" in printed


# In this process


def interrupt(*arguments, **named):
    raise KeyboardInterrupt


def test_what_keeps_nothing_says_so(model, monkeypatch, capsys):
    monkeypatch.setattr("hf_paged.tools.commands.ppl.perplexity", interrupt)
    assert main(["ppl", str(model), "--dataset", str(model / "letters.txt")]) == 130
    words = "Nothing is kept without --json FILE; with it, --resume goes on."
    assert capsys.readouterr().err == f"hf-paged: Interrupted. {words}\n"


def test_an_audit_keeps_the_page_sizes_that_are_done(path, monkeypatch, capsys):
    whole = audit.audit_batch

    def limited(*batch, page_size, **how):
        return interrupt() if page_size == 32 else whole(*batch, page_size=page_size, **how)

    monkeypatch.setattr(audit, "audit_batch", limited)
    asked = ["audit", "--random-llama", "--page-size", "16,32", "--prompt-lengths", "5", "--max-new-tokens", "2"]
    assert main([*asked, "--json", str(path)]) == 130
    printed = capsys.readouterr()
    assert printed.err.endswith(f"hf-paged: Interrupted. What was done is in {path}.\n")
    assert "Pages of 16 tokens" in printed.out
    assert [each["page_size"] for each in json.loads(path.read_text())["audit"]] == [16]


def test_a_conversation_keeps_the_points_that_were_reached(path, monkeypatch):
    lap, laps = Race.lap, []

    def limited(self, ids, *settings):
        laps.append(ids.shape[1])
        return interrupt() if laps[-1] == 77 else lap(self, ids, *settings)

    monkeypatch.setattr(Race, "lap", limited)
    assert main(["bench", "chat", *TINY, "--contexts", "20,100,180", "--json", str(path)]) == 130
    assert [row["context"] for row in json.loads(path.read_text())["chat"]["rows"]] == [20]


def test_long_contexts_keep_the_batches_that_were_answered(path, monkeypatch, capsys):
    measured = MeasuredModel("tiny", tiny_model(LlamaForCausalLM, LlamaConfig, vocab_size=257), byte_tokenizer())
    monkeypatch.setattr("hf_paged.tools.commands.long_context.load_model", lambda *_: measured)
    generate = evaluation._generate

    def limited(baseline, batch, max_new_tokens, chunk_size):
        return interrupt() if batch.context == 600 else generate(baseline, batch, max_new_tokens, chunk_size)

    monkeypatch.setattr(evaluation, "_generate", limited)
    asked = ["long-context", "--tasks", "passkey", "--contexts", "500,600", "--limit", "1", "--caches", "dynamic"]
    assert main([*asked, "--max-new-tokens", "2", "--json", str(path)]) == 130
    results = json.loads(path.read_text())
    assert [row["context"] for row in results["rows"]] == [500]
    assert len(results["answers"]) == 1
    assert "passkey" in capsys.readouterr().out


def test_a_reproduction_names_the_stages_that_are_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Stage, "run", lambda self, *_: interrupt() if self == STAGES[1] else 0)
    names = [stage.name for stage in STAGES[:4]]
    assert main(["reproduce", "--folder", str(tmp_path), "--stages", ",".join(names)]) == 130
    words = f"The page {tmp_path / 'reproduction.md'} has what was done before; go on with --stages "
    assert capsys.readouterr().err == f"hf-paged: Interrupted. {words}{','.join(names[1:])}.\n"
    assert (tmp_path / "reproduction.md").is_file()
