"""Attention sinks and bounded scores, over pages and over contiguous keys."""

import pytest
import torch
from transformers import DynamicCache, Gemma4ForCausalLM, Gemma4TextConfig, GptOssConfig, GptOssForCausalLM

from hf_paged import OutOfPagesError, PagedCache
from hf_paged.attention.backends.reference import blockwise_attention
from tests.models import left_padded, random_ids, run, tiny_model

FP32 = {"atol": 2e-4, "rtol": 1e-4}


@pytest.fixture
def model():
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 24}
    return tiny_model(GptOssForCausalLM, GptOssConfig, **sizes)


def eager(model, ids, splits, mask=None):
    model.set_attn_implementation("eager")
    return run(model, DynamicCache(config=model.config), ids, splits, mask)


def paged(model, num_pages=None):
    model.set_attn_implementation("paged_flex")
    return PagedCache.from_model(model, num_pages, page_size=16)


# Over pages


@pytest.mark.parametrize("splits", [[70, 1, 1, 1, 27], [1] * 40], ids=str)
@pytest.mark.parametrize("kind", ["plain", "left", "holes"])
def test_sinks_take_the_weight_that_they_take_in_eager_attention(model, splits, kind):
    count = sum(splits)
    ids = random_ids(3, count)
    mask = {
        "plain": None,
        "left": left_padded(count, [count, count - 7, count // 2]),
        "holes": (torch.rand(3, count, generator=torch.Generator().manual_seed(1)) > 0.3).long(),
    }[kind]
    expected = eager(model, ids, splits, mask)
    cache = paged(model)
    logits = run(model, cache, ids, splits, mask)
    real = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(logits[real], expected[real], **FP32)
    cache.pool.check_integrity()


def test_sinks_are_seen_beside_a_mask_that_hides_cached_tokens(model):
    ids, mask = random_ids(2, 41), torch.ones(2, 41, dtype=torch.long)
    mask[0, 20:35] = 0
    logits = {}
    for attention, cache in (("eager", DynamicCache(config=model.config)), ("paged_flex", paged(model))):
        model.set_attn_implementation(attention)
        run(model, cache, ids[:, :40], [40])
        with torch.no_grad():
            logits[attention] = model(ids[:, 40:], past_key_values=cache, attention_mask=mask).logits
    torch.testing.assert_close(logits["paged_flex"], logits["eager"], **FP32)


@pytest.mark.parametrize("splits", [[10, 1, 1], [10, 2]], ids=str)
def test_on_a_cpu_sinks_take_no_page(model, splits):
    cache = paged(model)
    run(model, cache, random_ids(1, 12), splits)
    assert [group.allocator.num_active for group in cache.pool.groups] == [1, 1]


@pytest.mark.usefixtures("block_lists")
def test_one_page_of_each_group_is_the_sink(model):
    cache = paged(model)
    run(model, cache, random_ids(1, 20), [10, 1, 1, 4, 4])
    held = [group.allocator.num_active for group in cache.pool.groups]
    assert held == [2 + 1, 2 + 1]
    assert cache.stats().num_active_pages == 2 + 2
    cache.reset()
    assert [group.allocator.num_active for group in cache.pool.groups] == [1, 1]
    cache.pool.check_integrity()


@pytest.mark.usefixtures("block_lists")
def test_no_page_for_the_sink_is_said_and_changes_nothing(model):
    cache = paged(model, num_pages=2)
    run(model, cache, random_ids(1, 20), [20])
    with pytest.raises(OutOfPagesError, match="needs 1 more pages, but 0 of 2 are free"):
        run(model, cache, random_ids(1, 2), [2])
    cache.crop(0)
    assert cache.lengths == [20]
    cache.pool.check_integrity()


# Over contiguous keys


@pytest.mark.parametrize("num_queries", [1, 256, 600])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kind", ["causal", "all", "bool", "float"])
def test_blocks_of_queries_give_what_all_at_once_give(num_queries, has_sinks, softcap, kind):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, num_queries, 16, generator=generator)
    keys, values = torch.randn(2, 2, 2, 600, 16, generator=generator)
    sinks = torch.randn(6, generator=generator) if has_sinks else None
    causal = torch.ones(num_queries, 600, dtype=torch.bool).tril(600 - num_queries)
    visible = {"causal": causal, "all": torch.ones_like(causal)}.get(kind, causal & (torch.arange(600) != 3))
    mask = {"bool": visible, "float": torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)}.get(kind)
    found = blockwise_attention(
        query, keys, values, None if mask is None else mask.expand(2, 1, -1, -1), kind == "causal", 0.3, softcap, sinks
    )
    scores = query @ keys.repeat_interleave(3, dim=1).mT * 0.3
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~visible, -torch.inf).exp()
    total = weights.sum(dim=-1, keepdim=True) + (0 if sinks is None else sinks.exp().view(1, 6, 1, 1))
    expected = weights / total @ values.repeat_interleave(3, dim=1)
    torch.testing.assert_close(found, expected.transpose(1, 2), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kept", [1, 3])
def test_layers_may_leave_out_the_queries_whose_logits_nobody_wants(kept):
    model = tiny_model(
        Gemma4ForCausalLM,
        Gemma4TextConfig,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=24,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=200,
        global_head_dim=16,
    )
    ids, logits = random_ids(2, 60), {}
    for attention, cache in (("eager", DynamicCache(config=model.config)), ("paged_flex", paged(model))):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            passes = [ids[:, :12], ids[:, 12:50], ids[:, 50:51], ids[:, 51:]]
            logits[attention] = [model(part, past_key_values=cache, logits_to_keep=kept).logits for part in passes]
    torch.testing.assert_close(logits["paged_flex"], logits["eager"], **FP32)
