"""PEFT adapters over a paged cache."""

import torch
from peft import LoraConfig, get_peft_model
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
