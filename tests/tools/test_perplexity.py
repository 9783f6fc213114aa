"""Perplexity through a cache is that of a dense computation, which runs whole windows without any cache."""

import copy
import math
import weakref
from contextlib import contextmanager

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM

from hf_paged.packaged import load_packaged_model, prose
from hf_paged.tools.evaluation import perplexity
from hf_paged.tools.evaluation.perplexity import _standard_error
from hf_paged.tools.evaluation.scoring import Score, score
from hf_paged.tools.evaluation.windows import Window, cut
from hf_paged.tools.lab.baselines import line_up
from hf_paged.tools.lab.memory import token_bytes
from tests.models import letter_tokenizer, letters, tiny_llama, tiny_model

PAGE = 16
ALL = ("dynamic", "paged", "static")
TEXTS = ["x", letters(90), "", letters(17, 1), letters(2, 2), letters(48, 3)]


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def compute(model, texts=TEXTS, has_bos=False, **settings):
    return perplexity(model, letter_tokenizer(has_bos), texts, **({"caches": ALL, "page_size": PAGE} | settings))


@contextmanager
def lined_up(model, *names):
    with line_up(model, names, PAGE) as baselines:
        for baseline in baselines:
            baseline.prepare()
        yield baselines


@torch.no_grad()
def dense_nll(model, ids: list[int]) -> list[float]:
    """Of each token but the first."""
    logits = model(torch.tensor([ids[:-1]]), use_cache=False).logits[0].double()
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").tolist()


def dense_by_text(model, texts, max_length=4096, stride=4096, has_bos=False) -> dict[int, float]:
    """The loop of the guide to perplexity in the documentation of Transformers."""
    found = {}
    for text, words in enumerate(texts):
        ids = letter_tokenizer(has_bos)(words)["input_ids"]
        nll, previous_end = [], 0
        for begin in range(0, len(ids), stride):
            end = min(begin + max_length, len(ids))
            if end - begin > 1:
                nll += dense_nll(model, ids[begin:end])[-(end - previous_end) :]
            previous_end = end
            if end == len(ids):
                break
        if nll:
            found[text] = nll
    return {text: math.exp(math.fsum(nll) / len(nll)) for text, nll in found.items()}


def without_times(result):
    figures = result.to_dict()
    for row in figures["figures"]:
        del row["tokens_per_s"]
    return figures


# The figure


@pytest.mark.parametrize(
    ("chunk_size", "batch_size"), [(1, 6), (PAGE - 1, 2), (PAGE, 1), (PAGE + 1, 6), (500, 2), (500, 6)]
)
def test_perplexity_is_that_of_a_dense_computation_in_any_chunks_and_batches(model, chunk_size, batch_size):
    result = compute(model, chunk_size=chunk_size, batch_size=batch_size)
    expected = dense_by_text(model, TEXTS)
    assert list(expected) == [1, 3, 4, 5]
    for figures in result.figures:
        assert figures.text_perplexities == pytest.approx(expected, rel=1e-5)
    assert (result.num_tokens, result.num_windows, result.max_length) == (89 + 16 + 1 + 47, 4, 90)


@pytest.mark.parametrize(("max_length", "stride"), [(2, 1), (17, 16), (17, 17), (32, 20), (90, 90), (91, 5)])
def test_windows_are_those_of_the_guide(model, max_length, stride):
    result = compute(model, max_length=max_length, stride=stride, batch_size=7, chunk_size=13)
    for figures in result.figures:
        assert figures.text_perplexities == pytest.approx(dense_by_text(model, TEXTS, max_length, stride), rel=1e-5)


def test_without_a_stride_windows_do_not_overlap(model):
    assert without_times(compute(model, max_length=20)) == without_times(compute(model, max_length=20, stride=20))


def test_a_beginning_of_sequence_token_lets_the_first_letter_be_scored(model):
    result = compute(model, has_bos=True)
    assert result.num_tokens == sum(map(len, TEXTS))
    expected = dense_by_text(model, TEXTS, has_bos=True)
    assert set(expected) == {0, 1, 3, 4, 5}
    assert result["paged"].text_perplexities == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_sliding_window_changes_nothing_about_it(batch_size):
    model = tiny_model(MistralForCausalLM, MistralConfig, sliding_window=20)
    result = compute(model, caches=("dynamic", "paged"), chunk_size=7, batch_size=batch_size)
    for figures in result.figures:
        assert figures.text_perplexities == pytest.approx(dense_by_text(model, TEXTS), rel=1e-5)


def test_texts_count_by_their_tokens(model):
    result = compute(model)
    weights = {text: len(TEXTS[text]) - 1 for text in (1, 3, 4, 5)}
    for figures in result.figures:
        total = sum(weights[text] * math.log(value) for text, value in figures.text_perplexities.items())
        assert figures.perplexity == pytest.approx(math.exp(total / result.num_tokens), rel=1e-12)


def test_in_bfloat16_both_caches_round_alike():
    chunks, tokens = (
        compute(tiny_llama(dtype=torch.bfloat16), caches=("dynamic", "paged"), chunk_size=size) for size in (7, 1)
    )
    assert chunks["paged"].relative_difference == 0  # no chunk of 7 leaves a single token over
    assert 0 < tokens["paged"].relative_difference < 0.02
    assert tokens["paged"].perplexity == pytest.approx(compute(tiny_llama())["dynamic"].perplexity, rel=0.05)


@pytest.mark.real_model
def test_a_real_model_is_as_perplexed_through_pages():
    result = perplexity(*load_packaged_model(), [prose()], max_tokens=60, chunk_size=20, page_size=PAGE)
    assert 2 < result["dynamic"].perplexity < 60
    assert result["paged"].relative_difference < 1e-5
    assert result["paged"].agreement == 1


# How many tokens


@pytest.mark.parametrize("max_tokens", [1, 16, 31, 90, 153])
@pytest.mark.parametrize("stride", [16, 31])
def test_exactly_so_many_tokens_are_scored(model, max_tokens, stride):
    settings = {"max_length": 31, "stride": stride, "caches": ("dynamic",), "batch_size": 4}
    available = compute(model, **settings).num_tokens
    assert compute(model, max_tokens=max_tokens, **settings).num_tokens == min(max_tokens, available)


def test_the_first_tokens_are_those_that_are_scored(model):
    assert compute(model, max_tokens=40)["paged"].perplexity == pytest.approx(
        dense_by_text(model, [TEXTS[1][:41]])[0], rel=1e-5
    )


def test_texts_are_read_no_further_than_needed(model):
    def texts():
        yield letters(30)
        yield letters(30, 1)
        raise AssertionError("read too far")

    assert compute(model, texts(), max_tokens=58).num_tokens == 58


def test_every_token_but_the_first_is_scored_once_where_windows_overlap():
    for length in range(1, 40):
        windows = list(cut(0, range(length), max_length=7, stride=3))
        assert [token for window in windows for token in window.token_ids[window.first_scored :]] == list(
            range(1, length)
        )
        assert all(2 <= len(window.token_ids) <= 7 for window in windows)


# The comparison


def test_a_cache_is_compared_with_the_reference_token_by_token(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(0.9)
    ids = letter_tokenizer()(letters(50))["input_ids"]
    with lined_up(model, "dynamic") as (reference,), lined_up(other, "paged") as (own,):
        found = score([reference, own], [Window(0, ids, 10), Window(0, ids[:20], 1)], chunk_size=7)["paged"]
    with torch.no_grad():
        one, two = (
            torch.cat([m(torch.tensor([ids[:-1]])).logits[0, 9:], m(torch.tensor([ids[:19]])).logits[0]])
            for m in (model, other)
        )
    p, q = one.double().log_softmax(-1), two.double().log_softmax(-1)
    assert found.kl == pytest.approx(torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum").item(), 1e-5)
    targets = torch.tensor([*ids[10:], *ids[1:20]])[:, None]
    assert found.squared_difference == pytest.approx((p - q).gather(1, targets).square().sum().item(), rel=1e-5)
    assert found.max_logit_difference == pytest.approx((one - two).abs().max().item(), rel=1e-5)
    assert found.num_agreeing == (one.argmax(-1) == two.argmax(-1)).sum()
    assert 0 < found.num_agreeing < len(one)
    assert found.nll == pytest.approx([sum(dense_nll(other, ids)[9:]), sum(dense_nll(other, ids[:20]))], rel=1e-5)


def test_the_standard_error_is_that_of_the_mean_of_the_differences(model):
    draws = torch.randn(400, generator=torch.Generator().manual_seed(0)).double() * 0.01 + 0.002
    scores = [Score([], squared_difference=part.square().sum().item()) for part in draws.split(150)]
    expected = (draws.std(correction=0) / 20).item()
    assert _standard_error(scores, draws.mean().item(), 400) == pytest.approx(expected, rel=1e-6)


def test_the_reference_differs_from_itself_by_nothing(model):
    result = compute(model, chunk_size=5, caches=("static", "paged"))
    static, paged = result.figures
    assert (static.cache, paged.cache) == ("static", "paged")
    assert (static.difference, static.relative_difference, static.max_logit_difference, static.kl) == (0, 0, 0, 0)
    assert static.standard_error == 0 < paged.standard_error < 1e-6
    assert static.agreement == paged.agreement == 1
    assert paged.difference == abs(paged.perplexity - static.perplexity)
    assert paged.relative_difference == paged.difference / static.perplexity < 1e-6
    assert 0 < paged.max_logit_difference < 1e-3
    assert 0 <= paged.kl < 1e-8


def test_memory_is_that_of_the_largest_batch(model):
    result = compute(model, [letters(40), letters(18, 1), letters(90, 2)], batch_size=2, chunk_size=16)
    size = token_bytes(model)
    assert size == 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, head size, float32
    assert result.minimum_bytes == 89 * size
    assert result["dynamic"].kv_bytes == 89 * size
    assert result["static"].kv_bytes == 89 * size
    assert result["paged"].kv_bytes == 96 * size


def test_padding_is_held_by_padded_caches_only(model):
    result = compute(model, [letters(65), letters(17, 1)], batch_size=2)
    assert result.minimum_bytes == (64 + 16) * token_bytes(model) == result["paged"].kv_bytes
    assert result["dynamic"].kv_bytes == 2 * 64 * token_bytes(model)


def test_logits_of_one_chunk_are_held_at_a_time(model):
    held: list[weakref.ref] = []

    def note(module, arguments, output):
        assert sum(logits() is not None for logits in held) < len(ALL)
        held.append(weakref.ref(output.logits))

    with lined_up(model, *ALL) as baselines:
        for baseline in baselines:
            baseline.model.register_forward_hook(note)
        score(baselines, [Window(0, letter_tokenizer()(letters(40))["input_ids"], 1)], chunk_size=8)
    assert len(held) == 3 * 5


def test_the_caches_take_turns_at_being_first(model):
    turns = []
    with lined_up(model, *ALL) as baselines:
        for baseline in baselines:
            baseline.model.register_forward_pre_hook(lambda *_, name=baseline.name: turns.append(name))
        score(baselines, [Window(0, letter_tokenizer()(letters(25))["input_ids"], 1)], chunk_size=8)
    assert turns == ["dynamic", "paged", "static", "paged", "static", "dynamic", "static", "dynamic", "paged"]


def test_tokens_are_taken_as_they_are(model):
    ids = [letter_tokenizer()(text)["input_ids"] for text in TEXTS]
    assert without_times(compute(model, ids, has_bos=True)) == without_times(compute(model))


def test_the_model_stays_as_it_is():
    model = tiny_llama().train()
    before = model.config._attn_implementation
    compute(model)
    assert model.training
    assert model.config._attn_implementation == before


# Mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"caches": ("dynamic", "pages")}, r"caches=\['pages'\] were asked for; there are dynamic, paged, static"),
        ({"caches": ()}, r"caches=\[\] were asked for; name at least one"),
        ({"caches": ("paged", "paged")}, "none twice"),
        ({"page_size": 17}, "page_size=17 was asked for"),
        ({"max_length": 1}, "max_length=1 was asked for; a window has 2 tokens or more, and the model has 4096"),
        ({"max_length": 4097}, "max_length=4097 was asked for"),
        ({"max_length": 10, "stride": 11}, "stride=11 was asked for with windows of 10 tokens; give 1 to 10"),
        ({"stride": 0}, "stride=0 was asked for"),
        ({"chunk_size": 0}, "chunk_size=0 was asked for; it must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 was asked for"),
        ({"max_tokens": 0}, "max_tokens=0 was asked for"),
        ({"texts": []}, "no text has two tokens"),
        ({"texts": ["", "x"]}, "no text has two tokens"),
        ({"texts": "one text"}, "texts is one string"),
    ],
)
def test_what_can_not_be_is_refused(model, settings, message):
    with pytest.raises(ValueError, match=message):
        compute(model, **settings)


def test_a_model_without_positions_must_be_given_a_length():
    endless = BloomForCausalLM(BloomConfig(vocab_size=200, hidden_size=48, n_layer=2, n_head=2)).eval()
    with pytest.raises(ValueError, match="Give max_length"):
        compute(endless, caches=("dynamic",))
    result = compute(endless, caches=("dynamic",), max_length=50, stride=40)
    assert result["dynamic"].text_perplexities == pytest.approx(dense_by_text(endless, TEXTS, 50, 40), rel=1e-5)
