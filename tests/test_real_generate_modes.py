"""SmolLM2-135M-Instruct generates the same with drafts of its tokens as without, over pages."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_paged import PagedCache
from hf_paged.packaged import load_packaged_model, prompts

pytestmark = [pytest.mark.real_model, pytest.mark.xdist_group("real_model")]

NUM_NEW = 64


@pytest.fixture(name="smollm2", scope="module")
def loaded_model():
    return load_packaged_model()


@pytest.fixture(name="prompt", scope="module")
def prose_prompt(smollm2):
    _, tokenizer = smollm2
    return torch.tensor(prompts(tokenizer, [150]))


def greedy(model, attention, cache, prompt, **arguments):
    model.set_attn_implementation(attention)
    settings = {"do_sample": False, "max_new_tokens": NUM_NEW, "min_new_tokens": NUM_NEW}
    return model.generate(prompt, past_key_values=cache, **settings, **arguments)


@pytest.fixture(name="expected", scope="module")
def plain_tokens(smollm2, prompt):
    model, _ = smollm2
    return greedy(model, "sdpa", DynamicCache(config=model.config), prompt)


def small_draft(model):
    """A model with the vocabulary of another and nothing learned."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3}
    return LlamaForCausalLM(LlamaConfig(vocab_size=model.config.vocab_size, **sizes)).eval()


@pytest.mark.parametrize("mode", ["prompt_lookup", "itself_as_draft", "random_draft"])
def test_drafting_changes_no_token(smollm2, prompt, expected, mode):
    model, _ = smollm2
    arguments = {
        "prompt_lookup": lambda: {"prompt_lookup_num_tokens": 6},
        "itself_as_draft": lambda: {"assistant_model": model},
        "random_draft": lambda: {"assistant_model": small_draft(model)},
    }[mode]()
    cache = PagedCache.from_model(model, page_size=16)
    tokens = greedy(model, "paged_flex", cache, prompt, **arguments)
    assert torch.equal(tokens, expected)
    assert cache.lengths == [tokens.shape[1] - 1]
    cache.pool.check_integrity()
