"""A model that is measured is the one that a user loads."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_paged.tools.lab.model import SHAPES, load_model, random_model
from tests.models import letter_tokenizer, random_ids, tiny_llama


@pytest.fixture
def folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    letter_tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@torch.no_grad()
def test_its_logits_are_those_of_from_pretrained(folder, dtype):
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    ids = random_ids(2, 300)
    torch.testing.assert_close(load_model(folder, dtype).model(ids).logits, plain(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rotary_frequencies_stay_in_float32(folder, dtype):
    for measured in (load_model(folder, dtype), random_model(dtype)):
        assert measured.model.dtype == getattr(torch, dtype)
        assert measured.model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_shape_is_that_of_the_model():
    sizes = {}
    for name, shape in SHAPES.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{"model_type": "llama"} | shape))
        sizes[name] = round(sum(weight.numel() for weight in model.parameters()) / 1e6)
    llamas = {"tiny": 0, "smollm2-135m": 135, "llama-3.2-1b": 1236, "llama-3-8b": 8030, "llama-2-7b": 6738}
    assert sizes == llamas | {"lfm2-350m": 354, "falcon-h1-0.5b": 521, "deepseek-v3-2-layers": 470}


def test_random_weights_are_the_same_in_all_runs():
    (one, other), name = (random_model(shape="tiny") for _ in range(2)), "lm_head.weight"
    assert one.name == "random Llama"
    assert one.max_length == 131072
    assert torch.equal(one.model.get_parameter(name), other.model.get_parameter(name))
