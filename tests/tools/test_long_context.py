"""Tasks over long contexts: what is asked, how it is scored, and that every cache gives the same answers."""

import json
import random
import re
import sys
from collections import Counter

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_paged.tools.cli import main
from hf_paged.tools.lab.model import MeasuredModel, load_model, random_model
from hf_paged.tools.long_context import TASKS, Settings, evaluate_long_context, evaluation, tasks
from hf_paged.tools.long_context.example import Prompt, Task, compose, fill, truncate
from hf_paged.tools.long_context.longbench import choice_accuracy
from hf_paged.tools.long_context.tasks import string_match, word_similarity
from tests.models import tiny_model

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NUMBER = re.compile(r"(?<!\d)\d{5}(?!\d)")


def byte_tokenizer(chat_template=None):
    """A token for each byte, so that a test can count them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(["</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", chat_template=chat_template)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(TEMPLATE)


@pytest.fixture(scope="module")
def model(tokenizer):
    return MeasuredModel("tiny", tiny_model(LlamaForCausalLM, LlamaConfig, vocab_size=257), tokenizer)


def settings(**changes):
    return Settings(**({"contexts": (500,), "tasks": ("passkey",), "page_size": 16, "max_new_tokens": 4} | changes))


# Examples


MAKERS = {
    "passkey": lambda tokenizer, context, depth, seed: tasks.passkey(tokenizer, context, depth, seed),
    "documents": lambda tokenizer, context, depth, seed: tasks.documents(tokenizer, context, seed),
    "copy": lambda tokenizer, context, depth, seed: tasks.copy(tokenizer, context, depth, seed),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("context", [700, 701, 1024, 3000])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_an_example_is_as_long_as_asked_and_has_its_answer_in_the_prompt(tokenizer, make, context, depth):
    example = make(tokenizer, context, depth, 7)
    reference = example.reference
    assert context - 21 <= len(example.prompt.input_ids) <= context  # a word has 20 bytes at most, and a space
    assert tokenizer.decode(example.prompt.input_ids) == example.prompt.text
    assert reference in example.prompt.text


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_examples_are_the_same_for_a_seed_and_differ_between_seeds(tokenizer, make):
    first, again, other = (make(tokenizer, 800, 0.5, seed) for seed in (1, 1, 2))
    assert first == again
    assert first.reference != other.reference
    assert first.prompt.text[200:400] != other.prompt.text[200:400]


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_a_number_stands_at_its_depth_of_the_words(tokenizer, depth):
    text = tasks.passkey(tokenizer, 2500, depth).prompt.text
    before, _, after = re.fullmatch(
        r"<user>.*?remember it\.\n\n(.*?)(?:\n\n)?(The special magic number is \d{5}\..*?\d{5}\.)(?:\n\n)?(.*?)"
        r"\n\nWhat is the special magic number\?</s><assistant>The special magic number is",
        text,
        re.DOTALL,
    ).groups()
    num_before, num_after = len(before.split()), len(after.split())
    assert num_before == round(depth * (num_before + num_after))
    assert num_before + num_after > 200


def test_documents_hold_distinct_facts_and_the_question_is_about_one(tokenizer):
    asked = Counter()
    for seed in range(20):
        example = tasks.documents(tokenizer, 1500, seed)
        text = example.prompt.text
        facts = dict(re.findall(r"The number of the safe in (\w+) is (\d{5})\.", text))
        assert len(facts) == len(set(facts.values())) == tasks.NUM_DOCUMENTS
        pieces = re.split(r"Document \d:\n", text)[1:]
        assert all("The number of the safe in" in piece for piece in pieces)
        (city,) = re.findall(r"What is the number of the safe in (\w+)\?", text)
        assert example.reference == facts[city]
        asked[list(facts).index(city)] += 1
    assert len(asked) > 2


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_passage_begins_where_it_was_put_and_its_first_words_are_given(tokenizer, depth):
    example = tasks.copy(tokenizer, 1500, depth)
    before, passage, after, given = re.fullmatch(
        r"<user>(.*?)<passage>\n(.*?)\n</passage>(.*?)\n\nRepeat the text .*? word for word\.</s><assistant>(.*)",
        example.prompt.text,
        re.DOTALL,
    ).groups()
    assert len(given.split()) == tasks.NUM_GIVEN_WORDS
    assert f"{given} {example.reference}" == passage
    assert len(passage.split()) == tasks.NUM_PASSAGE_WORDS
    num_before, num_after = len(before.split()), len(after.split())
    assert num_before == round(depth * (num_before + num_after))


@pytest.mark.parametrize(("limit", "depths"), [(1, [0.5]), (2, [0, 1]), (3, [0, 0.5, 1])])
def test_depths_go_evenly_from_the_beginning_to_the_end(tokenizer, limit, depths):
    made = TASKS["passkey"].examples(tokenizer, 700, limit, 3)
    assert [NUMBER.search(example.prompt.text).start() for example in made] == sorted(
        NUMBER.search(tasks.passkey(tokenizer, 700, depth, 3 * limit + index).prompt.text).start()
        for index, depth in enumerate(depths)
    )
    assert len({example.reference for example in made}) == limit


def test_prose_begins_anew_after_its_end():
    words = tasks._words(random.Random(0), 200_000)
    assert len(words) == 200_000
    period = words.index(words[0])
    assert all(len(word) <= 20 for word in words[period : period + 1000])


@pytest.mark.parametrize("depth", [-0.1, 1.1])
def test_a_depth_beyond_the_text_is_an_error(tokenizer, depth):
    with pytest.raises(ValueError, match=f"depth={depth} was asked for; give a share"):
        tasks.passkey(tokenizer, 700, depth)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_context_without_room_for_the_question_is_an_error(tokenizer, make):
    with pytest.raises(ValueError, match="A context of 100 tokens was asked for, but the prompt takes "):
        make(tokenizer, 100, 0.5, 0)


# Prompts


def test_a_chat_template_is_used_where_there_is_one(tokenizer):
    assert compose(tokenizer, "Why?", "Because").text == "<user>Why?</s><assistant>Because"
    assert compose(byte_tokenizer(), "Why?", "Because").text == "Why?\nBecause"
    assert compose(byte_tokenizer(), "Why?").text == "Why?"


@pytest.mark.parametrize("context", [0, 1, 2, 9, 10])
def test_filling_stops_before_the_word_that_is_too_much(context):
    def make(words):
        return Prompt(" ".join(words), list(range(2 * len(words))))

    words = [str(number) for number in range(context)]
    assert len(fill(make, words, context).input_ids) == context // 2 * 2


def test_a_message_that_fits_is_not_truncated(tokenizer):
    whole = compose(tokenizer, "0123456789")
    assert truncate(tokenizer, "0123456789", len(whole.input_ids)) == whole


@pytest.mark.parametrize("kept", range(10))
def test_truncation_takes_out_the_middle(tokenizer, kept):
    room = len(compose(tokenizer, "").input_ids)
    text = truncate(tokenizer, "0123456789", room + kept).text
    start, end = "0123456789"[: kept - kept // 2], "0123456789"[10 - kept // 2 :]
    assert text == f"<user>{start}{end}</s><assistant>"


def test_a_chat_template_that_is_too_long_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="A context of 3 tokens was asked for, but the chat template takes "):
        truncate(tokenizer, "0123456789", 3)


# Metrics


@pytest.mark.parametrize(
    ("metric", "prediction", "reference", "score"),
    [
        (string_match, " 12345.", "12345", 1),
        (string_match, "It is LISBON", "Lisbon", 1),
        (string_match, "123456", "12345", 0),
        (string_match, "", "12345", 0),
        (word_similarity, "a b c d e f", "a b c d", 1),
        (word_similarity, "a b x d e", "a b c d", 0.75),
        (word_similarity, "", "a b c d", 0),
        (choice_accuracy, "**The correct answer is (B)**", "B", 1),
        (choice_accuracy, "The correct answer is B.", "B", 1),
        (choice_accuracy, "The correct answer is (C)", "B", 0),
        (choice_accuracy, "B", "B", 0),
    ],
)
def test_metrics_have_the_worked_numbers(metric, prediction, reference, score):
    assert metric(prediction, reference) == pytest.approx(score)


# LongBench


@pytest.fixture
def second_version(monkeypatch):
    """LongBench v2 with two questions."""
    rows = [
        {
            "_id": str(index),
            "domain": "Single-Document QA",
            "sub_domain": "Legal",
            "difficulty": "easy",
            "length": "short",
            "question": " Which {letter}?",
            **{f"choice_{letter}": f"choice {letter}" for letter in "ABCD"},
            "answer": "C",
            "context": "word " * 500,
        }
        for index in range(2)
    ]
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_longbench_v2_is_multiple_choice(tokenizer, second_version):
    (example,) = TASKS["longbench-v2"].examples(tokenizer, 3900, 1, 0)
    assert second_version == [(("zai-org/LongBench-v2",), {"split": "train"})]
    assert example.reference == "C"
    assert "<text>\nword word" in example.prompt.text
    assert "this question: Which {letter}?\nChoices:\n(A) choice A\n(B) choice B\n" in example.prompt.text
    assert TASKS["longbench-v2"].score("The correct answer is (C)", "C") == 1
    assert len(TASKS["longbench-v2"].examples(tokenizer, 3900, 5, 0)) == 2


# Answers


def plain_answer(model, ids, num_new_tokens):
    """Greedy tokens, one by one, of one prompt."""
    cache, given = DynamicCache(config=model.model.config), torch.tensor([ids])
    tokens = []
    with torch.no_grad():
        for _ in range(num_new_tokens):
            given = model.model(given, past_key_values=cache).logits[:, -1:].argmax(-1)
            tokens.append(given.item())
    return tokens


def text_of(model, tokens):
    return model.tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("page_size", "batch_size", "chunk_size"),
    [(16, 1, None), (128, 1, 100), (16, 2, 100), (128, 2, None), (16, 4, None)],
)
def test_every_cache_gives_the_answers_of_the_plain_path(model, page_size, batch_size, chunk_size):
    asked = settings(
        contexts=(511, 512, 513),
        limit=3,
        caches=("dynamic", "paged", "static"),
        page_size=page_size,
        batch_size=batch_size,
        chunk_size=chunk_size,
        max_new_tokens=6,
    )
    results = evaluate_long_context(model, asked)
    assert json.loads(json.dumps(results)) == results
    assert [(row["context"], row["cache"]) for row in results["rows"]] == [
        (context, cache) for context in asked.contexts for cache in asked.caches
    ]
    assert all(row["same_answers"] for row in results["rows"])
    for context in asked.contexts:
        expected = [
            text_of(model, plain_answer(model, example.prompt.input_ids, 6))
            for example in TASKS["passkey"].examples(model.tokenizer, context, 3, 0)
        ]
        for cache in asked.caches:
            assert expected == [
                answer["answer"]
                for answer in results["answers"]
                if (answer["context"], answer["cache"]) == (context, cache)
            ]


def test_a_row_accounts_for_prompt_score_and_bytes(model, monkeypatch):
    monkeypatch.setitem(TASKS, "passkey", Task("passkey", "", lambda *_: 0.25, 16, TASKS["passkey"].examples))
    dynamic, paged = evaluate_long_context(model, settings(limit=1))["rows"]
    token_bytes = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, head size, float32
    stored = dynamic["prompt_tokens"] + 4 - 1
    assert (dynamic["examples"], dynamic["score"]) == (1, 0.25)
    assert dynamic["kv_bytes"] == stored * token_bytes
    assert paged["kv_bytes"] == -(-stored // 16) * 16 * token_bytes
    assert paged["total_s"] > 0


def test_an_answer_that_differs_is_seen(model, monkeypatch):
    generate = evaluation._generate

    def other(baseline, batch, *arguments):
        answers = generate(baseline, batch, *arguments)
        if baseline.name == "paged" and batch.context == 501:
            answers.tokens[-1][-1] ^= 1
        return answers

    monkeypatch.setattr(evaluation, "_generate", other)
    rows = evaluate_long_context(model, settings(contexts=(500, 501)))["rows"]
    assert [row["same_answers"] for row in rows] == [True, True, True, False]


def test_an_answer_ends_before_the_end_of_the_sequence(model, monkeypatch):
    (example,) = TASKS["passkey"].examples(model.tokenizer, 500, 1, 0)
    *begun, end, _ = plain_answer(model, example.prompt.input_ids, 4)
    assert end not in begun
    monkeypatch.setattr(model.model.generation_config, "eos_token_id", end)
    results = evaluate_long_context(model, settings(limit=1))
    assert [answer["answer"] for answer in results["answers"]] == [text_of(model, begun)] * 2
    assert all(row["same_answers"] for row in results["rows"])


def test_the_model_is_left_as_it_was(model):
    evaluate_long_context(model, settings())
    assert model.model.config._attn_implementation == "sdpa"


def test_longbench_is_answered_too(model, second_version):
    rows = evaluate_long_context(model, settings(tasks=("longbench-v2",), contexts=(600,), batch_size=2))["rows"]
    assert [(row["cache"], row["examples"], row["same_answers"]) for row in rows] == [
        ("dynamic", 2, True),
        ("paged", 2, True),
    ]


# Mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limit": 0}, "limit=0 was asked for"),
        ({"batch_size": 0, "chunk_size": -1}, "batch_size=0 and chunk_size=-1 was asked for"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 was asked for"),
        ({"caches": ()}, r"caches=\(\) was asked for"),
        ({"tasks": ("passkeys",)}, r"Tasks \['passkeys'\] were asked for; there are passkey, documents, copy, longb"),
    ],
)
def test_settings_that_make_no_sense_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_a_context_that_leaves_no_room_for_the_answer_is_an_error(model):
    with pytest.raises(ValueError, match=r"but tiny has 4096 positions\. Ask for a context of 4092 at most"):
        evaluate_long_context(model, settings(contexts=(4093,)))


def test_an_unknown_cache_is_an_error(model):
    with pytest.raises(ValueError, match=r"caches=\['page'\] were asked for"):
        evaluate_long_context(model, settings(caches=("page",)))


def test_a_model_without_a_tokenizer_is_an_error():
    with pytest.raises(ValueError, match="random Llama has no tokenizer"):
        evaluate_long_context(random_model(), settings())


# Command line


@pytest.fixture
def tiny(model, monkeypatch):
    monkeypatch.setattr("hf_paged.tools.commands.long_context.load_model", lambda *_: model)


def test_the_command_prints_a_table_and_writes_json(tiny, tmp_path, capsys):
    path = tmp_path / "results.json"
    arguments = ["long-context", "--tasks", "passkey,documents", "--contexts", "500,600", "--limit", "1"]
    arguments += ["--max-new-tokens", "2", "--page-size", "16", "--json", str(path)]
    assert main(arguments) == 0
    results = json.loads(path.read_text())
    assert results["command"] == " ".join(["hf-paged", *arguments])
    assert results["model"] == "tiny"
    assert results["settings"]["contexts"] == [500, 600]
    assert {"machine", "versions", "commit", "num_threads"} <= set(results)
    assert [(row["task"], row["context"]) for row in results["rows"][::2]] == [
        (task, context) for task in ("passkey", "documents") for context in (500, 600)
    ]
    assert len(results["answers"]) == 8
    assert re.search(r"task +context +examples +cache +score", capsys.readouterr().out)


def test_mistakes_and_missing_packages_are_said_without_a_traceback(tiny, monkeypatch, capsys):
    assert main(["long-context", "--tasks", "passkeys"]) == 2
    assert "hf-paged: Tasks ['passkeys'] were asked for" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert main(["long-context", "--tasks", "longbench-v2", "--contexts", "500"]) == 2
    assert "Run: pip install datasets\n" in capsys.readouterr().err


def test_the_help_lists_tasks_and_caches(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["long-context", "--help"])
    printed = capsys.readouterr().out
    assert "passkey       a number hidden in prose" in printed
    assert "caches: dynamic, paged, static" in printed


@pytest.mark.real_model
def test_the_real_model_finds_a_number_from_every_cache():
    asked = Settings(tasks=("passkey",), contexts=(200,), limit=1, max_new_tokens=6)
    rows = evaluate_long_context(load_model(), asked)["rows"]
    assert [(row["score"], row["same_answers"]) for row in rows] == [(1, True), (1, True)]
