"""`custom_generate=hf_paged.sample` gives what `generate()` gives without it, over any cache.

On a CPU no pass is made ahead. That of a GPU is tried here all the same: it takes nothing of CUDA but streams.
"""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    LogitsProcessor,
    MambaConfig,
    MambaForCausalLM,
    MaxLengthCriteria,
    PreTrainedTokenizerFast,
    StaticCache,
    StoppingCriteria,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer

import hf_paged
from hf_paged import OutOfPagesError, PagedCache, PagePool, ReleaseFinished
from hf_paged.compile import api
from hf_paged.decoding import surplus
from tests.cache.test_generate_modes import BATCHES, CASES, MODELS, MODES, SAMPLING, generate, ids_for
from tests.families import ENCODER
from tests.models import left_padded, random_ids, tiny_llama

LOOP_MODES = {name: mode for name, mode in MODES.items() if "beams" not in name}
EVERYTHING = dict.fromkeys(("return_dict_in_generate", "output_scores", "output_logits", "output_hidden_states"), True)


@pytest.fixture(params=["in_time", "a_step_late"], autouse=True)
def is_late(request, monkeypatch):
    """Whether a pass is made before it is known to be needed, as on a GPU."""
    late = request.param == "a_step_late"
    monkeypatch.setattr(surplus, "runs_beside", lambda tensor: late)
    return late


def paged(model, **arguments):
    model.set_attn_implementation("paged_flex")
    return PagedCache.from_model(model, page_size=16, **arguments)


def without_and_with(model, make_cache, call):
    """What `call(cache, **loop)` returns, the cache, and the state of the generator, without the loop and with it."""
    results = []
    for loop in ({}, {"custom_generate": hf_paged.sample}):
        kv_cache = make_cache(model)
        torch.manual_seed(0)
        result = call(kv_cache, **loop)
        results.append((result, kv_cache, torch.get_rng_state()))
    return results


def assert_same(expected, actual):
    """Compare whatever `generate()` returns, bit for bit."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected)
        assert actual.is_contiguous()
    elif isinstance(expected, dict):
        assert type(actual) is type(expected)
        assert list(actual) == list(expected)
        for name in expected:
            assert_same(expected[name], actual[name])
    elif isinstance(expected, tuple):
        assert type(actual) is tuple
        for one, other in zip(expected, actual, strict=True):
            assert_same(one, other)


def assert_same_cache(expected, actual):
    assert actual.get_seq_length() == expected.get_seq_length()
    if not isinstance(expected, PagedCache):
        return
    assert actual.lengths == expected.lengths
    assert actual._sequences.records_past == expected._sequences.records_past
    assert actual._sequences.rows.known_ids._end == expected._sequences.rows.known_ids._end
    for one, other in zip(expected, actual, strict=True):
        assert_same(one[:2], other[:2])
    actual.pool.check_integrity()


def assert_loop_changes_nothing(model, make_cache, call):
    (expected, held, state), (actual, left, left_state) = without_and_with(model, make_cache, call)
    assert_same(expected, actual)
    assert_same_cache(held, left)
    assert torch.equal(state, left_state)
    return actual


@pytest.mark.parametrize("mode", LOOP_MODES)
@pytest.mark.parametrize(("family", "batch"), CASES)
def test_every_mode_gives_the_same(family, batch, mode):
    model, mask = MODELS[family][0](), BATCHES[batch]
    assert_loop_changes_nothing(
        model,
        paged,
        lambda kv, **loop: generate(model, kv, ids_for(mask), mask, **LOOP_MODES[mode], **EVERYTHING, **loop),
    )


CACHES = {
    "paged_sdpa": lambda model: PagedCache.from_model(model, page_size=16),
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=60),
    "default": lambda model: None,
}


@pytest.mark.parametrize("mode", ["greedy", "sampling", "rows_that_end"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_any_cache_will_do(family, cache, mode):
    model, mask = MODELS[family][0](), BATCHES["equal"]

    def call(kv_cache, **loop):
        return generate(model, kv_cache, ids_for(mask), mask, **LOOP_MODES[mode], **loop)

    results = without_and_with(model, CACHES[cache], call)
    assert_same(*(result[0] for result in results))
    if cache != "default":
        assert_same_cache(*(result[1] for result in results))


@pytest.mark.parametrize("mode", ["greedy", "rows_that_end"])
@pytest.mark.parametrize("wanted", [{}, EVERYTHING], ids=["tokens", "everything"])
def test_a_state_without_tokens_will_do(mode, wanted):
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=200, hidden_size=48, num_hidden_layers=2, state_size=8, initializer_range=0.3)
    model, mask = MambaForCausalLM(config).eval(), BATCHES["equal"]

    def call(kv_cache, **loop):
        said = generate(model, None, ids_for(mask), mask, **LOOP_MODES[mode], **wanted, **loop)
        return (said.sequences, said.scores, said.hidden_states) if wanted else said

    results = without_and_with(model, lambda model: None, call)
    assert_same(*(result[0] for result in results))


def test_no_cache_will_do():
    model, mask = tiny_llama(), BATCHES["ragged"]
    settings = {"use_cache": False, "eos_token_id": list(range(3, 20))}
    assert_loop_changes_nothing(
        model,
        lambda model: DynamicCache(),
        lambda kv, **loop: generate(model, None, ids_for(mask), mask, **settings, **loop),
    )


class Length(MaxLengthCriteria):
    """As Transformers' own, but of another class, so that nothing is known of it."""


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_a_pass_behind_the_end_is_taken_back_wherever_a_page_or_a_window_begins(family):
    model, mask, more = MODELS[family][0](), left_padded(21, [21, 9]), {"max_new_tokens": 40}
    for length in range(22, 40):

        def call(kv_cache, length=length, **loop):
            return generate(model, kv_cache, ids_for(mask), mask, stopping_criteria=[Length(length)], **more, **loop)

        assert assert_loop_changes_nothing(model, paged, call).shape[1] == length


@pytest.mark.parametrize("max_new_tokens", [1, 2])
def test_few_tokens_may_be_wanted(max_new_tokens):
    model, mask = tiny_llama(), BATCHES["ragged"]
    assert_loop_changes_nothing(
        model,
        paged,
        lambda kv, **loop: generate(model, kv, ids_for(mask), mask, max_new_tokens=max_new_tokens, **loop),
    )


@pytest.mark.parametrize("mode", ["greedy", "several_samples"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_embeddings_may_stand_for_the_prompt(family, mode):
    model, mask = MODELS[family][0](), BATCHES["ragged"]

    def call(kv_cache, **loop):
        embeddings = model.get_input_embeddings()(ids_for(mask)).detach()
        return generate(model, kv_cache, None, mask, inputs_embeds=embeddings, **LOOP_MODES[mode], **loop)

    assert_loop_changes_nothing(model, paged, call)


@pytest.mark.parametrize("mode", ["greedy", "prefill_in_chunks", "rows_that_end"])
@pytest.mark.parametrize(("family", "batch"), CASES)
def test_a_conversation_goes_on(family, batch, mode):
    model = MODELS[family][0]()

    def call(kv_cache, **loop):
        mask, ids = BATCHES[batch], ids_for(BATCHES[batch])
        for turn in range(3):
            ids = generate(model, kv_cache, ids, mask, **LOOP_MODES[mode], **loop)
            more = left_padded(7, [7, 3, 1][: len(ids)])
            new = torch.ones(len(ids), ids.shape[1] - mask.shape[1], dtype=torch.long)
            mask = torch.cat([mask, new, more], dim=1)
            ids = torch.cat([ids, random_ids(len(ids), 7, seed=turn + 1)], dim=1)
        return ids

    assert_loop_changes_nothing(model, paged, call)


def test_tokens_that_are_hidden_in_a_later_turn_stay_hidden():
    model, ids = tiny_llama(), random_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[1, 5:9] = 0

    def call(kv_cache, **loop):
        generate(model, kv_cache, ids[:, :21], torch.ones(2, 21, dtype=torch.long), max_new_tokens=1)
        return generate(model, kv_cache, ids, mask, **loop)

    assert_loop_changes_nothing(model, paged, call)


def test_inference_mode_changes_nothing():
    model, mask = tiny_llama(), BATCHES["ragged"]

    def call(kv_cache, **loop):
        with torch.inference_mode():
            return generate(model, kv_cache, ids_for(mask), mask, eos_token_id=list(range(3, 20)), **loop)

    assert_loop_changes_nothing(model, paged, call)


def test_attention_weights_are_returned():
    model, mask = tiny_llama(), BATCHES["equal"]
    model.set_attn_implementation("eager")
    wanted = {"return_dict_in_generate": True, "output_attentions": True}
    assert_loop_changes_nothing(
        model,
        lambda model: PagedCache.from_model(model, page_size=16),
        lambda kv, **loop: generate(model, kv, ids_for(mask), mask, **wanted, **loop),
    )


class Collector(BaseStreamer):
    def __init__(self, fails_at=None):
        self.given, self.fails_at = [], fails_at

    def put(self, value):
        self.given.append(value.tolist())
        if len(self.given) == self.fails_at:
            raise RuntimeError("nobody listens")

    def end(self):
        self.given.append("end")


@pytest.mark.parametrize("length", [22, 27, 60], ids="ends_with_{}".format)
def test_a_streamer_is_given_each_token_once_and_in_order(length):
    model, ids = tiny_llama(), random_ids(1, 21)

    def call(kv_cache, **loop):
        streamer = Collector()
        settings = {"streamer": streamer, "stopping_criteria": [Length(length)]}
        tokens = generate(model, kv_cache, ids, torch.ones_like(ids), **settings, **loop)
        assert streamer.given == [tokens[:, :21].tolist(), *([token] for token in tokens[0, 21:].tolist()), "end"]
        return tokens

    assert_loop_changes_nothing(model, paged, call)


class Asked(StoppingCriteria):
    """Ends rows by their values, and remembers all that it is asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, input_ids, scores, **kwargs):
        self.asked.append((input_ids.clone(), scores))
        return torch.tensor([row[-1] % 7 == 0 for row in input_ids.tolist()])


class Penalty(LogitsProcessor):
    """Changes scores in place, and remembers all that it is given."""

    def __init__(self):
        self.given = []

    def __call__(self, input_ids, scores):
        self.given.append((input_ids.clone(), scores.clone()))
        return scores.scatter_(1, input_ids[:, -1:], -float("inf"))


@pytest.mark.parametrize("sampling", [{}, SAMPLING], ids=["greedy", "sampling"])
def test_criteria_and_processors_of_ones_own_are_asked_the_same(sampling):
    model, mask = tiny_llama(), BATCHES["ragged"]

    def call(kv_cache, **loop):
        criterion, processor = Asked(), Penalty()
        settings = {"stopping_criteria": [criterion], "logits_processor": [processor], "eos_token_id": 199}
        said = generate(
            model, kv_cache, ids_for(mask), mask, max_new_tokens=60, **settings, **EVERYTHING, **sampling, **loop
        )
        assert said.sequences.shape[1] < 81
        return said.sequences, said.scores, said.logits, tuple(criterion.asked), tuple(processor.given)

    assert_loop_changes_nothing(model, paged, call)


def test_a_stop_string_ends_a_row():
    tokenizer = Tokenizer(BPE({chr(33 + index): index for index in range(93)}, []))
    tokenizer.decoder = Fuse()
    letters = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    model, mask = MODELS["llama"][0](), BATCHES["ragged"]
    ids = ids_for(mask)
    new = generate(model, None, ids, mask, max_new_tokens=40)[0, 21:].tolist()
    stop = next(token for at, token in enumerate(new) if at > 3 and token < 93 and token not in new[:at])
    criterion = StopStringCriteria(letters, [letters.decode([stop])])
    settings = {"stopping_criteria": [criterion], "max_new_tokens": 40, "eos_token_id": 199}
    said = assert_loop_changes_nothing(
        model, paged, lambda kv, **loop: generate(model, kv, ids, mask, **settings, **loop)
    )
    assert said[0, 21:].tolist().index(stop) == new.index(stop)
    assert (said[0, 22 + new.index(stop) :] == 0).all()


@pytest.mark.parametrize("criteria", [None, [Length(30)]], ids=["eos", "own"])
def test_finished_rows_are_released(criteria):
    model, mask = tiny_llama(), BATCHES["ragged"]
    eos = list(range(3, 40))

    def call(kv_cache, **loop):
        settings = {"eos_token_id": eos, "stopping_criteria": [ReleaseFinished(kv_cache, eos, criteria)]}
        return generate(model, kv_cache, ids_for(mask), mask, max_new_tokens=30, **settings, **loop)

    (expected, held, _), (actual, left, _) = without_and_with(model, paged, call)
    assert_same(expected, actual)
    assert left.lengths == held.lengths
    assert 0 in left.lengths
    left.pool.check_integrity()


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_a_row_that_is_released_takes_no_token_from_the_window_of_another(family):
    model, mask = MODELS[family][0](), left_padded(21, [21, 20])
    eos = list(range(3, 20))
    for length in range(38, 60, 2):

        def call(kv_cache, length=length, **loop):
            settings = {"stopping_criteria": [ReleaseFinished(kv_cache, eos), Length(length)], "eos_token_id": eos}
            return generate(model, kv_cache, ids_for(mask), mask, max_new_tokens=60, **settings, **loop)

        (expected, held, _), (actual, left, _) = without_and_with(model, paged, call)
        assert_same(expected, actual)
        assert left.lengths == held.lengths
        left.pool.check_integrity()


@pytest.mark.parametrize("mode", ["greedy", "sampling", "rows_that_end", "own_stopping_criterion"])
@pytest.mark.parametrize("make_cache", [paged, lambda model: None], ids=["paged", "default"])
def test_encoder_decoders_do_it_too(make_cache, mode):
    torch.manual_seed(0)
    sizes = {**ENCODER, "vocab_size": 200, "pad_token_id": 0, "eos_token_id": 1, "forced_eos_token_id": None}
    model = BartForConditionalGeneration(BartConfig(**sizes)).eval()
    mask = BATCHES["ragged"].flip(1)
    assert_loop_changes = without_and_with(
        model,
        make_cache,
        lambda kv, **loop: generate(model, kv, ids_for(mask), mask, **LOOP_MODES[mode], **EVERYTHING, **loop),
    )
    (expected, held, _), (actual, left, _) = assert_loop_changes
    for name in ("sequences", "scores", "logits", "decoder_hidden_states", "encoder_last_hidden_state"):
        assert_same(expected.get(name), actual.get(name))
    if held is not None:
        assert left.lengths == held.lengths
        left.pool.check_integrity()


@pytest.mark.parametrize("batch", ["one_row", "ragged"])
def test_compiled_steps_do_it_too(batch, monkeypatch):
    monkeypatch.setattr(api, "compile_graph", lambda graph, *arguments: graph)
    model, mask = tiny_llama(), BATCHES[batch]
    settings = SAMPLING | {"eos_token_id": list(range(3, 10))}
    model.set_attn_implementation("paged_flex")
    with hf_paged.compiled(model):
        assert_loop_changes_nothing(
            model, paged, lambda kv, **loop: generate(model, kv, ids_for(mask), mask, **settings, **loop)
        )


@pytest.mark.parametrize("batch", ["equal", "ragged"])
def test_keys_that_are_taken_out_in_between_are_missing_from_the_next_pass_on(batch):
    model, mask = tiny_llama(), BATCHES[batch]

    def call(kv_cache, **loop):
        def forget_the_first_columns(input_ids, scores):
            if input_ids.shape[1] == 21 + 5:
                for layer in kv_cache.layers:
                    keys, values = layer.keys, layer.values
                    layer.keys, layer.values = keys[:, :, 8:].clone(), values[:, :, 8:].clone()
            return scores

        criteria = {"stopping_criteria": [Length(29)], "logits_processor": [forget_the_first_columns]}
        if batch == "equal":
            return generate(model, kv_cache, ids_for(mask), mask, max_new_tokens=40, **criteria, **loop)
        with pytest.raises(ValueError, match="attention_mask has shape") as caught:
            generate(model, kv_cache, ids_for(mask), mask, max_new_tokens=40, **criteria, **loop)
        return torch.tensor(list(str(caught.value).encode()))

    (expected, *_), (actual, *_) = without_and_with(model, paged, call)
    assert_same(expected, actual)


# What goes wrong


def fails_at(call_number):
    calls = []

    def processor(input_ids, scores):
        calls.append(1)
        if len(calls) == call_number:
            raise RuntimeError("nobody listens")
        return scores

    return processor


def criterion_that_fails(input_ids, scores, **kwargs):
    if input_ids.shape[1] == 21 + 4:
        raise RuntimeError("nobody listens")
    return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize(
    "failing",
    [
        lambda: {"streamer": Collector(fails_at=4)},
        lambda: {"logits_processor": [fails_at(4)]},
        lambda: {"stopping_criteria": [criterion_that_fails]},
    ],
    ids=["streamer", "processor", "criterion"],
)
def test_what_fails_in_between_leaves_the_cache_as_generate_does(family, failing):
    model, ids = MODELS[family][0](), random_ids(1, 21)

    def call(kv_cache, **loop):
        with pytest.raises(RuntimeError, match="nobody listens"):
            generate(model, kv_cache, ids, torch.ones_like(ids), **failing(), **loop)
        held = kv_cache.get_seq_length()
        known = kv_cache._sequences.rows.known_ids
        assert known._end == held
        longer = torch.cat([known._ids[:, :held], random_ids(1, 20, seed=5)], dim=1)
        return torch.tensor([held]), generate(model, kv_cache, longer, torch.ones_like(longer), **loop)

    assert_loop_changes_nothing(model, paged, call)


@pytest.mark.parametrize("num_rows", [1, 2])
def test_pages_may_be_out_once_all_rows_have_ended(num_rows):
    model, ids = tiny_llama(), random_ids(num_rows, 21)
    criteria = {"stopping_criteria": [Length(33)]}  # 32 columns are cached, which fill two pages

    def call(kv_cache, **loop):
        said = generate(model, kv_cache, ids, torch.ones_like(ids), **criteria, max_new_tokens=40, **loop)
        with pytest.raises(OutOfPagesError, match="more page"):
            generate(model, kv_cache, torch.cat([said, said[:, :5]], dim=1), torch.ones(num_rows, 38), **loop)
        return said

    model.set_attn_implementation("paged_flex")
    assert_loop_changes_nothing(
        model, lambda model: PagedCache(pool=PagePool(model.config, num_pages=2 * num_rows, page_size=16)), call
    )


def test_rows_that_are_released_make_room_for_the_next_pass():
    model, mask = tiny_llama(), torch.ones(2, 21, dtype=torch.long)
    ids = random_ids(2, 21)
    new = generate(model, DynamicCache(config=model.config), ids, mask, max_new_tokens=40)[:, 21:].tolist()
    eos = new[0][11]  # the 33rd token of the row, which the next pass needs a third page for
    assert eos not in new[0][:11] + new[1]

    def call(kv_cache, **loop):
        settings = {"eos_token_id": eos, "stopping_criteria": [ReleaseFinished(kv_cache, eos)]}
        return generate(model, kv_cache, ids, mask, max_new_tokens=40, **settings, **loop)

    model.set_attn_implementation("paged_flex")
    assert_loop_changes_nothing(
        model, lambda model: PagedCache(pool=PagePool(model.config, num_pages=4, page_size=16)), call
    )


def test_pages_that_are_out_before_all_rows_have_ended_are_told(is_late):
    model, ids = tiny_llama(), random_ids(2, 21)
    model.set_attn_implementation("paged_flex")

    def call(kv_cache, **loop):
        streamer = Collector()
        with pytest.raises(OutOfPagesError, match="more page"):
            generate(model, kv_cache, ids, torch.ones_like(ids), streamer=streamer, max_new_tokens=40, **loop)
        return torch.tensor(streamer.given[1:])

    assert_loop_changes_nothing(
        model, lambda model: PagedCache(pool=PagePool(model.config, num_pages=4, page_size=16)), call
    )


def test_a_static_cache_that_is_full_when_the_last_row_ends_is_not_asked_for_more():
    model, ids = tiny_llama(), random_ids(1, 21)
    model.set_attn_implementation("sdpa")
    settings = {"stopping_criteria": [Length(33)], "max_new_tokens": 40}
    results = without_and_with(
        model,
        lambda model: StaticCache(config=model.config, max_cache_len=32),
        lambda kv, **loop: generate(model, kv, ids, torch.ones_like(ids), **settings, **loop),
    )
    assert_same(*(result[0] for result in results))


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ({"num_beams": 2}, "asks for beam search. Leave out num_beams"),
        ({"num_beams": 2, "do_sample": True}, "asks for beam sample. Leave out num_beams"),
        ({"prompt_lookup_num_tokens": 3}, "asks for assisted generation. Leave out assistant_model"),
        ({"assistant_model": tiny_llama}, "asks for assisted generation. Leave out assistant_model"),
        ({"synced_gpus": True}, "asked for synced_gpus=True"),
    ],
    ids=["beams", "sampled beams", "lookup", "draft", "several processes"],
)
def test_what_it_can_not_do_is_refused_before_anything_is_computed(mode, message):
    model, ids = tiny_llama(), random_ids(1, 21)
    mode = {name: value() if callable(value) else value for name, value in mode.items()}
    kv_cache = paged(model)
    with pytest.raises(ValueError, match=message):
        generate(model, kv_cache, ids, torch.ones_like(ids), custom_generate=hf_paged.sample, **mode)
    assert kv_cache.get_seq_length() == 0
