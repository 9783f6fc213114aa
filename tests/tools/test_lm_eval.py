"""lm-eval's `--model hf-paged` scores as `--model hf` does, and computes less."""

import logging

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM

from hf_paged.batch.prompt.packed_prompt import PackedPrompt
from hf_paged.decoding.many.answers import generate_many
from hf_paged.tools import lm_eval
from hf_paged.tools.lm_eval import PagedLM
from tests.models import letter_tokenizer, letters, tiny_llama


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]


def model_of(kind: type[HFLM], **changes) -> HFLM:
    tokenizer = letter_tokenizer(has_bos=True)
    tokenizer.eos_token = "."
    return kind(pretrained=tiny_llama(), tokenizer=tokenizer, batch_size=4, **changes)


@pytest.fixture(scope="module")
def both() -> tuple[HFLM, PagedLM]:
    return model_of(HFLM, max_length=96), model_of(PagedLM, max_length=96)


def assert_same_scores(both: tuple[HFLM, PagedLM], given: list[Instance]) -> None:
    expected, found = (model.loglikelihood(given, disable_tqdm=True) for model in both)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=1e-6)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_it_is_found_by_its_name():
    assert get_model("hf-paged") is PagedLM


def test_choices_score_as_by_hf_in_any_order_of_requests(both):
    contexts = [letters(length, seed) for seed, length in enumerate((40, 17, 40, 3))]
    pairs = [(context, " " + letters(length, 9 + length)) for length in (1, 5, 12, 5) for context in contexts]
    assert_same_scores(both, requests("loglikelihood", *pairs, ("", "abc"), ("ab ", "c")))


def test_a_context_that_is_too_long_is_cut_as_by_hf(both, caplog):
    with caplog.at_level(logging.WARNING):
        assert_same_scores(both, requests("loglikelihood", (letters(120), " abc"), (letters(120), " abcdef")))
    assert "is cut to its last 93" in caplog.text


def test_a_continuation_that_is_too_long_is_refused(both):
    with pytest.raises(ValueError, match=r"continuation of 151 tokens.*takes 96"):
        both[1].loglikelihood(requests("loglikelihood", ("ab", " " + letters(150))), disable_tqdm=True)


def test_a_context_is_computed_once_for_all_of_its_choices(both, monkeypatch):
    counts: list[int] = []
    begin = PackedPrompt.begin

    def counting(self, first, num_queries):
        chunk = begin(self, first, num_queries)
        counts.append(len(chunk.ids))
        return chunk

    monkeypatch.setattr(PackedPrompt, "begin", counting)
    context = letters(30, seed=5)
    pairs = [(context, choice) for choice in ("abc", "de", "abc", "f")]
    both[1].loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    assert sum(counts) == 30 + 3 + 2 + 1  # one more in front of all, of which the last is left to the choices


def test_texts_roll_through_windows_as_by_hf(both):
    given = requests("loglikelihood_rolling", (letters(250),), (letters(20),))
    expected, found = (model.loglikelihood_rolling(given, disable_tqdm=True) for model in both)
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("changes", [{}, {"num_beams": 2}], ids=str)
def test_answers_are_those_of_hf_and_refill_one_batch_if_that_can_be(both, changes, monkeypatch, caplog):
    calls = []

    def counting(*args, **kwargs):
        calls.append(kwargs["max_rows"])
        return generate_many(*args, **kwargs)

    monkeypatch.setattr(lm_eval, "generate_many", counting)
    settings = {"until": ["q", "eb"], "max_gen_toks": 12, "do_sample": False} | changes
    given = requests("generate_until", *((letters(3 + 7 * number, number), settings) for number in range(9)))
    expected = both[0].generate_until(given, disable_tqdm=True)
    assert len({len(answer) for answer in expected}) > 1
    assert both[1].generate_until(given, disable_tqdm=True) == expected
    assert calls == [4]
    assert ("Each batch waits" in caplog.text) == bool(changes)


def test_what_cannot_be_packed_is_scored_as_by_hf_and_says_so(caplog):
    models = model_of(HFLM), model_of(PagedLM)
    for model in models:
        model.model.model.layers[0].register_forward_hook(lambda *_: None)
    with caplog.at_level(logging.WARNING):
        assert_same_scores(models, requests("loglikelihood", ("abc", " de"), ("abc", " f")))
    assert "Each context is computed anew" in caplog.text
    assert "a hook of tests" in caplog.text


def test_mixed_precision_is_that_of_hf():
    hf, paged = (model_of(kind, mixed_precision_dtype="bfloat16", softmax_dtype="float32") for kind in (HFLM, PagedLM))
    given = requests("loglikelihood", (letters(30), " abc"), (letters(30), " de"))
    expected, found = ([score for score, _ in model.loglikelihood(given)] for model in (hf, paged))
    assert found == pytest.approx(expected, rel=0.02)
    exact = [score for score, _ in model_of(PagedLM).loglikelihood(given)]
    assert found != pytest.approx(exact, rel=1e-5)
