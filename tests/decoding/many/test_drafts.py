"""Drafts within a batch whose rows come and go change nothing but the number of steps."""

import copy

import numpy as np
import pytest
import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig, LogitsProcessor

import hf_paged
from hf_paged import PagedCache, PagePool
from hf_paged.decoding.many.drafts import decoded
from hf_paged.decoding.speculate.assistant import Assisted
from hf_paged.decoding.speculate.budget import Budget
from tests.cache.test_latents import deepseek
from tests.decoding.many.test_answers import EOS, alone, answers, random_prompts
from tests.decoding.speculate.drafting import draft_whatever_there_is
from tests.models import tiny_gemma, tiny_model


class NoneTwice(LogitsProcessor):
    """Has no token come twice in a row; remembers what it was given, as it may be given each token once only."""

    def __init__(self):
        self.lengths = []

    def __call__(self, input_ids, scores):
        self.lengths.append(input_ids.shape[1])
        assert self.lengths == list(range(self.lengths[0], self.lengths[0] + len(self.lengths)))
        scores = scores.clone()
        scores[0, input_ids[0, -1]] = -torch.inf
        return scores


def own_settings(prompts):
    """Let prompts end with what repeats, and be answered each in a way of its own."""
    ways = [
        {},
        {"do_sample": True, "temperature": 0.3},
        {"repetition_penalty": 1.2},
        {"do_sample": True, "top_k": 20, "no_repeat_ngram_size": 2},
    ]
    for index, prompt in enumerate(prompts):
        prompt["input_ids"] += [7, 8, 9] * 4
        prompt |= ways[index % len(ways)]
        if "do_sample" in prompt:
            prompt["seed"] = index
        elif index % 8 == 0:
            prompt["logits_processor"] = [NoneTwice()]
    return prompts


def prompts():
    return own_settings(random_prompts(16, most=50, seed=3))


@pytest.fixture(scope="module")
def model():
    model = tiny_gemma(window=7)
    model.set_attn_implementation("paged_flex")
    return model


@pytest.fixture(scope="module")
def expected(model):
    return [alone(model, prompt, eos_token_id=EOS) for prompt in prompts()]


@pytest.fixture(scope="module")
def num_steps(model):
    pools = {num_pages: PagePool.from_model(model, num_pages, page_size=16) for num_pages in (None, 12)}
    settings = {"max_rows": 4, "eos_token_id": EOS}
    return {
        num_pages: answers(model, prompts(), pool=pool, **settings)[1].num_steps for num_pages, pool in pools.items()
    }


def other(model):
    """A copy with other weights."""
    draft = copy.deepcopy(model)
    torch.manual_seed(1)
    for weight in draft.parameters():
        weight.data = torch.randn_like(weight) * 0.3
    return draft


class Pools:
    """The pools of draft models."""

    def __init__(self, monkeypatch):
        self.made = []
        make = decoded.growing_pool
        monkeypatch.setattr(
            decoded, "growing_pool", lambda *arguments: self.made.append(make(*arguments)) or self.made[-1]
        )

    def assert_hold_nothing(self):
        for pool in self.made:
            pool.check_integrity()
            assert pool.num_pages == 0


@pytest.fixture
def pools(monkeypatch):
    pools = Pools(monkeypatch)
    yield pools
    pools.assert_hold_nothing()


DRAFTS = {
    "looked_up": (lambda model: hf_paged.prompt_lookup(), 0.8),
    "right": (lambda model: hf_paged.assisted(model), 0.6),
    "wrong": (lambda model: hf_paged.assisted(other(model)), 1.1),
}


@pytest.mark.parametrize(
    ("drafts", "num_pages"),
    [("looked_up", None), ("looked_up", 12), ("right", 12), ("wrong", None)],
)
def test_drafts_change_nothing_but_the_number_of_steps(
    drafts, num_pages, model, expected, num_steps, pools, monkeypatch
):
    draft_whatever_there_is(monkeypatch)
    make, share = DRAFTS[drafts]
    pool = PagePool.from_model(model, num_pages, page_size=16)
    settings = {"max_rows": 4, "eos_token_id": EOS, "pool": pool, "custom_generate": make(model)}
    found, stats = answers(model, prompts(), **settings)
    assert found == expected
    assert stats.num_steps < share * num_steps[num_pages]
    assert (stats.num_preempted > 0) == (num_pages is not None)


def test_a_draft_model_that_is_never_right_is_hardly_asked(model, pools, monkeypatch):
    monkeypatch.setattr(Assisted, "cost", lambda self, model: 0.05)
    draft, passes = copy.deepcopy(model), []
    draft.lm_head.register_forward_hook(lambda module, args, scores: scores.roll(1, -1))
    draft.register_forward_hook(lambda *_: passes.append(1))
    prompts = [prompt["input_ids"] for prompt in random_prompts(12)]
    settings = {"max_rows": 4, "eos_token_id": None, "max_new_tokens": 60}
    _, stats = answers(model, prompts, custom_generate=hf_paged.assisted(draft), **settings)
    assert 0 < len(passes) < 0.3 * stats.num_steps


def test_a_row_without_drafts_for_a_while_is_caught_up_with(model, expected, pools, monkeypatch):
    turns = []

    def choose(self, available, is_going):  # other rows in each step, and none in some
        turns.append(1)
        wanted = (np.arange(len(available)) + len(turns) // 7) % 3 == 0
        return np.where(wanted, np.minimum(available, self.max_drafted), 0)

    monkeypatch.setattr(Budget, "choose", choose)
    settings = {"max_rows": 4, "eos_token_id": EOS, "custom_generate": hf_paged.assisted(model)}
    asked = []
    ahead = decoded.Ahead

    class Watched(ahead):
        def go_on(self, counts, choose):
            tokens = super().go_on(counts, choose)
            asked.append((list(self._text._rows), self._begins, tokens, counts))
            return tokens

    monkeypatch.setattr(decoded, "Ahead", Watched)
    assert answers(model, prompts(), **settings)[0] == expected
    # Where nothing but scores decides, all that this model guesses of itself is right.
    right = wrong = 0
    for rows, begins, tokens, counts in asked:
        for row, begin, guesses, count in zip(rows, begins.tolist(), tokens.tolist(), counts.tolist(), strict=True):
            if row.likeness is not None:
                said = row.ids[begin : begin + count]
                right += said == guesses[: len(said)]
                wrong += said != guesses[: len(said)]
    assert right > 20
    assert wrong == 0


@pytest.mark.parametrize("moment", ["prompt", "step"])
def test_a_draft_model_that_fails_leaves_answers_without_drafts(moment, model, expected, pools, monkeypatch, caplog):
    draft_whatever_there_is(monkeypatch)
    draft, calls = copy.deepcopy(model), []

    def fail(*_):
        calls.append(1)
        if moment == "prompt" or len(calls) > 20:
            raise RuntimeError("on purpose")

    draft.model.layers[1].register_forward_pre_hook(fail)
    settings = {"max_rows": 4, "eos_token_id": EOS, "custom_generate": hf_paged.assisted(draft)}
    assert answers(model, prompts()[:8], **settings)[0] == expected[:8]
    said = [record.getMessage() for record in caplog.records if "on purpose" in record.getMessage()]
    if moment == "prompt":
        assert sorted(said) == sorted(
            f"Prompt {index} goes on without drafts, as Gemma3ForCausalLM failed: RuntimeError('on purpose')"
            for index in range(8)
        )
    else:
        assert said == ["No more drafts are made, as Gemma3ForCausalLM failed: RuntimeError('on purpose')"]


def test_a_draft_that_can_not_be_drawn_and_a_prompt_too_long_for_the_draft_model_take_drafts_from_that_row_alone(
    model, expected, pools, monkeypatch, caplog
):
    draft_whatever_there_is(monkeypatch)
    draft = copy.deepcopy(model)
    draft.config.max_position_embeddings = 50
    positions = []

    def spoil(module, args, outputs):
        outputs.logits[-1] = torch.nan

    draft.register_forward_hook(spoil)
    draft.model.register_forward_pre_hook(
        lambda module, args, inputs: positions.append(int(inputs["position_ids"].max())), with_kwargs=True
    )
    settings = {"max_rows": 4, "eos_token_id": EOS, "custom_generate": hf_paged.assisted(draft)}
    assert answers(model, prompts(), **settings)[0] == expected
    assert "goes on without drafts" in caplog.text
    assert 40 < max(positions) < 50


def test_drafts_of_a_model_are_given_back_with_the_rows_and_when_the_iterator_is_closed(model, pools, monkeypatch):
    draft_whatever_there_is(monkeypatch)
    loop = hf_paged.assisted(model)
    settings = {"do_sample": False, "eos_token_id": None, "max_rows": 3, "custom_generate": loop}
    settings["pool"] = PagePool.from_model(model, page_size=16)
    lengths = [60, 60, 4]
    given = [{"input_ids": [7 + index] * 40, "max_new_tokens": count} for index, count in enumerate(lengths)]
    with hf_paged.generate_many(model, given, **settings) as many:
        assert next(many).index == 2
        (pool,) = pools.made
        assert pool.groups[1].allocator.num_active
        assert many._schedule._batch._drafter._batch.cache.batch_size == 2
    pools.assert_hold_nothing()


def test_a_draft_model_with_other_tokens_or_of_another_kind_is_refused(model):
    draft = copy.deepcopy(model)
    draft.config.vocab_size += 1
    with pytest.raises(ValueError, match="both must have the same"):
        hf_paged.generate_many(model, [[1]], custom_generate=hf_paged.assisted(draft))
    draft = copy.deepcopy(model)
    own = draft.prepare_inputs_for_generation
    draft.prepare_inputs_for_generation = lambda *args, **inputs: own(*args, **inputs)
    with pytest.raises(ValueError, match="in a way of its own"):
        hf_paged.generate_many(model, [[1]], custom_generate=hf_paged.assisted(draft))


@pytest.mark.parametrize("method", [hf_paged.prompt_lookup(), "a draft model"])
def test_models_whose_rows_can_not_end_apart_are_refused_before_anything_is_computed(method, model):
    given = hf_paged.assisted(model) if method == "a draft model" else method
    latents = deepseek()
    chunks = {"attention_chunk_size": 16, "num_local_experts": 2, "intermediate_size_mlp": 32}
    for other, match in (
        (latents, "makes keys and values of the latents"),
        (tiny_model(Llama4ForCausalLM, Llama4TextConfig, **chunks), "attend to chunks"),
    ):
        other.set_attn_implementation("paged_flex")
        with pytest.raises(ValueError, match=match):
            hf_paged.generate_many(other, [[1]], custom_generate=given)
        cache = PagedCache.from_model(other)
        with pytest.raises(ValueError, match=match):
            other.generate(torch.tensor([[5, 6, 7]]), past_key_values=cache, custom_generate=given)
        assert cache.lengths == []


def test_a_prompt_has_no_drafts_of_its_own(model):
    prompt = {"input_ids": [1], "custom_generate": hf_paged.prompt_lookup()}
    (result,) = hf_paged.generate_many(model, [prompt]).in_order()
    assert "Give it to generate_many()" in str(result.error)
