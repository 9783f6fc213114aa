"""PEFT adapters over a paged cache."""

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, TaskType, get_peft_model
from transformers import DynamicCache

from hf_paged import PagedCache
from tests.models import generate, left_padded, random_ids, tiny_llama


def test_a_lora_model_generates_the_same_tokens():
    ids, mask = random_ids(3, 21), left_padded(21, [21, 9, 16])
    config = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_llama(), config).eval()
    expected = generate(model, "sdpa", DynamicCache(config=model.config), ids, attention_mask=mask)
    cache = PagedCache.from_model(model, page_size=16)
    assert torch.equal(generate(model, "paged_flex", cache, ids, attention_mask=mask), expected)
    with model.disable_adapter():
        cache = PagedCache.from_model(model, page_size=16)
        assert not torch.equal(generate(model, "paged_flex", cache, ids, attention_mask=mask), expected)


def test_prefix_tuning_is_told_that_a_paged_mask_is_no_tensor():
    config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    model = get_peft_model(tiny_llama(), config).eval()
    cache = PagedCache.from_model(model, page_size=16)
    with pytest.raises(AttributeError, match="was asked for its 'dtype', but it is no tensor"):
        generate(model, "paged_flex", cache, random_ids(1, 5))
