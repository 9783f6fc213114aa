"""A model in float64 is computed in float64, wherever its keys are; other dtypes than a model's are refused."""

import pytest
import torch
from transformers import DynamicCache

from hf_paged import PagedCache
from hf_paged.attention.backends.reference import blockwise_attention
from tests.models import left_padded, plain, random_ids, run, tiny_gemma, tiny_llama

FP64 = {"atol": 1e-10, "rtol": 1e-9}


def llama():
    return tiny_llama()


def gemma():
    return tiny_gemma(24)


@pytest.mark.parametrize("make", [llama, gemma], ids=lambda make: make.__name__)
@pytest.mark.parametrize("splits", [[20] + [1] * 10, [20, 5, 5], [15, 1, 1, 13]], ids=str)
@pytest.mark.parametrize("lengths", [[30], [30, 14]], ids=str)
def test_logits_differ_by_rounding_in_float64(make, splits, lengths):
    model = make().double()
    ids, mask = random_ids(len(lengths), 30), left_padded(30, lengths)
    model.set_attn_implementation("sdpa")
    expected = run(model, DynamicCache(config=model.config), ids, [30], mask)
    model.set_attn_implementation("paged_flex")
    actual = run(model, PagedCache.from_model(model, page_size=16), ids, splits, mask)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], **FP64)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_bounded_scores_and_sinks_are_computed_in_float64(softcap, has_sinks):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 2, 5, 16, generator=generator, dtype=torch.float64)
    keys, values = torch.randn(2, 1, 2, 9, 16, generator=generator, dtype=torch.float64)
    sinks = torch.randn(2, generator=generator, dtype=torch.float64) if has_sinks else None
    scores = query @ keys.mT / 4
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~torch.ones(5, 9, dtype=torch.bool).tril(4), -torch.inf).exp()
    total = weights.sum(-1, keepdim=True) + (0 if sinks is None else sinks.exp().view(1, 2, 1, 1))
    expected = (weights / total @ values).transpose(1, 2)
    actual = blockwise_attention(query, keys, values, None, True, 0.25, softcap, sinks)
    torch.testing.assert_close(actual, expected, atol=1e-14, rtol=1e-13)


def test_packed_prompts_are_computed_in_float64():
    model = tiny_llama().double()
    ids, mask = random_ids(3, 40), left_padded(40, [40, 17, 5])
    expected = plain(model, ids, [40], mask)
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    cache.prefill(model, ids, mask, max_tokens=32)
    positions = (mask.cumsum(1) - 1)[:, -1:]
    with torch.no_grad():
        last = model(ids[:, -1:], past_key_values=cache, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(last[:, 0], expected[:, -1], **FP64)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.complex64])
def test_keys_in_a_dtype_that_no_model_computes_in_are_refused(dtype):
    cache = PagedCache(tiny_llama().config, page_size=16)
    states = torch.zeros(1, 2, 3, 16).to(dtype)
    with pytest.raises(ValueError, match=rf"keys and values in {dtype}, but pages hold float16, bfloat16, float32"):
        cache.update(states, states, 0)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize(("of_keys", "of_values"), [(torch.float32, torch.bfloat16), (torch.float16, torch.float64)])
def test_keys_and_values_in_two_dtypes_are_refused(of_keys, of_values):
    cache = PagedCache(tiny_llama().config, page_size=16)
    states = torch.zeros(1, 2, 3, 16)
    with pytest.raises(ValueError, match=rf"values in {of_values} on cpu, but keys in {of_keys}"):
        cache.update(states.to(of_keys), states.to(of_values), 0)
