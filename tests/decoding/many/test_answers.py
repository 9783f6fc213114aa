"""`hf_paged.generate_many` gives each prompt the answer that it gets alone, whatever runs beside it."""

import itertools
import random

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LogitsProcessor,
    PreTrainedTokenizerFast,
    StoppingCriteria,
)

import hf_paged
from hf_paged import OutOfPagesError, PagedCache, PagePool
from hf_paged.compile import api
from hf_paged.decoding.many.batch import captured_count
from tests.families import ENCODER
from tests.models import letter_tokenizer, tiny_gemma, tiny_llama, tiny_model

EOS = 5


def random_prompts(count, longest=40, most=16, seed=0):
    """Prompts of lengths on both sides of the edges of a 16-token page, and how many tokens each is answered by."""
    chance = random.Random(seed)
    lengths = [length for length in (1, 2, 15, 16, 17, 31, 33, longest) if length <= longest]
    return [
        {
            "input_ids": [chance.randint(3, 199) for _ in range(chance.choice(lengths))],
            "max_new_tokens": chance.randint(1, most),
        }
        for _ in range(count)
    ]


def alone(model, prompt, **settings):
    """New tokens of a prompt, by `generate()` with DynamicCache."""
    model.set_attn_implementation("sdpa")
    prompt = dict(prompt)
    ids, seed = torch.tensor([prompt.pop("input_ids")]), prompt.pop("seed", None)
    if seed is not None:
        torch.manual_seed(seed)
    settings = {"do_sample": False, "pad_token_id": 0} | settings | prompt
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    model.set_attn_implementation("paged_flex")
    return tokens[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def model():
    model = tiny_llama()
    model.generation_config.eos_token_id = EOS
    model.set_attn_implementation("paged_flex")
    return model


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(80)


@pytest.fixture(scope="module")
def expected(model, prompts):
    return [alone(model, prompt) for prompt in prompts]


def answers(model, prompts, **arguments):
    """Tokens of all answers in order; nothing has failed, and all pages are free."""
    pool = arguments.pop("pool", None) or PagePool.from_model(model, page_size=16)
    many = hf_paged.generate_many(model, prompts, pool=pool, **({"do_sample": False} | arguments))
    results = many.in_order()
    assert [result.error for result in results] == [None] * len(results)
    assert [result.index for result in results] == list(range(len(results)))
    assert pool.stats().num_active_pages == 0
    pool.check_integrity()
    return [result.tokens for result in results], many.stats()


# What the answers are


@pytest.mark.parametrize(
    ("order", "max_rows"),
    [("given", 1), ("given", 5), ("reversed", 5), ("reversed", 16), ("shuffled", 5), ("shuffled", 16)],
)
def test_an_answer_does_not_depend_on_what_runs_beside_it(model, prompts, expected, order, max_rows):
    indices = list(range(len(prompts)))
    {"given": list, "reversed": list.reverse, "shuffled": random.Random(1).shuffle}[order](indices)
    found, _ = answers(model, [prompts[index] for index in indices], max_rows=max_rows)
    assert found == [expected[index] for index in indices]


@torch.no_grad()
def test_in_16_bit_an_answer_differs_only_where_two_tokens_score_alike():
    model = tiny_llama().to(torch.bfloat16)
    model.set_attn_implementation("paged_flex")
    prompts = random_prompts(60)
    found, _ = answers(model, prompts)
    num_different = 0
    for prompt, tokens in zip(prompts, found, strict=True):
        expected = alone(model, prompt)
        place = next((i for i, pair in enumerate(zip(tokens, expected, strict=True)) if pair[0] != pair[1]), None)
        if place is None:
            continue
        num_different += 1
        model.set_attn_implementation("sdpa")
        scores = model(torch.tensor([prompt["input_ids"] + expected[:place]])).logits[0, -1].float()
        # A few times what one of 8 bits is worth.
        assert scores[expected[place]] - scores[tokens[place]] <= 2**-5 * scores.abs().max()
    assert num_different < len(prompts) / 4


def test_compiled_steps_are_one_graph_for_any_number_of_rows(monkeypatch):
    graphs = []
    monkeypatch.setattr(api, "compile_graph", lambda graph, *arguments: graphs.append(graph) or graph)
    torch._dynamo.reset()
    model = tiny_llama()
    prompts = random_prompts(12, longest=2)  # too short for a graph of prompts
    expected = [alone(model, prompt) for prompt in prompts]
    with hf_paged.compiled(model):
        assert answers(model, prompts, max_rows=5)[0] == expected
    assert len(graphs) == 1


@pytest.mark.parametrize(("device_type", "counts"), [("cpu", [2, 2, 3, 9]), ("cuda", [1, 2, 4, 16])])
def test_compiled_batches_have_few_numbers_of_rows(device_type, counts):
    assert [captured_count(num_rows, device_type) for num_rows in (1, 2, 3, 9)] == counts


@pytest.mark.parametrize("window", [7, 20])
def test_layers_with_a_window_drop_pages_of_rows_that_came_at_different_times(window):
    model = tiny_gemma(window)
    prompts = random_prompts(24, most=40)
    expected = [alone(model, prompt) for prompt in prompts]
    assert answers(model, prompts, max_rows=4)[0] == expected


def test_prompts_that_are_alike_share_their_pages_and_part_when_they_are_drawn(model):
    prompts = [{"input_ids": list(range(10, 43)), "seed": seed} for seed in range(4)] * 2
    settings = {"do_sample": True, "max_new_tokens": 20, "temperature": 2.0}
    expected = [alone(model, prompt, **settings) for prompt in prompts]
    assert len({tuple(tokens) for tokens in expected}) == 4
    assert answers(model, prompts, **settings)[0] == expected


def test_what_prompts_begin_with_is_computed_once(model):
    common = list(range(20, 84))
    prompts = [common + prompt["input_ids"] for prompt in random_prompts(12)]
    expected = [alone(model, {"input_ids": prompt}, max_new_tokens=4) for prompt in prompts]
    pool = PagePool.from_model(model, page_size=16, prefix_cache=True)
    assert answers(model, prompts, pool=pool, max_rows=4, max_new_tokens=4)[0] == expected
    assert pool.stats().num_hit_tokens >= 11 * len(common)


def test_each_prompt_may_be_a_list_a_tensor_or_what_a_tokenizer_returns(model):
    ids = list(range(30, 50))
    tokenizer = letter_tokenizer()
    tokenizer.pad_token_id = 0
    text = "the quick brown fox."
    padded = tokenizer([text, text * 2], padding=True, padding_side="left")
    padded = {name: padded[name][0] for name in ("input_ids", "attention_mask")}
    given = [ids, torch.tensor(ids), torch.tensor([ids]), padded]
    expected = [alone(model, {"input_ids": prompt}, max_new_tokens=5) for prompt in (ids, tokenizer(text).input_ids)]
    assert answers(model, given, max_new_tokens=5)[0] == [expected[0]] * 3 + expected[1:]


# Settings of each


def test_every_prompt_has_its_own_settings_and_those_of_all_otherwise(model):
    ids = list(range(30, 50))
    settings = [
        {},
        {"max_new_tokens": 3},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 1},
        {"do_sample": True, "seed": 7, "top_k": 20},
        {"do_sample": True, "seed": 7, "top_k": 20, "temperature": 1.9},
        {"do_sample": True, "seed": 8, "top_p": 0.7},
        {"do_sample": True, "seed": 8, "repetition_penalty": 1.7},
        {"bad_words_ids": [[alone(model, {"input_ids": ids}, max_new_tokens=1)[0]]]},
    ]
    prompts = [{"input_ids": ids[:length], **own} for own in settings for length in (20, 13)]
    expected = [alone(model, {"max_new_tokens": 12} | prompt) for prompt in prompts]
    assert answers(model, prompts, max_new_tokens=12)[0] == expected


def test_without_a_seed_the_numbers_of_torch_decide_whatever_the_batch(model):
    prompts = [prompt["input_ids"] for prompt in random_prompts(9)]
    found = []
    for max_rows in (1, 4):
        torch.manual_seed(3)
        found.append(answers(model, prompts, max_rows=max_rows, do_sample=True, max_new_tokens=8)[0])
    assert found[0] == found[1]


def test_an_answer_ends_by_a_token_its_length_or_another_criterion_and_says_so(model):
    bytes_ = Tokenizer(BPE({chr(33 + index): index for index in range(93)}, []))
    bytes_.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_)
    ids = list(range(100, 120))
    plain = alone(model, {"input_ids": ids}, max_new_tokens=8, eos_token_id=None)
    stop = {"stop_strings": [tokenizer.decode([90])], "logits_processor": [Always(90)]}
    short = {"stopping_criteria": [lambda ids, scores: ids.shape[1] == 22]}  # true or false, no tensor
    ways = ({"eos_token_id": plain[3]}, {"eos_token_id": None}, stop, {"eos_token_id": None} | short)
    prompts = [{"input_ids": ids, **own} for own in ways]
    results = hf_paged.generate_many(model, prompts, max_new_tokens=8, tokenizer=tokenizer, do_sample=False).in_order()
    assert [result.finish_reason for result in results] == ["eos", "length", "stop", "stop"]
    assert [result.tokens for result in results] == [plain[: plain.index(plain[3]) + 1], plain, [90], plain[:2]]
    assert [result.prompt for result in results] == prompts


class Always(LogitsProcessor):
    """Has a token chosen."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        scores = torch.full_like(scores, -torch.inf)
        scores[:, self.token] = 0
        return scores


# What fails


class Fails(LogitsProcessor):
    """Raises with the third token of an answer; sees one row, without padding."""

    def __init__(self, length, error):
        self.length, self.error = length, error

    def __call__(self, input_ids, scores):
        assert len(input_ids) == len(scores) == 1
        if input_ids.shape[1] == self.length + 2:
            raise self.error
        return scores


class Ends(StoppingCriteria):
    """Raises."""

    def __call__(self, input_ids, scores, **kwargs):
        raise RuntimeError("no end in sight")


def test_what_fails_for_one_prompt_fails_for_it_alone(model, prompts, expected):
    mine = [dict(prompt, max_new_tokens=16) for prompt in prompts[:12]]
    whole = [alone(model, prompt) for prompt in mine]
    error = RuntimeError("not this one")
    ids = list(range(40, 60))
    mine[2] = {"input_ids": ids, "logits_processor": [Fails(20, error)], "max_new_tokens": 9, "eos_token_id": None}
    mine[4] = {"input_ids": ids, "stopping_criteria": [Ends()]}
    mine[5] = {"input_ids": []}
    mine[6] = {"input_ids": ids, "num_beams": 2}
    mine[7] = {"input_ids": ids, "temprature": 2}
    mine[8] = "text"
    pool = PagePool.from_model(model, page_size=16)
    results = hf_paged.generate_many(model, mine, pool=pool, max_rows=4, do_sample=False).in_order()
    failed = {result.index: str(result.error) for result in results if result.error}
    assert sorted(failed) == [2, 4, 5, 6, 7, 8]
    assert all(results[index].tokens == whole[index] for index in (0, 1, 3, 9, 10, 11))
    assert results[2].error is error
    assert results[2].tokens == alone(model, {"input_ids": ids}, max_new_tokens=2, eos_token_id=None)
    assert failed[4] == "no end in sight"
    assert "without any token" in failed[5]
    assert "decodes greedily and samples, one answer to each prompt, but beam search was asked for" in failed[6]
    assert "temprature" in failed[7]
    assert "as a str, but it is a list of token ids" in failed[8]
    assert pool.stats().num_active_pages == 0


def test_a_prompt_too_long_for_the_pool_fails_with_what_the_pool_says_and_the_others_go_on(model):
    pool = PagePool.from_model(model, num_pages=4, page_size=16)
    prompts = [[7] * 20, [8] * 100, [9] * 20]
    results = hf_paged.generate_many(model, prompts, pool=pool, max_new_tokens=4, do_sample=False).in_order()
    assert [type(result.error) for result in results] == [type(None), OutOfPagesError, type(None)]
    with pytest.raises(OutOfPagesError, match="more pages"):
        raise results[1].error
    assert pool.stats().num_active_pages == 0


def test_an_answer_too_long_for_the_pool_fails_with_what_there_is_of_it(model):
    pool = PagePool.from_model(model, num_pages=2, page_size=16)
    prompts = [[7] * 20, [9] * 20]
    results = hf_paged.generate_many(
        model, prompts, pool=pool, max_new_tokens=40, do_sample=False, eos_token_id=None
    ).in_order()
    for result, prompt in zip(results, prompts, strict=True):
        assert isinstance(result.error, OutOfPagesError)
        expected = alone(model, {"input_ids": prompt}, max_new_tokens=40, eos_token_id=None)
        assert result.tokens == expected[: len(result.tokens)]
        assert len(result.tokens) == 13  # 32 tokens are stored, and the last one need not be


def test_no_number_that_could_be_drawn_fails_the_prompt_alone(model):
    prompts = [{"input_ids": [7, 8, 9], "seed": 0}, {"input_ids": [7, 8], "seed": 1}, {"input_ids": [7], "seed": 2}]
    expected = [alone(model, prompt, do_sample=True, max_new_tokens=6) for prompt in prompts]
    prompts[1]["logits_processor"] = [Nothing()]
    results = hf_paged.generate_many(model, prompts, do_sample=True, max_new_tokens=6).in_order()
    assert [result.error is None for result in results] == [True, False, True]
    assert [results[index].tokens for index in (0, 2)] == [expected[0], expected[2]]


class Nothing(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return torch.full_like(scores, torch.nan)


# When pages run short


@pytest.fixture(scope="module")
def long_answers(model, prompts):
    """Prompts that are answered by 30 tokens, and these."""
    mine = [dict(prompt, max_new_tokens=30, eos_token_id=None) for prompt in prompts[:30]]
    return mine, [alone(model, prompt) for prompt in mine]


@pytest.mark.parametrize("pool", [{}, {"prefix_cache": True}, {"host_bytes": 2**24}, {"host_bytes": 2**14}], ids=str)
@pytest.mark.parametrize("num_pages", [5, 9])
def test_rows_wait_while_pages_are_short_and_answers_are_the_same(model, long_answers, pool, num_pages):
    mine, expected = long_answers
    pool = PagePool.from_model(model, num_pages=num_pages, page_size=16, **pool)
    found, stats = answers(model, mine, pool=pool)
    assert found == expected
    assert stats.num_preempted > 0
    assert pool.stats().swapped_bytes == 0


def test_drawn_tokens_are_the_same_after_a_row_has_waited(model):
    prompts = [dict(prompt, seed=seed, max_new_tokens=30) for seed, prompt in enumerate(random_prompts(12))]
    expected = [alone(model, prompt, do_sample=True, eos_token_id=None) for prompt in prompts]
    pool = PagePool.from_model(model, num_pages=6, page_size=16)
    found, stats = answers(model, prompts, pool=pool, do_sample=True, eos_token_id=None)
    assert found == expected
    assert stats.num_preempted > 0


def test_long_prompts_are_computed_in_pieces_while_others_go_on(model, monkeypatch):
    monkeypatch.setattr("hf_paged.decoding.many.schedule.usual_chunk", lambda device: 16)
    prompts = [dict(prompt, max_new_tokens=12) for prompt in random_prompts(20)]
    expected = [alone(model, prompt) for prompt in prompts]
    assert answers(model, prompts, max_rows=3)[0] == expected
    many = hf_paged.generate_many(model, [[7], [8] * 100], do_sample=False, max_new_tokens=40, eos_token_id=None)
    first = next(many)
    assert (first.index, many.stats().num_running) == (0, 1)
    assert many.stats().num_new_tokens > 40
    assert next(many).tokens == alone(model, {"input_ids": [8] * 100}, max_new_tokens=40, eos_token_id=None)
    many.close()
    pool = PagePool.from_model(model, num_pages=8, page_size=16)
    assert answers(model, prompts, max_rows=3, pool=pool)[0] == expected


# How answers come


def test_prompts_without_end_are_taken_when_there_is_room_and_results_come_as_rows_end(model):
    taken = []

    def endless():
        for index in itertools.count():
            taken.append(index)
            yield {"input_ids": [7 + index % 9] * (1 + index % 5), "max_new_tokens": 9 if index % 3 else 2}

    pool = PagePool.from_model(model, page_size=16)
    many = hf_paged.generate_many(model, endless(), pool=pool, max_rows=3, do_sample=False, eos_token_id=None)
    assert taken == []
    first = [next(many).index for _ in range(6)]
    assert first[0] == 0
    assert first != sorted(first)
    assert len(taken) <= 6 + 3 + 1
    assert many.stats().num_running > 0
    many.close()
    assert pool.stats().num_active_pages == 0
    with pytest.raises(StopIteration):
        next(many)


def test_an_interrupt_loses_nothing_that_was_given_and_gives_all_pages_back(model):
    class Interrupts(LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise KeyboardInterrupt

    pool = PagePool.from_model(model, page_size=16)
    prompts = [{"input_ids": [9] * 20, "max_new_tokens": 2}, {"input_ids": [8] * 30}, [8] * 30]
    prompts.append({"input_ids": [7] * 20, "logits_processor": [Interrupts()]})
    found = []
    many = hf_paged.generate_many(model, prompts, pool=pool, max_rows=2, max_new_tokens=9, do_sample=False)
    with pytest.raises(KeyboardInterrupt):
        found.extend(result.index for result in many)
    assert found[0] == 0
    assert many.stats().num_done == len(found)
    assert pool.stats().num_active_pages == 0
    pool.check_integrity()


@pytest.mark.parametrize("moment", ["prefill", "step"])
def test_a_pass_that_stops_in_the_middle_gives_all_pages_back(model, moment):
    pool = PagePool.from_model(model, page_size=16)
    many = hf_paged.generate_many(model, [[9] * 20, [8] * 30], pool=pool, max_new_tokens=9, do_sample=False)
    calls = []

    def stop(*_):
        calls.append(0)
        if len(calls) == (1 if moment == "prefill" else 4):
            raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_hook(stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            next(many)
    finally:
        hook.remove()
    assert pool.stats().num_active_pages == 0
    pool.check_integrity()


def test_an_iterator_that_is_dropped_gives_its_pages_back(model):
    pool = PagePool.from_model(model, page_size=16)
    many = hf_paged.generate_many(model, [[9] * 20, [8] * 30], pool=pool, do_sample=False, max_new_tokens=3)
    next(many)
    del many
    assert pool.stats().num_active_pages == 0


def test_stats_count_what_was_done(model, prompts, expected):
    found, stats = answers(model, prompts[:20], max_rows=4)
    assert (stats.num_done, stats.num_failed, stats.num_running, stats.num_waiting) == (20, 0, 0, 0)
    assert stats.num_new_tokens == sum(map(len, found))
    assert stats.num_prompt_tokens == sum(len(prompt["input_ids"]) for prompt in prompts[:20])
    assert stats.num_new_tokens / 4 <= stats.num_steps < stats.num_new_tokens


def test_a_pool_of_its_own_has_no_more_pages_written_than_rows_have_held_at_once(model):
    many = hf_paged.generate_many(
        model, random_prompts(40), max_rows=2, do_sample=False, eos_token_id=None, max_new_tokens=20
    )
    (group,) = many._schedule._pool.groups
    most = 0
    step = many._schedule.advance

    def advance():
        nonlocal most
        results = step()
        most = max(most, group.allocator.num_active)
        return results

    many._schedule.advance = advance
    kept = 0
    for _ in many:
        assert group.allocator.num_touched <= most + 4  # and what rows held that left within a step
        kept = max(kept, group.allocator.num_cached)
    assert kept


# What is no use


def test_mistakes_of_the_call_are_errors_at_once(model):
    with pytest.raises(ValueError, match=r"have a loop of their own.*assisted\(draft_model\) for drafts"):
        hf_paged.generate_many(model, [[1]], custom_generate=hf_paged.sample)
    with pytest.raises(ValueError, match="takes a model of Transformers"):
        hf_paged.generate_many("model", [[1]])
    with pytest.raises(ValueError, match="attn_implementation='sdpa', but its batches need 'paged_flex'"):
        hf_paged.generate_many(tiny_llama(), [[1]])
    with pytest.raises(ValueError, match="takes a decoder that has generate"):
        hf_paged.generate_many(tiny_model(BartForConditionalGeneration, BartConfig, **ENCODER), [[1]])
    with pytest.raises(ValueError, match="max_rows=0 was asked for"):
        hf_paged.generate_many(model, [[1]], max_rows=0)
    with pytest.raises(ValueError, match="was given a str as prompts"):
        hf_paged.generate_many(model, "text")
    with pytest.raises(ValueError, match="was given attention_mask, streamer, but it takes settings"):
        hf_paged.generate_many(model, [[1]], attention_mask=None, streamer=None)
    with pytest.raises(ValueError, match="has other layers than the model that this cache was made for"):
        hf_paged.generate_many(model, [[1]], pool=PagePool.from_model(tiny_llama(num_layers=3)))
    with pytest.raises(ValueError, match="takes a PagePool"):
        hf_paged.generate_many(model, [[1]], pool=PagedCache.from_model(model))
