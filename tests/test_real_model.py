"""SmolLM2-135M-Instruct, a real `LlamaForCausalLM`, generates the same over pages."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_paged import PagedCache, prompt_lookup
from hf_paged.packaged import load_packaged_model, prompts

pytestmark = [pytest.mark.real_model, pytest.mark.xdist_group("real_model")]

LENGTHS = [5, 16, 17, 31, 64, 22, 33, 40, 48, 9, 75, 15, 55, 96, 80, 11, 129, 90, 8, 112]
NUM_NEW = 24


@pytest.fixture(name="smollm2", scope="module")
def loaded_model():
    return load_packaged_model()


def batches(tokenizer):
    rows = prompts(tokenizer, LENGTHS)
    for start in range(0, len(rows), 8):
        yield tokenizer.pad({"input_ids": rows[start : start + 8]}, return_tensors="pt")


def greedy(model, attention, cache, inputs, **arguments):
    model.set_attn_implementation(attention)
    settings = {"do_sample": False, "max_new_tokens": NUM_NEW, "min_new_tokens": NUM_NEW}
    return model.generate(**inputs, past_key_values=cache, **(settings | arguments))


@pytest.fixture(name="contiguous", scope="module")
def contiguous_tokens(smollm2):
    model, tokenizer = smollm2
    return [greedy(model, "sdpa", DynamicCache(config=model.config), inputs) for inputs in batches(tokenizer)]


def test_20_prompts_in_ragged_batches_of_8_give_the_same_tokens(smollm2, contiguous):
    model, tokenizer = smollm2
    for inputs, expected in zip(batches(tokenizer), contiguous, strict=True):
        cache = PagedCache.from_model(model, page_size=16)
        assert torch.equal(greedy(model, "paged_flex", cache, inputs), expected)
        # The last token is never fed back, so it is not cached.
        lengths = [length + NUM_NEW - 1 for length in inputs["attention_mask"].sum(1).tolist()]
        num_pages = sum(-(-length // 16) for length in lengths)
        stats = cache.stats()
        assert stats.num_active_pages == num_pages
        assert stats.num_tokens == sum(lengths)
        assert stats.overhead == pytest.approx(num_pages * 16 / sum(lengths) - 1)
        config = model.config
        token_bytes = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        assert stats.minimum_bytes == sum(lengths) * token_bytes
        cache.pool.check_integrity()


def test_drafts_for_a_batch_that_repeats_its_prompts_give_the_same_tokens_in_fewer_passes(smollm2):
    model, tokenizer = smollm2
    rows = [row + row + row[: len(row) // 4] for row in prompts(tokenizer, [40, 25, 60, 33])]
    inputs = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    long = {"max_new_tokens": 64, "min_new_tokens": 64}
    expected = greedy(model, "sdpa", DynamicCache(config=model.config), inputs, **long)
    cache, passes = PagedCache(model.config, page_size=16), []
    hook = model.register_forward_pre_hook(lambda *inputs: passes.append(1))
    tokens = greedy(model, "paged_flex", cache, inputs, custom_generate=prompt_lookup(), **long)
    hook.remove()
    assert torch.equal(tokens, expected)
    assert len(passes) < 0.7 * 64
    assert cache.lengths == [length + 64 - 1 for length in inputs["attention_mask"].sum(1).tolist()]


def test_bf16_logits_are_as_close_to_fp32_as_those_of_sdpa(smollm2):
    exact_model, tokenizer = smollm2
    ids = torch.tensor(prompts(tokenizer, [200]))
    model, _ = load_packaged_model(dtype=torch.bfloat16)

    def logits(model, attention, cache):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            parts = [model(part, past_key_values=cache).logits.float() for part in ids.split([150, 1, 1, 1, 1, 46], 1)]
        return torch.cat(parts, dim=1)

    exact = logits(exact_model, "sdpa", DynamicCache(config=model.config))
    expected = logits(model, "sdpa", DynamicCache(config=model.config))
    actual = logits(model, "paged_flex", PagedCache.from_model(model))
    assert (actual - exact).abs().mean() < 1.1 * (expected - exact).abs().mean()
    assert (actual - exact).abs().max() < 1.5 * (expected - exact).abs().max()


def test_drafting_changes_no_token(smollm2):
    model, tokenizer = smollm2
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3}
    draft = LlamaForCausalLM(LlamaConfig(vocab_size=model.config.vocab_size, **sizes)).eval()  # nothing learned
    inputs = {"inputs": torch.tensor(prompts(tokenizer, [150]))}
    expected = greedy(model, "sdpa", DynamicCache(config=model.config), inputs)
    for drafted in ({"prompt_lookup_num_tokens": 6}, {"assistant_model": draft}):
        cache = PagedCache.from_model(model, page_size=16)
        tokens = greedy(model, "paged_flex", cache, inputs, **drafted)
        assert torch.equal(tokens, expected)
        assert cache.lengths == [tokens.shape[1] - 1]
        cache.pool.check_integrity()


def test_packed_prompts_go_on_with_the_same_tokens(smollm2, contiguous):
    model, tokenizer = smollm2
    inputs = next(batches(tokenizer))
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    cache.prefill(model, **inputs, max_tokens=100)
    assert cache.lengths == [length - 1 for length in LENGTHS[:8]]
    assert torch.equal(greedy(model, "paged_flex", cache, inputs), contiguous[0])
