"""Choices are scored as by a plain forward pass over each context and choice, and each context is computed once."""

import functools
import random

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

import hf_paged
from hf_paged import OutOfPagesError, PagePool, score_choices
from hf_paged.attention.dispatch import Backend
from hf_paged.batch.prompt.packed_prompt import PackedPrompt
from hf_paged.errors import NotPackable
from tests.models import tiny_gemma, tiny_llama, tiny_model

WINDOW = 24
LENGTHS = (1, 15, 16, 17, 50, 33)


@functools.cache
def llama() -> PreTrainedModel:
    return tiny_llama()


@functools.cache
def mistral() -> PreTrainedModel:
    return tiny_model(MistralForCausalLM, MistralConfig, sliding_window=WINDOW)


@functools.cache
def gemma3() -> PreTrainedModel:
    return tiny_gemma(WINDOW)


@functools.cache
def gemma2() -> PreTrainedModel:
    """A model that caps its logits."""
    return tiny_model(Gemma2ForCausalLM, Gemma2Config, sliding_window=WINDOW, final_logit_softcapping=5.0)


MODELS = pytest.mark.parametrize("load", [llama, mistral, gemma3, gemma2])


def tokens(generator: random.Random, length: int) -> list[int]:
    return [generator.randrange(3, 200) for _ in range(length)]


def questions() -> tuple[list[list[int]], list[list[list[int]]]]:
    """Contexts on both sides of page edges, one of them twice, and choices of one token, ragged, equal, and none."""
    generator = random.Random(0)
    contexts = [tokens(generator, length) for length in LENGTHS]
    choices = [[tokens(generator, generator.randrange(1, 40)) for _ in range(4)] for _ in contexts]
    choices[2] = [tokens(generator, 1) for _ in range(4)]
    choices[3].append(choices[3][0])
    choices[5] = []
    return [*contexts, contexts[4]], [*choices, choices[4]]


@torch.no_grad()
def plain_score(model: PreTrainedModel, context: list[int], choice: list[int]) -> tuple[float, bool]:
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    logits = model(torch.tensor([context + choice])).logits[0, len(context) - 1 : -1]
    expected = torch.tensor(choice)
    total = logits.log_softmax(-1).gather(1, expected[:, None]).double().sum()
    return float(total), bool((logits.argmax(-1) == expected).all())


@functools.cache
def plain_scores(load) -> list[list[tuple[float, bool]]]:
    return [
        [plain_score(load(), context, choice) for choice in own] for context, own in zip(*questions(), strict=True)
    ]


def paged(model: PreTrainedModel) -> PreTrainedModel:
    model.set_attn_implementation("paged_flex")
    return model


def assert_plain(scores, load) -> None:
    for own, expected in zip(scores, plain_scores(load), strict=True):
        assert [score.log_probability for score in own] == pytest.approx([one for one, _ in expected], rel=1e-6)
        assert [score.is_greedy for score in own] == [greedy for _, greedy in expected]


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """Tokens of each pass."""
    counts: list[int] = []
    begin = PackedPrompt.begin

    def counting(self, first, num_queries):
        chunk = begin(self, first, num_queries)
        counts.append(len(chunk.ids))
        return chunk

    monkeypatch.setattr(PackedPrompt, "begin", counting)
    return counts


@MODELS
@pytest.mark.parametrize("max_tokens", [None, 7, 64])
@pytest.mark.parametrize("pool", ["own", "few pages", "with an index"])
def test_scores_are_those_of_a_plain_pass_over_context_and_choice(load, pool, max_tokens):
    expected = plain_scores(load)
    model = paged(load())
    pools = {
        "own": None,
        "few pages": PagePool.from_model(model, 9, page_size=16),
        "with an index": PagePool.from_model(model, 30, page_size=16, prefix_cache=True),
    }
    contexts, choices = questions()
    scores = score_choices(model, contexts, choices, pools[pool], max_tokens=max_tokens)
    assert [len(own) for own in scores] == [len(own) for own in expected]
    assert_plain(scores, load)
    if pools[pool] is not None:
        assert pools[pool].stats().num_active_pages == 0
        pools[pool].check_integrity()


def test_scores_are_the_same_where_block_lists_are_read_as_on_a_gpu(monkeypatch):
    plain_scores(llama)
    monkeypatch.setattr("hf_paged.attention.dispatch.choose_backend", lambda *_: Backend.FLEX)
    assert_plain(score_choices(paged(llama()), *questions()), llama)


def test_the_greedy_choice_is_greedy_and_another_is_not():
    context = tokens(random.Random(1), 20)
    model = paged(llama())
    greedy = model.generate(torch.tensor([context]), max_new_tokens=5, do_sample=False, eos_token_id=None)
    greedy = greedy[0, len(context) :].tolist()
    other = [*greedy[:4], greedy[4] - 1]
    assert [score.is_greedy for score in score_choices(model, [context], [[greedy, other, greedy[:1]]])[0]] == [
        True,
        False,
        True,
    ]


def test_a_context_is_computed_once_and_choices_without_padding(computed):
    generator = random.Random(0)
    choices = [tokens(generator, length) for length in (8, 3, 1, 8)]
    score_choices(paged(llama()), [tokens(generator, 50)], [choices])
    assert computed == [49, 8 + 3 + 1 + 8]


def test_choices_of_one_token_take_one_token_for_all_of_them(computed):
    generator = random.Random(0)
    score_choices(paged(llama()), [tokens(generator, 50)], [[[token] for token in range(5, 15)]])
    assert computed == [49, 1]


def test_equal_contexts_and_equal_choices_are_computed_once(computed):
    generator = random.Random(0)
    context, choice = tokens(generator, 50), tokens(generator, 8)
    first, second = score_choices(paged(llama()), [context, context], [[choice, choice], [choice]])
    assert computed == [49, 8]
    assert first == second * 2


def test_a_context_without_choices_is_not_computed(computed):
    assert score_choices(paged(llama()), [[5, 6, 7], [8, 9]], [[], []]) == [[], []]
    assert computed == []


def test_a_pass_has_no_more_logits_than_it_may(computed, monkeypatch):
    monkeypatch.setattr("hf_paged.scoring.packed_choices._LOGITS", 200 * 3)
    assert_plain(score_choices(paged(llama()), [*questions()[0]], questions()[1]), llama)
    computed.clear()
    score_choices(paged(llama()), [[5]], [[tokens(random.Random(0), 10)]])
    assert computed == [3, 3, 3, 1]


def test_an_enabled_model_finds_contexts_that_begin_alike_in_its_pool(computed):
    generator = random.Random(0)
    examples = tokens(generator, 64)
    with hf_paged.enable(tiny_llama(), page_size=16) as model:
        for _ in range(2):
            question = tokens(generator, 10)
            (found,) = score_choices(model, [examples + question], [[[7, 8], [9]]])
        assert computed == [73, 3, 9, 3]
    expected = [plain_score(model, examples + question, choice) for choice in ([7, 8], [9])]
    assert [score.log_probability for score in found] == pytest.approx([one for one, _ in expected], rel=1e-6)


def test_choices_that_do_not_fit_beside_each_other_take_turns(computed):
    generator = random.Random(0)
    context, choices = tokens(generator, 33), [tokens(generator, 16) for _ in range(4)]
    model = paged(llama())
    pool = PagePool.from_model(model, 3, page_size=16)  # two of the context, and one for a choice
    scores = score_choices(model, [context], [choices], pool)
    assert computed == [32, 16, 16, 16, 16]
    expected = [plain_score(model, context, choice)[0] for choice in choices]
    assert [score.log_probability for score in scores[0]] == pytest.approx(expected, rel=1e-6)


def test_a_context_that_does_not_fit_is_refused_and_holds_nothing():
    model = paged(llama())
    pool = PagePool.from_model(model, 3, page_size=16)
    generator = random.Random(0)
    with pytest.raises(OutOfPagesError, match=r"Context 1, of 50 tokens, does not fit .*Raise num_pages"):
        score_choices(model, [[5, 6], tokens(generator, 50)], [[[7]], [[8]]], pool)
    assert pool.stats().num_active_pages == 0
    assert score_choices(model, [[5, 6]], [[[7]]], pool)


@pytest.mark.parametrize(
    ("contexts", "choices", "message"),
    [
        ([[]], [[[1]]], "Context 0 is empty.*bos_token_id"),
        ([[1], [2]], [[[1]], [[3], []]], "Choice 1 of context 1 is empty"),
        ([[1], [2]], [[[1]]], "2 contexts were given, but choices for 1"),
        ([[1]], [[1, 2]], "Choice 0 of context 0 is 1, but it has to be a list of token ids"),
        (["text"], [[[1]]], "Context 0 is 'text', but it has to be a list"),
        ([[1.0, 2.0]], [[[1]]], "Context 0 is .*, but it has to be a list of token ids"),
    ],
)
def test_what_is_no_list_of_tokens_is_refused(contexts, choices, message):
    with pytest.raises(ValueError, match=message):
        score_choices(paged(llama()), contexts, choices)


def test_a_chunk_of_no_tokens_is_refused():
    with pytest.raises(ValueError, match="max_tokens=0"):
        score_choices(paged(llama()), [[5]], [[[6]]], max_tokens=0)


def test_another_attention_is_refused():
    model = tiny_llama()
    model.set_attn_implementation("sdpa")
    with pytest.raises(NotPackable, match=r"attn_implementation='sdpa' can't tell packed rows apart.*enable\(model\)"):
        score_choices(model, [[5, 6]], [[[7]]])


def test_a_model_with_a_hook_is_refused():
    model = paged(tiny_llama())
    model.model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(NotPackable, match="LlamaForCausalLM can't be, as a hook of tests"):
        score_choices(model, [[5]], [[[7]]])


def test_a_model_with_an_encoder_is_refused():
    config = BartConfig(vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, decoder_attention_heads=2)
    with pytest.raises(ValueError, match=r"has an encoder.*Call the model with labels"):
        score_choices(BartForConditionalGeneration(config), [[5]], [[[7]]])
