"""What can't be run is said in one line, before anything is computed, and the exit status is 2."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_paged import __version__
from hf_paged.tools.cli import COMMANDS, main
from hf_paged.tools.lab.provenance import write_results
from tests.models import letter_tokenizer, tiny_llama

ROOT = Path(__file__).parents[3]
TINY = ["--random-llama", "--rounds", "1", "--max-new-tokens", "3"]
NONE = "/there/is/none"


def words(value):
    return " ".join(map(str, value)).replace(str(ROOT), "") if isinstance(value, list) else ""


def told_by(arguments, capsys):
    """The one line that a command says, without its name."""
    try:
        status = main(arguments)
    except SystemExit as exit_:  # argparse's
        status = exit_.code
    printed = capsys.readouterr()
    assert (status, printed.out) == (2, "")
    (line,) = printed.err.splitlines()
    assert line.startswith("hf-paged")
    return line


def run(code, *arguments):
    """A real process of Python, which is given code."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["brew"], "argument COMMAND: invalid choice: 'brew'"),
        (["bench"], "the following arguments are required: SCENARIO"),
        (["bench", "latancy"], r"\['latancy'\] were asked for, but scenarios are latency, single, "),
        (["bench", "latency", "mixd"], r"\['mixd'\] were asked for, but scenarios are "),
        (["bench", "./model"], r"\['./model'\] were asked for, but scenarios are "),
        (["bench", "latency", "a/b", "--model", "c/d"], r"Models \['a/b', 'c/d'\] were asked for. Give one"),
        (["ppl", "a/b", "--model", "c/d"], "argument --model: not allowed with argument MODEL"),
        (["ppl", NONE], f"The model '{NONE}' can't be loaded: there is no such folder"),
        (["audit", "--model", NONE], f"The model '{NONE}' can't be loaded: there is no such folder"),
        (["long-context", NONE], f"The model '{NONE}' can't be loaded: there is no such folder"),
        (["bench", "latency", NONE], f"The model '{NONE}' can't be loaded: there is no such folder"),
        (["ppl", "--dataset", f"{NONE}.txt"], f"No such file or directory: '{NONE}.txt'"),
        (["ppl", "--device", "tpu"], "--device tpu was asked for; give one of torch's"),
        (["ppl", "--device", "meta"], "--device meta was asked for; give one of torch's"),
        (["ppl", "--device", "cuda:99"], "--device cuda:99 was asked for, but there is none here"),
        (["bench", "mixed", *TINY, "--num-threads", "0"], "argument --num-threads: '0' was given, but a whole number"),
        (["reproduce", "--num-threads", "-1"], "argument --num-threads: '-1' was given, but a whole number"),
        (["bench", "mixed", *TINY, "--contexts", "8,x"], "argument --contexts: 'x' was given, but a whole number"),
        (["ppl", "--batch-size", "0"], "argument --batch-size: '0' was given, but a whole number"),
        (["audit", "--json", f"{NONE}/x.json"], f"--json {NONE}/x.json was asked for, but there is no folder {NONE}"),
        (["audit", "--json", "."], r"--json \. was asked for, but that is no file"),
        (["audit", "--json", "/dev/null"], "--json /dev/null was asked for, but that is no file"),
        (
            ["audit", "--json", "/proc/x.json"],
            "--json /proc/x.json was asked for, but nothing can be written to /proc",
        ),
        (["audit", "--plot", __file__], f"--plot {__file__} was asked for, but nothing can be written to"),
        (["reproduce", "--folder", __file__], "File exists|Not a directory"),
        (["bench", "latency", *TINY, "--contexts", "9,131070,200000"], "Prompts of 131070, 200000 tokens and 3 new "),
        (
            ["bench", "beam", *TINY, "--contexts", "200000"],
            "random Llama has 131072 positions. Ask for 131069 tokens ",
        ),
        (["bench", "single", *TINY, "--contexts", "200000"], "random Llama has 131072 positions"),
        (["bench", "mixed", *TINY, "--prompt-lengths", "9,200000"], "Prompts of 200000 tokens and 3 new ones were "),
    ],
    ids=words,
)
def test_a_mistake_is_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert re.search(message, told_by(arguments, capsys))


def test_a_folder_of_another_kind_is_no_model(tmp_path, capsys):
    told = told_by(["ppl", str(tmp_path)], capsys)
    assert told.startswith(f"hf-paged: The model '{tmp_path}' can't be loaded: ")


def test_default_contexts_that_the_model_has_no_room_for_are_left_out_and_named_if_there_are_no_others(model, capsys):
    config = Path(model) / "config.json"
    config.write_text(config.read_text().replace('"max_position_embeddings": 4096', '"max_position_embeddings": 140'))
    assert main(["bench", "latency", model, "--caches", "dynamic", "--rounds", "1", "--max-new-tokens", "3"]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines() if "dynamic" in line] == [
        ["128", "dynamic"]
    ]
    told = told_by(["bench", "latency", model, "--max-new-tokens", "100"], capsys)
    assert "Prompts of 128, 512, 1024, 2048, 4096, 8000 tokens and 100 new ones" in told
    assert "model has 140 positions. Ask for 40 tokens at most" in told


@pytest.mark.parametrize("place", [["MODEL"], ["--model", "MODEL"]], ids=" ".join)
@pytest.mark.parametrize("command", ["ppl", "audit", "long-context", "bench latency"])
def test_the_model_is_named_by_its_place_or_by_its_option(command, place, model, capsys, monkeypatch):
    asked = [*command.split(), *(model if word == "MODEL" else word for word in place), "--dtype", "float31"]
    assert "dtype='float31' was asked for" in told_by(asked, capsys)
    (Path(model) / "config.json").unlink()
    assert f"The model '{model}' can't be loaded" in told_by(asked[:-2], capsys)


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["bench", "mixed", "--baselines", "paged"], "caches", ("paged",)),
        (["audit", "--page-sizes", "16,32"], "page_size", (16, 32)),
        (["long-context", "--prefill-chunk-size", "7"], "chunk_size", 7),
    ],
)
def test_arguments_are_taken_by_their_old_names_too(arguments, name, value, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(f"hf_paged.tools.commands.{arguments[0].replace('-', '_')}.run", asked.append)
    assert main(arguments) == 0
    assert getattr(asked[0], name) == value
    with pytest.raises(SystemExit, match="0"):
        main([arguments[0], "--help"])
    assert arguments[-2] not in capsys.readouterr().out


def test_every_default_is_in_the_help(capsys):
    for command in set(COMMANDS) - {"env"}:
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        words = re.sub(r"\s+", " ", capsys.readouterr().out)
        options = re.findall(r"(--[a-z-]+) [A-Z,.]+ (.*?)(?= --|$)", words.partition(" options: ")[2])
        without = [name for name, text in options if "default: " not in text]
        assert set(without) <= {"--json", "--plot", "--shape", "--model", "--out"}
        assert len(options) >= 3


def test_figures_that_are_written_replace_a_whole_file(tmp_path):
    path, link = tmp_path / "figures.json", tmp_path / "link.json"
    link.symlink_to(path)
    write_results(path, {"one": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_results(path, {"one": torch})
    write_results(link, {"one": 1, "two": 2})
    assert path.read_text() == '{\n  "one": 1,\n  "two": 2\n}\n'
    assert link.is_symlink()
    assert {each.name for each in tmp_path.iterdir()} == {"figures.json", "link.json"}


# Real processes

WITHOUT = """
import sys
sys.modules |= dict.fromkeys(["accelerate", "datasets", "matplotlib", "pandas", "psutil", "tabulate"])
from hf_paged.tools.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["bench", "mixed"], 2, "hf-paged: .*(psutil|tabulate).* Run: pip install (psutil|tabulate)\n"),
        (["--version"], 0, f"hf-paged {re.escape(__version__)}\n"),
        (["env"], 0, "hf_paged .*\ndevices: cpu .*"),
    ],
    ids=words,
)
def test_what_takes_no_extras_runs_without_and_the_rest_says_what_to_install(arguments, status, message):
    done = run(WITHOUT, *arguments)
    assert done.returncode == status
    assert re.fullmatch(message, done.stderr + done.stdout, re.DOTALL)


def test_a_process_ends_with_status_two_and_one_line():
    done = run("from hf_paged.__main__ import main; raise SystemExit(main())", "ppl", NONE)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"hf-paged: The model '{NONE}' can't be loaded: there is no such folder.\n"
