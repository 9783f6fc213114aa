"""A position bias over columns is added to the scores of the tokens in pages."""

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from hf_paged import PagedCache, compiled, enable
from hf_paged.attention.backends import flex
from hf_paged.attention.backends.base import AttentionParams
from hf_paged.attention.backends.block_list_builder import block_lists_of
from hf_paged.attention.interface import paged_flex_attention
from hf_paged.batch import handed_on
from hf_paged.batch.steps.step import KVRanges
from tests.attention.test_varlen_sdpa import slots_of, storage, table_of
from tests.models import generate, left_padded, plain_tokens, random_ids, run, tiny_llama

CLOSE = {"atol": 5e-4, "rtol": 1e-4}
SIZES = {"d_model": 48, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 3}


def load(family: str, attention: str) -> PreTrainedModel:
    """A model whose tokens depend on the bias: its buckets are few, and reach less far than the text."""
    config = getattr(transformers, f"{family}Config")
    reach = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 24}
    fixed = {"decoder_start_token_id": 2, "pad_token_id": 0, "vocab_size": 200, "initializer_factor": 1.0}
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config(**SIZES, **reach, **fixed)).eval()
    for name, weight in model.named_parameters():
        if "relative_attention_bias" in name:
            torch.nn.init.normal_(weight, std=2.0)
    model.set_attn_implementation(attention)
    return model


@torch.no_grad()
def logits(model: PreTrainedModel, cache, ids: Tensor, splits: list[int], mask: Tensor | None = None) -> Tensor:
    """Logits of the decoder's columns, `(num_rows, num_columns, vocab_size)`, in passes of `splits` columns."""
    encoded = model.get_encoder()(random_ids(len(ids), 9, seed=7))
    parts, start = [], 0
    for size in splits:
        stop = start + size
        arguments = {
            "decoder_input_ids": ids[:, start:stop],
            "decoder_attention_mask": None if mask is None else mask[:, :stop],
        }
        parts.append(model(encoder_outputs=encoded, past_key_values=cache, **arguments).logits)
        start = stop
    return torch.cat(parts, dim=1)


def plain_cache() -> EncoderDecoderCache:
    return EncoderDecoderCache(DynamicCache(), DynamicCache())


def ragged(num_columns: int) -> Tensor:
    """Rows with padding on the left, in the middle, and without."""
    mask = torch.ones(3, num_columns, dtype=torch.long)
    mask[0, :13] = 0
    mask[1, 20:34] = 0
    return mask


@pytest.mark.parametrize("splits", [[40, 1, 1, 18], [5, 35, 1, 1, 1, 17]], ids=str)
@pytest.mark.parametrize("family", ["T5", "UMT5", "MT5", "LongT5", "SwitchTransformers"])
def test_logits_are_those_of_dynamic_cache_where_columns_are_no_tokens(family, splits):
    ids, mask = random_ids(3, 60), ragged(60)
    real = mask.bool()
    expected = logits(load(family, "sdpa" if family == "T5" else "eager"), plain_cache(), ids, splits, mask)
    model = load(family, "paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    torch.testing.assert_close(logits(model, cache, ids, splits, mask)[real], expected[real], **CLOSE)
    assert cache.lengths == real.sum(1).tolist()
    cache.pool.check_integrity()


def test_logits_are_those_of_dynamic_cache_where_cached_tokens_are_hidden():
    ids, mask = random_ids(3, 50), torch.ones(3, 50, dtype=torch.long)
    hiding = mask.clone()
    hiding[0, 3:20] = hiding[2, 39:41] = 0
    found = []
    for attention in ("sdpa", "paged_flex"):
        model = load("T5", attention)
        cache = plain_cache() if attention == "sdpa" else PagedCache.from_model(model, page_size=16)
        logits(model, cache, ids[:, :42], [42])
        encoded = model.get_encoder()(random_ids(3, 9, seed=7))
        for first, stop in ((42, 43), (43, 50)):
            arguments = {"decoder_input_ids": ids[:, first:stop], "decoder_attention_mask": hiding[:, :stop]}
            with torch.no_grad():
                found.append(model(encoder_outputs=encoded, past_key_values=cache, **arguments).logits)
    torch.testing.assert_close(torch.cat(found[2:], dim=1), torch.cat(found[:2], dim=1), **CLOSE)


def test_the_bias_of_a_model_decides_on_its_logits():
    """Else the tests here would show nothing."""
    ids = random_ids(1, 40)
    with_bias = logits(load("T5", "sdpa"), plain_cache(), ids, [40])
    model = load("T5", "sdpa")
    torch.nn.init.zeros_(model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight)
    assert (logits(model, plain_cache(), ids, [40]) - with_bias).abs().max() > 0.1


def test_no_keys_are_copied_for_their_shape(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("keys were copied out of their pages")

    monkeypatch.setattr(handed_on, "gather_columns", refuse)
    model = load("UMT5", "paged_flex")
    logits(model, PagedCache.from_model(model), random_ids(2, 24), [20, 1, 3])


def test_logits_after_crop_and_reorder_are_those_of_dynamic_cache():
    ids, order, more = random_ids(3, 40), torch.tensor([2, 0, 0]), random_ids(3, 9, seed=3)
    expected = []
    for attention in ("sdpa", "paged_flex"):
        model = load("T5", attention)
        cache = plain_cache() if attention == "sdpa" else PagedCache.from_model(model, page_size=16)
        logits(model, cache, ids, [40])
        cache.crop(-7)
        cache.reorder_cache(order)
        expected.append(logits(model, cache, more, [1, 8]))
    torch.testing.assert_close(expected[1], expected[0], **CLOSE)


@pytest.mark.parametrize("num_queries", [1, 70])
def test_queries_of_several_heads_in_several_tiles_are_given_their_own_bias(num_queries):
    torch.manual_seed(0)
    table = table_of([90, 71, 200])
    kv_stop = table.lengths[:, None] - np.arange(num_queries)[::-1]
    keys, values = (storage(table, 2, 16, torch.float32).nan_to_num() for _ in range(2))
    query, bias, sinks = torch.randn(3, 6, num_queries, 16), 3 * torch.randn(3, 6, num_queries, 208), torch.randn(6)
    params = AttentionParams(0.3, softcap=2.0, has_sinks=True)
    sink_page = table.group.sink_page()
    room = torch.zeros(1, 2, 16 * table.group.allocator.num_pages - keys.shape[2], 16)
    keys, values = torch.cat([keys, room], dim=2), torch.cat([values, room], dim=2)
    block_lists = block_lists_of(table, KVRanges(kv_stop), flex.layout_for(query, keys, sink_page))
    found = flex.paged_attention(query, keys, values, block_lists, 16, params, bias)(query, keys, values, sinks)
    for row in range(3):
        slots = slots_of(table, row)
        own_keys, own_values = (tensor[0, :, slots].repeat_interleave(3, dim=0) for tensor in (keys, values))
        scores = 2 * torch.tanh(query[row] @ own_keys.mT * 0.3 / 2) + bias[row, :, :, : len(slots)]
        hidden = torch.arange(len(slots)) >= torch.from_numpy(kv_stop[row])[:, None]
        scores = torch.cat([scores.masked_fill(hidden, -torch.inf), sinks.view(6, 1, 1).expand(-1, num_queries, 1)], 2)
        expected = scores.softmax(dim=-1)[..., :-1] @ own_values
        torch.testing.assert_close(found[row], expected.transpose(0, 1), atol=1e-5, rtol=1e-4)


def test_a_bias_over_other_columns_is_refused_and_the_pass_given_up():
    model, ids = tiny_llama(), random_ids(2, 20)
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    run(model, cache, ids, [20])
    before = cache.lengths

    def with_bias(module, args, kwargs):
        return args, kwargs | {"position_bias": torch.zeros(1, 6, 1, 32)}  # as wide as the storage

    hook = model.model.layers[0].self_attn.register_forward_pre_hook(with_bias, with_kwargs=True)
    with torch.no_grad(), pytest.raises(ValueError, match="1 new and 21 visible columns"):
        model(ids[:, :1], past_key_values=cache)
    hook.remove()
    assert cache.lengths == before
    cache.pool.check_integrity()


@pytest.mark.parametrize("mask", [None, torch.ones(1, 1, 5, 9).bool().tril(2), torch.zeros(1, 1, 5, 9)], ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_contiguous_keys_are_attended_to_with_the_bias(mask, softcap):
    torch.manual_seed(0)
    query, keys, values, bias = (torch.randn(2, 4, count, 16) for count in (5, 9, 9, 5))
    bias = torch.randn(1, 4, 5, 9)
    module = torch.nn.Module()
    module.is_causal = True
    found, _ = paged_flex_attention(module, query, keys, values, mask, softcap=softcap, position_bias=bias)
    scores = query @ keys.mT / 4
    scores = (scores if softcap is None else softcap * torch.tanh(scores / softcap)) + bias
    seen = torch.ones(5, 9, dtype=torch.bool).tril(4) if mask is None else mask if mask.dtype == torch.bool else None
    scores = scores if seen is None else scores.masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(found, (scores.softmax(-1) @ values).transpose(1, 2), atol=1e-5, rtol=1e-4)


def test_compiling_is_refused_before_anything_is_generated():
    with (
        pytest.raises(ValueError, match=r"adds a position bias to its scores.*Leave out compiled"),
        compiled(load("T5", "paged_flex")),
    ):
        pass


def test_an_enabled_model_is_never_compiled(monkeypatch):
    monkeypatch.setattr("hf_paged.enabling.state._COMPILE_SECONDS", 0)
    model = load("T5", "sdpa")
    settings = {"max_new_tokens": 9, "eos_token_id": None, "do_sample": False}
    expected = model.generate(random_ids(2, 9), **settings)
    with enable(model):
        for _ in range(2):
            assert torch.equal(model.generate(random_ids(2, 9), **settings), expected)


@pytest.mark.parametrize(("family", "changes"), [("Mpt", {}), ("Falcon", {"alibi": True})])
def test_models_that_add_alibi_by_themselves_are_refused_or_handed_copies(family, changes):
    model_class, config = (getattr(transformers, f"{family}{kind}") for kind in ("ForCausalLM", "Config"))
    sizes = {"vocab_size": 200, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
    torch.manual_seed(0)
    model = model_class(config(**sizes, initializer_range=0.3, pad_token_id=0, **changes)).eval()
    ids, mask = random_ids(3, 40), left_padded(40, [40, 17, 33])
    cache = PagedCache.from_model(model, page_size=16)
    expected = plain_tokens(model, ids, attention_mask=mask)
    assert torch.equal(generate(model, "sdpa", cache, ids, attention_mask=mask), expected)
    model.config._attn_implementation_internal = "paged_flex"
    with pytest.raises(ValueError, match="computes attention by itself"):
        PagedCache.from_model(model)
