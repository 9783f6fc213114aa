"""`hf-paged generate` answers the prompts of a file, and goes on where it was interrupted."""

import json
import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_paged.decoding.many.answers import Answers
from hf_paged.tools.cli import main
from tests.models import letter_tokenizer, letters, tiny_llama
from tests.tools.commands.test_interrupts import interrupted
from tests.tools.commands.test_mistakes import told_by

TEMPLATE = "{% for message in messages %}{{ message.content }}.{% endfor %}"


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
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


LINES = [{"prompt": letters(3 + 5 * index, seed=index)} for index in range(6)]
LINES[1]["max_new_tokens"] = 3
LINES[2] |= {"temperature": 1.5, "seed": 4}
LINES[3] = {"messages": [{"role": "user", "content": "what is a page"}]}
LINES[4] = {"input_ids": [101, 102, 103], "max_new_tokens": 9, "eos_token_id": 150}


def written(path, lines):
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


@pytest.fixture
def prompts(tmp_path):
    return written(tmp_path / "prompts.jsonl", LINES)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "answers.jsonl"


def asked(model, prompts, out, *more):
    return ["generate", *map(str, (model, prompts, "--out", out)), "--max-new-tokens", "7", *more]


def read(path):
    return {answer["index"]: answer for answer in map(json.loads, path.read_text().splitlines())}


def alone(folder, line):
    """What `generate()` answers."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    line = {"max_new_tokens": 7, "do_sample": "temperature" in line} | line
    torch.manual_seed(line.pop("seed", 0))
    text = line.pop("prompt", None) or f"{line.pop('messages', [{'content': ''}])[0]['content']}."
    ids = torch.tensor([line.pop("input_ids", None) or tokenizer(text).input_ids])
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **line)
    return tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)


def test_each_line_is_answered_as_generate_does(model, prompts, out, capsys):
    assert main(asked(model, prompts, out, "--max-rows", "2", "--num-pages", "8")) == 0
    found = read(out)
    assert {index: answer["text"] for index, answer in found.items()} == {
        index: alone(model, line) for index, line in enumerate(LINES)
    }
    assert found[1]["num_tokens"] == 3
    assert {answer["finish_reason"] for answer in found.values()} <= {"length", "eos"}
    assert capsys.readouterr().out.startswith(f"{out}: 6 answers of ")


def test_what_is_answered_stays_and_a_torn_line_is_answered_again(model, prompts, out, capsys):
    assert main(asked(model, prompts, out)) == 0
    whole = out.read_text()
    first, second, *_ = whole.splitlines(keepends=True)
    out.write_text(first + second + '{"index": 4, "of": "')
    capsys.readouterr()
    assert main(asked(model, prompts, out)) == 0
    assert out.read_text().startswith(first + second)
    assert read(out) == {answer["index"]: answer for answer in map(json.loads, whole.splitlines())}
    assert f"{out}: 4 answers of " in (printed := capsys.readouterr().out)
    assert printed.endswith("beside 2 that were there.\n")
    size = out.stat().st_size
    assert main(asked(model, prompts, out)) == 0
    assert out.stat().st_size == size


def test_drawn_answers_are_the_same_when_they_are_gone_on_with(model, prompts, out, tmp_path):
    assert main(asked(model, prompts, out, "--temperature", "1.2", "--seed", "3")) == 0
    other = tmp_path / "other.jsonl"
    other.write_text("".join(out.read_text().splitlines(keepends=True)[:2]))
    assert main(asked(model, prompts, other, "--temperature", "1.2", "--seed", "3", "--max-rows", "1")) == 0
    assert read(other) == read(out)


def test_a_prompt_that_fails_is_an_error_in_its_line(model, out, tmp_path, capsys):
    lines = [{"prompt": "a page"}, {"prompt": "a page", "temprature": 1}, {"prompt": ""}, {"messages": [3]}]
    assert main(asked(model, written(tmp_path / "wrong.jsonl", lines), out)) == 0
    found = read(out)
    assert "temprature" in found[1]["error"]
    assert "without any token" in found[2]["error"]
    assert "error" in found[3]
    assert "error" not in found[0]
    assert "3 in all are errors" in capsys.readouterr().out


def test_interrupted_it_has_what_is_done_and_goes_on(model, out, tmp_path):
    lines = [{"prompt": letters(20, seed=index), "max_new_tokens": 200} for index in range(40)]
    prompts = written(tmp_path / "many.jsonl", lines)
    arguments = asked(model, prompts, out, "--max-rows", "2", "--num-threads", "1")
    _, told = interrupted(arguments, "answers: 3 of 40")
    assert told == [f"hf-paged: Interrupted. What was done is in {out}; the same command goes on from there."]
    done = read(out)
    assert 2 <= len(done) < 40
    written(prompts, lines)
    assert main(arguments) == 0
    assert len(read(out)) == 40
    assert done.items() <= read(out).items()


def test_an_interrupt_before_the_first_answer_says_so_too(model, prompts, out, monkeypatch, capsys):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Answers, "__next__", interrupt)
    assert main(asked(model, prompts, out)) == 130
    assert capsys.readouterr().err.endswith(f"What was done is in {out}; the same command goes on from there.\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no prompts"),
        ('{"prompt": "a"}\nprompt', "Line 2 of .* is no JSON"),
        ('["a"]', "Line 1 of .* is no prompt: an object is needed"),
        ('{"prompt": "a", "messages": []}', "Line 1 of .* is no prompt"),
        ('{"prompt": 3}', "Line 1 of .* is no prompt"),
    ],
)
def test_a_line_that_is_no_prompt_is_said_before_anything_is_loaded(text, message, out, tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    line = told_by(asked("/there/is/none", path, out), capsys)
    assert re.search(message, line)
    assert not out.exists()


def test_other_mistakes_are_one_line(model, prompts, out, tmp_path, capsys):
    assert "No such file" in told_by(asked(model, tmp_path / "none.jsonl", out), capsys)
    assert "but there is no folder" in told_by(asked(model, prompts, tmp_path / "no" / "out.jsonl"), capsys)
    assert "required: --out" in told_by(["generate", str(model), str(prompts)], capsys)
    out.write_text("Dear diary,\n")
    assert "holds something else than answers" in told_by(asked(model, prompts, out), capsys)
    assert out.read_text() == "Dear diary,\n"
    out.unlink()
    assert main(asked(model, prompts, out)) == 0
    capsys.readouterr()
    longer = told_by([*asked(model, prompts, out), "--max-new-tokens", "9"], capsys)
    assert "of another file, model or settings" in longer
    (model / "chat_template.jinja").unlink()
    shutil.copy(prompts, tmp_path / "again.jsonl")
    out.unlink()
    assert "has no chat template for messages" in told_by(asked(model, tmp_path / "again.jsonl", out), capsys)
