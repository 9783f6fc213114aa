"""Models with quantised weights generate over pages what they do with Transformers' own cache."""

import importlib
import logging
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_paged import PagedCache, compiled, gather_weights
from tests.models import left_padded, random_ids

SIZES = {"vocab_size": 200, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
SETTINGS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 16}


def torchao():
    return transformers.TorchAoConfig(importlib.import_module("torchao.quantization").Int8WeightOnlyConfig())


KINDS = {
    "bitsandbytes, 4 bits": ("bitsandbytes", lambda: transformers.BitsAndBytesConfig(load_in_4bit=True)),
    "bitsandbytes, 8 bits": (
        "bitsandbytes",
        lambda: transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
    ),
    "torchao, 8 bits": ("torchao", torchao),
    "quanto, 8 bits": ("optimum.quanto", lambda: transformers.QuantoConfig(weights="int8")),
}


@pytest.fixture(scope="module", params=KINDS)
def model(request, tmp_path_factory) -> PreTrainedModel:
    package, config = KINDS[request.param]
    pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=config(), dtype=torch.float32).eval()


def tokens(model, attention, cache, ids, mask=None):
    model.set_attn_implementation(attention)
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **SETTINGS)


def test_tokens_are_those_of_dynamic_cache(model):
    ids, mask = random_ids(3, 18), left_padded(18, [18, 5, 11])
    expected = tokens(model, "sdpa", DynamicCache(config=model.config), ids, mask)
    assert expected[:, 18:].unique().numel() > 8
    model.set_attn_implementation("paged_flex")
    gather_weights(model)
    assert torch.equal(tokens(model, "paged_flex", PagedCache.from_model(model), ids, mask), expected)
    cache = PagedCache.from_model(model)
    cache.prefill(model, ids, mask)
    assert torch.equal(tokens(model, "paged_flex", cache, ids, mask), expected)


def test_compiled_steps_give_them_too_or_a_log_line_says_that_there_are_none(model, caplog):
    ids = random_ids(1, 18)
    expected = tokens(model, "sdpa", DynamicCache(config=model.config), ids)
    model.set_attn_implementation("paged_flex")
    with caplog.at_level(logging.WARNING), compiled(model):
        assert torch.equal(tokens(model, "paged_flex", PagedCache.from_model(model), ids), expected)
    said = "Compiling a model" if model.hf_quantizer.is_compileable else "runs uncompiled within compiled()"
    assert said in caplog.text


def quantised(**config) -> PreTrainedModel:
    """What Transformers' quantiser of bitsandbytes leaves on a model."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).eval()
    model.set_attn_implementation("paged_flex")
    settings = SimpleNamespace(quant_method="bitsandbytes", **config)
    model.hf_quantizer = SimpleNamespace(is_compileable=False, quantization_config=settings)
    return model


def test_weights_that_transformers_does_not_compile_are_left_uncompiled(caplog):
    model = quantised(load_in_4bit=True)
    with compiled(model):
        assert model.generation_config.compile_config is None
    assert "Transformers compiles no weights of bitsandbytes, so LlamaForCausalLM runs uncompiled" in caplog.text


@pytest.mark.parametrize(("threshold", "is_packed"), [(6.0, False), (0.0, True)])
def test_prompts_are_not_packed_where_a_token_is_rounded_by_the_others(threshold, is_packed, caplog):
    model = quantised(load_in_8bit=True, llm_int8_threshold=threshold)
    PagedCache.from_model(model).prefill(model, random_ids(2, 20))
    assert ("round a token by what else is in a pass" in caplog.text) != is_packed
