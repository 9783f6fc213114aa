"""`hf-paged ppl`, alone and started by `accelerate launch`."""

import contextlib
import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_paged.tools.cli import main
from hf_paged.tools.evaluation.journal import Journal
from tests.models import letter_tokenizer, letters, tiny_llama
from tests.processes import PROCESSES

SETTINGS = ["--page-size", "16", "--max-length", "24", "--chunk-size", "7", "--batch-size", "2", "--num-threads", "1"]
NUM_BATCHES = 5


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Arguments for a tiny model and a text of its own."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama().save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    (folder / "letters.txt").write_text(letters(9 * 24 + 5))
    return ["ppl", str(folder), "--dataset", str(folder / "letters.txt"), *SETTINGS]


@pytest.fixture(scope="module")
def expected(asked, tmp_path_factory):
    """Figures of one process, times aside."""
    path = tmp_path_factory.mktemp("alone") / "figures.json"
    assert run_alone([*asked, "--json", str(path)]) == 0
    return figures_in(path)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "figures.json"


def journal_of(path):
    return Path(f"{path}.journal")


def run_alone(arguments):
    num_threads = torch.get_num_threads()
    try:
        return main(arguments)
    finally:
        torch.set_num_threads(num_threads)


def launch(arguments):
    """Start two processes on a free port, as a user would."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0"]
    settings = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "-m", "hf_paged"]
    root = Path(__file__).parents[2]
    return subprocess.run(
        [*launcher, *settings, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )


def take_part(rank, port, told, limit, arguments):
    """Be one of two processes as they are launched; interrupted after so many batches, if any."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    if limit is not None:
        interrupt_after(pytest.MonkeyPatch(), limit)
    with Path(told, str(rank)).open("w") as file, contextlib.redirect_stderr(file):
        status = main(arguments)
    raise SystemExit(status)


def run_together(arguments, told, limit=None):
    """Exit statuses of two processes, and what both say, in files of a folder, too."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [PROCESSES.Process(target=take_part, args=(rank, port, told, limit, arguments)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    said = "".join(path.read_text() for path in sorted(told.iterdir()))
    return [process.exitcode for process in processes], said


def figures_in(path):
    figures = json.loads(path.read_text())["figures"]
    for row in figures["figures"]:
        del row["tokens_per_s"]
    return figures


def interrupt_after(monkeypatch, count):
    append = Journal.append
    left = [None] * count

    def limited(self, *batch):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        append(self, *batch)

    monkeypatch.setattr(Journal, "append", limited)


def num_finished(journal):
    with contextlib.closing(sqlite3.connect(journal)) as file:
        return file.execute("SELECT COUNT(*) FROM batches").fetchone()[0]


# Alone


def test_a_table_and_a_sentence_are_printed_and_figures_written(asked, path, capsys):
    arguments = [*asked, "--caches", "static,paged", "--max-tokens", "100", "--json", str(path)]
    assert run_alone(arguments) == 0
    results = json.loads(path.read_text())
    assert results["command"] == " ".join(["hf-paged", *arguments])
    assert results["settings"]["caches"] == ["static", "paged"]
    assert results["settings"]["dataset"].endswith("letters.txt")
    assert results["num_processes"] == 1
    assert {"machine", "versions", "commit", "num_threads"} <= set(results)
    static, paged = results["figures"]["figures"]
    assert results["figures"]["num_tokens"] == 100
    assert (static["cache"], paged["cache"]) == ("static", "paged")
    assert paged["relative_difference"] < 1e-6
    printed = capsys.readouterr().out
    assert "100 tokens scored in 5 windows of at most 24." in printed
    assert re.search(r"cache +perplexity +relative difference +standard error", printed)
    assert f"The perplexity of paged ({paged['perplexity']:.6f}) differs from that of static" in printed
    assert not journal_of(path).exists()


def test_an_interrupted_run_goes_on_only_if_it_is_told_to(asked, expected, path, capsys):
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt_after(monkeypatch, 2)
        assert run_alone([*asked, "--json", str(path)]) == 130
    journal = journal_of(path)
    assert f"hf-paged: Interrupted. What was done is in {journal}; the same" in capsys.readouterr().err
    assert num_finished(journal) == 2
    assert run_alone([*asked, "--json", str(path)]) == 2
    assert f"{journal} was left by a run that did not get to its end" in capsys.readouterr().err
    assert run_alone([*asked, "--json", str(path), "--resume", "--batch-size", "1"]) == 2
    assert "differs in batch_size (2, now 1)" in capsys.readouterr().err
    assert run_alone([*asked, "--json", str(path), "--resume"]) == 0
    assert figures_in(path) == expected
    assert not journal.exists()


def test_resuming_what_never_began_begins(asked, expected, path):
    assert run_alone([*asked, "--json", str(path), "--resume"]) == 0
    assert figures_in(path) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "--resume was asked for without --json FILE"),
        (
            ["--json", "no/such/folder/figures.json"],
            "--json no/such/folder/figures.json was asked for, but there is no folder",
        ),
        (["--dataset", "missing.txt"], "[Errno 2] No such file or directory: 'missing.txt'"),
        (["--caches", "pages"], r"caches=['pages'] were asked for"),
        (["--dtype", "float31"], "dtype='float31' was asked for"),
    ],
)
def test_a_mistake_is_said_without_a_traceback(asked, arguments, message, capsys):
    assert run_alone([*asked, *arguments]) == 2
    assert f"hf-paged: {message}" in capsys.readouterr().err


# Several processes


def test_two_processes_give_the_figures_of_one_to_the_last_bit(asked, expected, path):
    finished = launch([*asked, "--json", str(path)])
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert figures_in(path) == expected
    assert json.loads(path.read_text())["num_processes"] == 2
    assert finished.stdout.count("differs from that of dynamic") == 1
    assert not journal_of(path).exists()


def test_what_two_processes_began_one_finishes(asked, expected, path, tmp_path_factory):
    statuses, said = run_together([*asked, "--json", str(path)], tmp_path_factory.mktemp("told"), limit=1)
    assert statuses == [130, 130], said
    assert num_finished(journal_of(path)) == 2
    assert run_alone([*asked, "--json", str(path), "--resume"]) == 0
    assert figures_in(path) == expected


def test_a_mistake_ends_all_processes(asked, path, tmp_path_factory):
    journal_of(path).write_text("left\n")
    statuses, said = run_together([*asked, "--json", str(path)], tmp_path_factory.mktemp("told"))
    assert statuses == [2, 2]
    assert said.count("did not get to its end. Go on from there") == 2
