"""Encoder-decoders generate with a paged cache what they do with Transformers' own."""

import copy

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, EncoderDecoderConfig, EncoderDecoderModel, PreTrainedModel
from transformers import T5GemmaConfig as GemmaConfig
from transformers import T5GemmaForConditionalGeneration as Gemma
from transformers.cache_utils import DynamicLayer

from hf_paged import OutOfPagesError, PagedCache, PagedEncoderDecoderCache, PagePool, ReleaseFinished
from hf_paged.batch.handed_on import RepeatedRows
from hf_paged.cache.encoder_decoder import EncoderLayer
from tests.families import ENCODER, SOUND
from tests.models import left_padded, random_ids

START, END = 2, 1
SETTINGS = {"pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 20, "do_sample": False}
PLAIN = {"pad_token_id": 0, "forced_eos_token_id": None, "eos_token_id": END, "bos_token_id": 1}


def sizes(**changes):
    return {**ENCODER, **PLAIN, "vocab_size": 200, **changes}


def of_class(name: str, **changes):
    def load() -> PreTrainedModel:
        config = getattr(transformers, name.removesuffix("ForConditionalGeneration") + "Config")
        return getattr(transformers, name)(config(**sizes(**changes)))

    return load


def t5() -> PreTrainedModel:
    shape = {"d_model": 48, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 3}
    config = transformers.T5Config(
        vocab_size=200, initializer_factor=3.0, decoder_start_token_id=START, pad_token_id=0, **shape
    )
    return transformers.T5ForConditionalGeneration(config)


def t5gemma() -> PreTrainedModel:
    """Every other layer of the decoder has a window, which is shorter than what the encoder reads."""
    stack = {
        "vocab_size": 200,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "initializer_range": 0.3,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention"],
        "pad_token_id": 0,
    }
    return Gemma(GemmaConfig(encoder=stack, decoder=stack, decoder_start_token_id=START, pad_token_id=0))


def bert_and_gpt2() -> PreTrainedModel:
    """A decoder that was made for something else, with attention to an encoder added."""
    shape = {"vocab_size": 200, "initializer_range": 0.3}
    encoder = {"model_type": "bert", "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, **shape}
    decoder = {"model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 3, **shape}
    extra = {"is_decoder": True, "add_cross_attention": True}
    config = EncoderDecoderConfig(
        encoder=encoder | {"intermediate_size": 64},
        decoder=decoder | extra,
        decoder_start_token_id=START,
        pad_token_id=0,
    )
    return EncoderDecoderModel(config=config)


MODELS = {
    "BART": of_class("BartForConditionalGeneration"),
    "one layer": of_class("BartForConditionalGeneration", decoder_layers=1),
    "Whisper": of_class("WhisperForConditionalGeneration", **SOUND),
    "BERT and GPT-2": bert_and_gpt2,
    "T5": t5,
    "T5Gemma": t5gemma,
}
ORACLE = {"T5Gemma": "eager"}


def load(name: str, attention: str | None = None, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    model.set_attn_implementation(attention or ORACLE.get(name, "sdpa"))
    return model


def paged(name: str = "BART") -> tuple[PreTrainedModel, PagedEncoderDecoderCache]:
    model = load(name, "paged_flex")
    return model, PagedCache.from_model(model, page_size=16)


def inputs(name: str, num_rows: int) -> dict[str, Tensor]:
    if name == "Whisper":
        return {"input_features": torch.randn(num_rows, 8, 60, generator=torch.Generator().manual_seed(1))}
    lengths = [20, 11, 15][:num_rows]
    prompt = torch.cat([torch.full((num_rows, 1), START), random_ids(num_rows, 6, seed=2)], dim=1)
    mask = left_padded(20, lengths).flip(1)
    return {"input_ids": random_ids(num_rows, 20), "attention_mask": mask, "decoder_input_ids": prompt}


def tokens(model: PreTrainedModel, cache, arguments: dict, seed: int = 5) -> Tensor:
    torch.manual_seed(seed)
    output = model.generate(past_key_values=cache, **{**SETTINGS, **arguments})
    return output if isinstance(output, Tensor) else output["sequences"]


def logits(model: PreTrainedModel, cache, ids: Tensor, prompt: Tensor) -> Tensor:
    """Logits of the decoder after `prompt`, given to it in two passes."""
    with torch.no_grad():
        encoded = model.get_encoder()(ids)
        for part in (prompt[:, :-4], prompt[:, -4:]):
            output = model(encoder_outputs=encoded, decoder_input_ids=part, past_key_values=cache)
    return output.logits


MODES = {
    "greedy": (3, {}),
    "samples": (3, {"do_sample": True}),
    "beams": (3, {"num_beams": 3}),
    "sequences": (3, {"do_sample": True, "num_return_sequences": 2}),
    "best beams": (1, {"num_beams": 4, "num_return_sequences": 3}),
    "sampled beams": (1, {"do_sample": True, "num_beams": 3}),
    "prompt lookup": (1, {"prompt_lookup_num_tokens": 3}),
    "assistant": (1, {"assistant_model": 1}),
    "perfect assistant": (1, {"assistant_model": 0}),
    "sampled assistant": (1, {"assistant_model": 0, "do_sample": True}),
}


@pytest.mark.parametrize(
    ("name", "mode"),
    [(name, mode) for name in MODELS for mode in (MODES if name in ("BART", "T5Gemma") else ("greedy", "beams"))],
)
def test_every_mode_gives_the_tokens_of_transformers_own_cache(name, mode):
    num_rows, arguments = MODES[mode]
    arguments = arguments | inputs(name, num_rows)
    if name == "Whisper":
        arguments["eos_token_id"] = END  # its generate() pads with it
    if "assistant_model" in arguments:
        arguments["assistant_model"] = load(name, seed=arguments["assistant_model"])
    expected = tokens(load(name), None, arguments)
    model, cache = paged(name)
    assert torch.equal(tokens(model, cache, arguments), expected)
    cache.pool.check_integrity()


@pytest.mark.parametrize("name", ["BART", "T5", "T5Gemma"])
def test_logits_after_every_change_of_the_rows_are_those_of_transformers_own_cache(name):
    ids, prompt = random_ids(3, 20), random_ids(3, 17, seed=3)
    model, cache = paged(name)
    plain = load(name)
    config = plain.config.get_text_config(decoder=True)
    oracle = EncoderDecoderCache(DynamicCache(config=config), DynamicCache())
    for each, of in ((model, cache), (plain, oracle)):
        logits(each, of, ids, prompt)
    if name != "T5Gemma":  # whose windows Transformers can't give back
        cache.crop(-3)
        oracle.crop(-3)
    for change, argument in (
        ("batch_repeat_interleave", 2),
        ("reorder_cache", torch.tensor([1, 1, 0, 4, 5, 3])),
        ("batch_select_indices", torch.tensor([0, 2, 4])),
    ):
        getattr(cache, change)(argument)
        getattr(oracle, change)(argument)
    rows = torch.tensor([0, 0, 2])
    more = random_ids(3, 5, seed=4)
    found, expected = (logits(each, of, ids[rows], more) for each, of in ((model, cache), (plain, oracle)))
    torch.testing.assert_close(found, expected, atol=5e-4, rtol=1e-4)
    assert cache.get_seq_length() == oracle.get_seq_length()


@pytest.mark.parametrize("copied", [PagedEncoderDecoderCache.fork, copy.copy, copy.deepcopy])
def test_copies_go_their_own_way(copied):
    ids, prompt = random_ids(2, 20), random_ids(2, 17, seed=3)
    model, cache = paged()
    logits(model, cache, ids, prompt)
    other = copied(cache)
    assert other.pool is cache.pool
    first, second = random_ids(2, 5, seed=4), random_ids(2, 5, seed=5)
    for each, more in ((cache, first), (other, second)):
        oracle = EncoderDecoderCache(DynamicCache(), DynamicCache())
        logits(load("BART"), oracle, ids, prompt)
        expected = logits(load("BART"), oracle, ids, more)
        torch.testing.assert_close(logits(model, each, ids, more), expected, atol=5e-4, rtol=1e-4)
    other.cross_attention_cache.layers[0].keys.zero_()
    assert cache.cross_attention_cache.layers[0].keys.any()


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("name", ["BART", "Whisper", "T5"])
def test_keys_of_the_encoder_are_computed_once_for_all_steps(name, num_beams):
    model, cache = paged(name)
    projections = [
        module
        for name, module in model.get_decoder().named_modules()
        if name.endswith(("encoder_attn.k_proj", "EncDecAttention.k"))
    ]
    calls = []
    for projection in projections:
        projection.register_forward_hook(lambda module, *_: calls.append(module))
    tokens(model, cache, inputs(name, 3) | {"num_beams": num_beams})
    assert len(projections) == 2
    assert calls == projections


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("BART", {"num_beams": 4}),
        ("T5", {"do_sample": True, "num_return_sequences": 4}),
        ("Whisper", {"num_beams": 4}),
        ("T5Gemma", {"num_beams": 4}),
    ],
    ids=str,
)
def test_beams_and_samples_share_what_is_kept_of_the_encoder(name, mode, monkeypatch):
    arguments = inputs(name, 2) | mode | ({"eos_token_id": END} if name == "Whisper" else {})
    expected = tokens(load(name), None, arguments)

    def refuse(*_):
        raise AssertionError("rows that are alike were copied")

    monkeypatch.setattr(RepeatedRows, "copies", refuse)
    model, cache = paged(name)
    assert torch.equal(tokens(model, cache, arguments), expected)
    assert cache.batch_size == 8
    for layer in cache.cross_attention_cache.layers:
        assert layer.keys.shape[0] == 8
        _, num_heads, num_columns, head_dim = layer.keys.shape
        assert layer.num_bytes == 2 * 2 * num_heads * num_columns * head_dim * 4


@pytest.mark.parametrize("repeats", [[1, 1, 1], [4], [2, 2], [3, 1, 2]], ids=str)
def test_a_layer_that_shares_rows_holds_what_one_that_does_not_would(repeats):
    torch.manual_seed(0)
    keys, values = (torch.randn(len(repeats), 2, 5, 4).repeat_interleave(torch.tensor(repeats), 0) for _ in range(2))
    layer, plain = EncoderLayer(), DynamicLayer()
    generator = torch.Generator().manual_seed(0)
    for each in (layer, plain):
        each.update(keys, values)
    assert layer.num_bytes == (keys.nbytes + values.nbytes) * len(repeats) // sum(repeats)

    def check():
        assert torch.equal(layer.keys + 0, plain.keys)
        assert torch.equal(layer.values + 0, plain.values)
        assert layer.keys.shape == plain.keys.shape
        assert layer.get_seq_length() == 5

    check()
    for _ in range(4):
        index = torch.randint(0, len(plain.keys), (len(plain.keys),), generator=generator)
        for change, argument in (
            ("reorder_cache", index),
            ("batch_repeat_interleave", 2),
            ("batch_select_indices", index.sort().values),
            ("batch_select_indices", torch.arange(len(index)) != 1),
            ("batch_repeat_interleave", 3),
        ):
            for each in (layer, plain):
                getattr(each, change)(argument)
            check()
    for each in (layer, plain):
        each.keys[1].add_(1)  # of one of several rows that are alike
    check()
    assert layer.num_bytes == layer.keys.nbytes + layer.values.nbytes
    for each in (layer, plain):
        each.batch_repeat_interleave(2)
        each.values = each.values * 2
    check()


@pytest.mark.parametrize("repeats", [[4], [2, 2], [3, 1, 2], [1, 1]], ids=str)
def test_graphs_read_every_row(repeats):
    torch.manual_seed(0)
    keys, values = (torch.randn(len(repeats), 2, 5, 4).repeat_interleave(torch.tensor(repeats), 0) for _ in range(2))
    layer, query = EncoderLayer(), torch.randn(sum(repeats), 2, 1, 4)
    layer.update(keys, values)

    @torch.compile(backend="eager", fullgraph=True)
    def attend(query):
        return torch.nn.functional.scaled_dot_product_attention(query, layer.keys, layer.values)

    for order in (torch.arange(len(keys)), torch.arange(len(keys)).flip(0)):
        layer.reorder_cache(order)
        keys, values = keys[order], values[order]
        expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values)
        torch.testing.assert_close(attend(query), expected)


@pytest.mark.parametrize("begin_anew", ["failed pass", "reset", "crop"])
def test_another_input_is_not_answered_with_what_an_encoder_said_before(begin_anew):
    ids, others = random_ids(1, 20), random_ids(1, 23, seed=9)
    model, cache = paged()
    if begin_anew == "failed pass":
        hook = model.get_decoder().layers[1].self_attn.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tokens(model, cache, {"input_ids": ids})
        hook.remove()
        assert cache.is_updated[0], "a layer has seen what the encoder said"
        cache.roll_back()
    else:
        tokens(model, cache, {"input_ids": ids})
        cache.reset() if begin_anew == "reset" else cache.crop(-cache.get_seq_length())
    arguments = {"input_ids": others}
    assert torch.equal(tokens(model, cache, arguments), tokens(load("BART"), None, arguments))


def test_a_cached_prompt_of_one_row_becomes_several():
    model, cache = paged()
    ids, prompt = random_ids(1, 20), torch.cat([torch.full((1, 1), START), random_ids(1, 16, seed=3)], dim=1)
    tokens(model, cache, {"input_ids": ids, "decoder_input_ids": prompt[:, :-2], "max_new_tokens": 1})
    arguments = {"input_ids": ids, "decoder_input_ids": prompt, "decoder_attention_mask": torch.ones_like(prompt)}
    arguments |= {"do_sample": True, "num_return_sequences": 3}
    assert torch.equal(tokens(model, cache, arguments), tokens(load("BART"), None, arguments))
    assert cache.batch_size == 3


def test_what_is_asked_of_a_cache_is_answered_for_the_decoder():
    model, cache = paged()
    assert (cache.lengths, cache.batch_size, cache.is_initialized) == ([], -1, False)
    tokens(model, cache, inputs("BART", 3))
    decoder = cache.self_attention_cache
    assert cache.lengths == decoder.lengths == [7 + 19] * 3
    assert cache.batch_size == 3
    assert cache.is_initialized
    assert cache.is_croppable
    assert not cache.is_recording_past(0)
    assert cache.stats() == decoder.stats()
    assert cache.pool is decoder.pool
    assert cache.memory_map() == decoder.memory_map()
    assert all(torch.equal(*pair) for pair in zip(cache.gather(1), decoder.gather(1), strict=True))
    assert repr(decoder) in repr(cache)
    cache.release([1])
    assert cache.lengths == [26, 0, 26]


def test_rows_that_end_are_released():
    model, cache = paged()
    arguments = inputs("BART", 3)
    expected = tokens(load("BART"), None, arguments | {"max_new_tokens": 6})
    end = int(expected[1, 9])
    criteria = [ReleaseFinished(cache, eos_token_id=end)]
    tokens(model, cache, arguments | {"eos_token_id": end, "stopping_criteria": criteria, "max_new_tokens": 6})
    assert cache.lengths[1] == 0


def test_several_caches_share_a_pool():
    model = load("BART", "paged_flex")
    pool = PagePool(model.config, num_pages=12, page_size=16)
    first, second = PagedEncoderDecoderCache(pool=pool), PagedEncoderDecoderCache(pool=pool)
    arguments = inputs("BART", 3)
    expected = tokens(load("BART"), None, arguments)
    assert torch.equal(tokens(model, first, arguments), expected)
    assert torch.equal(tokens(model, second, arguments), expected)
    assert pool.stats().num_tokens == sum(first.lengths) + sum(second.lengths)
    with pytest.raises(OutOfPagesError, match="more pages"):
        tokens(model, PagedEncoderDecoderCache(pool=pool), arguments)
    second.reset()
    assert torch.equal(tokens(model, PagedEncoderDecoderCache(pool=pool), arguments), expected)


@pytest.mark.parametrize("name", ["BART", "BERT and GPT-2", "T5Gemma"])
def test_a_cache_without_room_for_the_encoder_is_refused(name):
    model = load(name)
    with pytest.raises(ValueError, match=r"model has an encoder, too, .* Use PagedCache\.from_model\(model\)"):
        PagedCache(model.config)
    with pytest.raises(ValueError, match="model has an encoder, too"):
        PagedCache(pool=PagePool(model.config, page_size=16))


def test_a_cache_around_the_cache_is_refused():
    model, cache = paged()
    with pytest.raises(ValueError, match="it needs no EncoderDecoderCache around it"):
        tokens(model, EncoderDecoderCache(cache, DynamicCache()), inputs("BART", 1))
    assert cache.lengths == []


def test_a_row_that_does_not_exist_changes_neither_part():
    model, cache = paged()
    tokens(model, cache, inputs("BART", 3))
    for change in ("reorder_cache", "batch_select_indices"):
        with pytest.raises(ValueError, match=r"Rows \[3\] were asked for, but this cache holds 3 rows"):
            getattr(cache, change)(torch.tensor([0, 3]))
    assert cache.batch_size == len(cache.cross_attention_cache.layers[0].keys) == 3


def test_prompts_of_a_decoder_with_an_encoder_are_not_packed():
    model, cache = paged()
    with pytest.raises(ValueError, match="has an encoder, so its rows can't be prefilled"):
        cache.prefill(model, random_ids(2, 5))
