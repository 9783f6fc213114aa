"""Whatever way of generating a `DynamicCache` serves, a `PagedCache` serves with the same result.

Two limits are those of Transformers: assisted decoding takes one row, and beams take no streamer.
"""

import copy

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessor,
    LogitsProcessorList,
    MistralConfig,
    MistralForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

from hf_paged import PagedCache
from hf_paged._transformers import CACHE
from tests.models import left_padded, letter_tokenizer, random_ids, tiny_llama, tiny_model

CLOSE = {"atol": 5e-4, "rtol": 1e-4}
NUM_COLUMNS, NUM_NEW = 21, 12  # together they leave a window of 24 and fill a page of 16 twice

MODELS = {
    "llama": (tiny_llama, "sdpa"),
    "mistral": (lambda: tiny_model(MistralForCausalLM, MistralConfig, sliding_window=24), "sdpa"),
    "gemma2": (
        lambda: tiny_model(Gemma2ForCausalLM, Gemma2Config, sliding_window=24, query_pre_attn_scalar=16),
        "eager",
    ),
    "gpt2": (
        lambda: tiny_model(GPT2LMHeadModel, GPT2Config, num_attention_heads=3, bos_token_id=1, eos_token_id=2),
        "sdpa",
    ),
}
BATCHES = {
    "one_row": left_padded(NUM_COLUMNS, [NUM_COLUMNS]),
    "equal": left_padded(NUM_COLUMNS, [NUM_COLUMNS] * 3),
    "ragged": left_padded(NUM_COLUMNS, [NUM_COLUMNS, 9, 16]),
}
CASES = [("llama", "one_row"), ("llama", "equal"), ("gemma2", "ragged")]  # gemma2 has layers of both kinds


class NoTokenTwiceInARow(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids[:, -1:], -float("inf"))


class StopAtMultiplesOfSeven(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] % 7 == 0


SAMPLING = {"do_sample": True, "top_k": 30, "temperature": 1.5}
MODES = {
    "greedy": {},
    "sampling": SAMPLING,
    "several_samples": SAMPLING | {"num_return_sequences": 2},
    "beams": {"num_beams": 4},
    "beams_that_end": {
        "num_beams": 4,
        "num_return_sequences": 3,
        "eos_token_id": list(range(3, 20)),
        "length_penalty": 1.5,
        "early_stopping": True,
    },
    "sampled_beams": SAMPLING | {"num_beams": 3},
    "prefill_in_chunks": {"prefill_chunk_size": 8},
    "prefill_in_chunks_with_beams": {"prefill_chunk_size": 8, "num_beams": 2},
    "rows_that_end": {"eos_token_id": list(range(3, 20))},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
    "own_logits_processor": {"logits_processor": LogitsProcessorList([NoTokenTwiceInARow()])},
    "own_stopping_criterion": {"stopping_criteria": StoppingCriteriaList([StopAtMultiplesOfSeven()])},
}
ASSISTED = {
    "prompt_lookup": {"prompt_lookup_num_tokens": 4},
    "draft_that_is_right": {"assistant_model": "same"},
    "draft_that_is_wrong": {"assistant_model": "other"},
    "early_exit": {"assistant_early_exit": 1},
}


def over_both(family, call):
    """What `call(model, cache)` returns with a DynamicCache and with a PagedCache."""
    make_model, plain_attention = MODELS[family]
    model, results = make_model(), []
    for attention in (plain_attention, "paged_flex"):
        model.set_attn_implementation(attention)
        is_paged = attention == "paged_flex"
        kv_cache = PagedCache.from_model(model, page_size=16) if is_paged else DynamicCache(config=model.config)
        torch.manual_seed(0)
        results.append(call(model, kv_cache))
    kv_cache.pool.check_integrity()
    return results


def generate(model, kv_cache, ids, mask, **arguments):
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": NUM_NEW}
    return model.generate(ids, attention_mask=mask, past_key_values=kv_cache, **(settings | arguments))


def ids_for(mask, seed=0):
    return random_ids(len(mask), mask.shape[1], seed)


def assert_same(expected, actual):
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(actual.scores, expected.scores, **CLOSE)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("family", "batch"), CASES)
def test_tokens_and_scores_are_the_same(family, batch, mode):
    mask = BATCHES[batch]
    arguments = MODES[mode] | {"return_dict_in_generate": True, "output_scores": True}
    assert_same(*over_both(family, lambda model, kv: generate(model, kv, ids_for(mask), mask, **arguments)))


@pytest.mark.parametrize("mode", ["greedy", "several_samples", "beams"])
@pytest.mark.parametrize(("family", "batch"), CASES)
def test_embeddings_may_stand_for_the_prompt(family, batch, mode):
    mask = BATCHES[batch]

    def call(model, kv_cache):
        embeddings = model.get_input_embeddings()(ids_for(mask)).detach()
        return generate(model, kv_cache, None, mask, inputs_embeds=embeddings, **MODES[mode])

    expected, actual = over_both(family, call)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("mode", ["greedy", "prefill_in_chunks", "rows_that_end"])
@pytest.mark.parametrize(("family", "batch"), CASES)
def test_a_conversation_goes_on_with_the_same_cache(family, batch, mode):
    def call(model, kv_cache):
        mask, ids = BATCHES[batch], ids_for(BATCHES[batch])
        for turn in range(3):
            ids = generate(model, kv_cache, ids, mask, **MODES[mode])
            said = random_ids(len(ids), 7, seed=turn + 1)
            mask = torch.cat([mask, torch.ones(len(ids), ids.shape[1] + 7 - mask.shape[1], dtype=torch.long)], dim=1)
            ids = torch.cat([ids, said], dim=1)
        return ids

    expected, actual = over_both(family, call)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(("family", "batch"), CASES)
def test_only_the_new_tokens_may_be_given_when_a_conversation_goes_on(family, batch):
    mask = BATCHES[batch]
    longer = torch.cat([mask, torch.ones(len(mask), NUM_NEW + 7, dtype=torch.long)], dim=1)

    def call(model, kv_cache):
        said = generate(model, kv_cache, ids_for(mask), mask)
        new = torch.cat([said[:, -1:], random_ids(len(mask), 7, seed=1)], dim=1)
        return generate(model, kv_cache, new, longer)

    expected, actual = over_both(family, call)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("family", "mode", "sampling"),
    [*(("gemma2", mode, {}) for mode in ASSISTED), ("llama", "draft_that_is_wrong", SAMPLING)],
    ids=lambda value: "sampling" if value is SAMPLING else None,
)
def test_assisted_decoding_gives_the_same_tokens(family, mode, sampling):
    mask = BATCHES["one_row"]
    ids = random_ids(1, 7).repeat(1, 3)  # with something to look up

    def call(model, kv_cache):
        arguments = dict(ASSISTED[mode])
        if "assistant_model" in arguments:
            arguments["assistant_model"] = copy.deepcopy(model) if arguments["assistant_model"] == "same" else other
        return generate(model, kv_cache, ids, mask, max_new_tokens=30, **arguments, **sampling)

    other = tiny_llama(num_layers=1)
    expected, actual = over_both(family, call)
    assert torch.equal(actual, expected)
    if not sampling:
        greedy, _ = over_both(family, lambda model, kv_cache: generate(model, kv_cache, ids, mask, max_new_tokens=30))
        assert torch.equal(actual, greedy)


def test_what_is_returned_beside_the_tokens_is_the_same():
    mask = BATCHES["ragged"]
    wanted = dict.fromkeys(("return_dict_in_generate", "output_logits", "output_hidden_states"), True)
    expected, actual = over_both("gemma2", lambda model, kv: generate(model, kv, ids_for(mask), mask, **wanted))
    torch.testing.assert_close(actual.logits, expected.logits, **CLOSE)
    assert isinstance(actual.past_key_values, PagedCache)
    for step, others in zip(actual.hidden_states, expected.hidden_states, strict=True):
        real = mask.bool() if step[0].shape[1] > 1 else torch.ones(len(mask), 1, dtype=torch.bool)
        for layer, other in zip(step, others, strict=True):
            torch.testing.assert_close(layer[real], other[real], **CLOSE)


def test_attention_weights_are_returned_by_the_attention_that_has_them():
    model, mask = tiny_llama(), BATCHES["equal"]
    wanted = {"return_dict_in_generate": True, "output_attentions": True}
    model.set_attn_implementation("eager")
    expected = generate(model, DynamicCache(config=model.config), ids_for(mask), mask, **wanted).attentions
    actual = generate(model, PagedCache.from_model(model, page_size=16), ids_for(mask), mask, **wanted).attentions
    assert [len(step) for step in expected] == [2] * NUM_NEW
    torch.testing.assert_close(actual, expected, **CLOSE)
    model.set_attn_implementation("paged_flex")
    with pytest.raises(ValueError, match=r"never has the attention weights at hand.*eager"):
        generate(model, PagedCache.from_model(model, page_size=16), ids_for(mask), mask, **wanted)


def test_a_row_may_leave_its_first_page_of_the_default_size_with_a_window():
    model, ids, mask = MODELS["mistral"][0](), random_ids(2, 122), left_padded(122, [122, 90])
    expected = generate(model, DynamicCache(config=model.config), ids, mask)
    model.set_attn_implementation("paged_flex")
    assert torch.equal(generate(model, PagedCache.from_model(model), ids, mask), expected)


@pytest.mark.parametrize("batch", ["one_row", "ragged"])
@pytest.mark.parametrize("kind", [None, "static"])
@pytest.mark.parametrize("family", MODELS)
def test_paged_flex_without_a_paged_cache_generates_the_same(family, kind, batch):
    make_model, plain_attention = MODELS[family]
    model, mask = make_model(), BATCHES[batch]
    model.set_attn_implementation(plain_attention)
    expected = generate(model, None, ids_for(mask), mask, cache_implementation=kind)
    model.set_attn_implementation("paged_flex")
    assert torch.equal(generate(model, None, ids_for(mask), mask, cache_implementation=kind), expected)


@pytest.mark.parametrize("assisted", [{}, ASSISTED["prompt_lookup"]], ids=["greedy", "prompt_lookup"])
def test_a_streamer_is_given_every_token(assisted):
    class Collector(BaseStreamer):
        def __init__(self):
            self.tokens, self.has_ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.has_ended = True

    def call(model, kv_cache):
        streamer = Collector()
        tokens = generate(
            model, kv_cache, ids_for(BATCHES["one_row"]), BATCHES["one_row"], streamer=streamer, **assisted
        )
        assert streamer.has_ended
        assert streamer.tokens == tokens[0].tolist()
        return tokens

    expected, actual = over_both("llama", call)
    assert torch.equal(actual, expected)


def test_a_decoding_loop_of_ones_own_is_run():
    def loop(model, input_ids, generation_config, **kwargs):
        while input_ids.shape[1] < generation_config.max_length:
            kv_cache = kwargs[CACHE]
            output = model(input_ids[:, kv_cache.get_seq_length() :], past_key_values=kv_cache)
            input_ids = torch.cat([input_ids, output.logits[:, -1:].argmax(-1)], dim=1)
        return input_ids

    mask = BATCHES["equal"]
    expected, actual = over_both(
        "llama", lambda model, kv: generate(model, kv, ids_for(mask), mask, custom_generate=loop)
    )
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_inference_mode_changes_nothing(mode):
    def call(model, kv_cache):
        with torch.inference_mode():
            return generate(model, kv_cache, ids_for(BATCHES["ragged"]), BATCHES["ragged"], **MODES[mode])

    expected, actual = over_both("gemma2", call)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_4d_mask_made_by_hand_is_respected(family, dtype):
    ids = random_ids(2, 30)
    seen = torch.tril(torch.ones(30, 30, dtype=torch.bool)).repeat(2, 1, 1, 1)
    seen[0, :, 9:, 4:7] = False
    mask = seen if dtype == torch.bool else torch.where(seen, 0.0, torch.finfo(dtype).min)

    @torch.no_grad()
    def call(model, kv_cache):
        logits, start = [], 0
        for size in (20, 1, 1, 8):
            stop = start + size
            rows = mask[:, :, start:stop, :stop]
            logits.append(model(ids[:, start:stop], past_key_values=kv_cache, attention_mask=rows).logits)
            start = stop
        return torch.cat(logits, dim=1)

    expected, actual = over_both(family, call)
    torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize(("family", "batch"), CASES)
def test_candidates_are_tried_kept_and_taken_back_as_in_contrastive_search(family, batch):
    mask, num_candidates = BATCHES[batch], 4
    num_rows = len(mask)

    @torch.no_grad()
    def call(model, kv_cache):
        def forward(new, mask):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
            return model(new, past_key_values=kv_cache, attention_mask=mask, position_ids=positions).logits[:, -1]

        kv_cache.activate_past_recording()
        logits, now = [forward(ids_for(mask), mask)], mask
        for step in range(6):
            now = torch.cat([now, torch.ones(num_rows, 1, dtype=torch.long)], dim=1)
            candidates = logits[-1].topk(num_candidates).indices.reshape(-1, 1)
            kv_cache.batch_repeat_interleave(num_candidates)
            tried = forward(candidates, now.repeat_interleave(num_candidates, dim=0))
            chosen = torch.arange(num_rows) * num_candidates + step % num_candidates
            kv_cache.batch_select_indices(chosen)
            logits.append(tried[chosen])
        kv_cache.crop(-3)
        return torch.stack([*logits, forward(ids_for(mask, seed=1)[:, :5], torch.cat([now, now[:, -2:]], dim=1))])

    expected, actual = over_both(family, call)
    torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize("mode", ["greedy", "several_samples"])
def test_a_prompt_read_once_is_copied_for_each_question(mode):
    prompt = random_ids(1, 20)

    def call(model, kv_cache):
        with torch.no_grad():
            kv_cache = model(prompt, past_key_values=kv_cache).past_key_values
        answers = []
        for seed, length in enumerate((1, 12, 13)):
            ids = torch.cat([prompt, random_ids(1, length, seed=seed + 1)], dim=1)
            copied = copy.deepcopy(kv_cache)
            if mode == "several_samples":
                copied.batch_repeat_interleave(2)
            answers.append(generate(model, copied, ids, torch.ones_like(ids), **MODES[mode]))
        return answers

    expected, actual = over_both("gemma2", call)
    assert all(torch.equal(answer, other) for answer, other in zip(actual, expected, strict=True))


def test_a_pipeline_hands_the_cache_on():
    tokenizer, text = letter_tokenizer(), "paging is an old idea in operating systems"

    def call(model, kv_cache):
        generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
        settings = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": None, "return_tensors": True}
        (answer,) = generator(text, past_key_values=kv_cache, **settings)
        assert kv_cache.get_seq_length() == len(text) + 23
        return answer["generated_token_ids"]

    expected, actual = over_both("llama", call)
    assert actual == expected
