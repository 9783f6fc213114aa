"""LongBench, versions 1 and 2, out of the Hugging Face hub.

Prompts, room for answers, truncation and metrics are those of LongBench. Of version 1 these are the English tasks that
are scored without a further package: questions, retrieval and counting.

Source:
    Bai et al., "LongBench: A Bilingual, Multitask Benchmark for Long Context Understanding", 2023; "LongBench v2:
    Towards Deeper Understanding and Reasoning on Realistic Long-context Multitasks", 2024.
    https://github.com/THUDM/LongBench
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_paged.tools.evaluation.answer_metrics import Metric, choice_accuracy, number_precision, token_f1
from hf_paged.tools.evaluation.example import Example, Task, truncate

ARCHIVE = "hf://datasets/zai-org/LongBench/data.zip"
"""Version 1. Its loading script is of a kind that `datasets` no longer runs; the files in here need none."""

V2 = "zai-org/LongBench-v2"

_V2_PROMPT = """Please read the following text and answer the question below.

<text>
{context}
</text>

What is the correct answer to this question: {question}
Choices:
(A) {choice_A}
(B) {choice_B}
(C) {choice_C}
(D) {choice_D}

Format your response as follows: "The correct answer is (insert answer here)"."""

_BRIEFLY = "as concisely as you can, using a single phrase if possible. Do not provide any explanation."

_STORY = (
    "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
    f"{_BRIEFLY}\n\nStory: {{context}}\n\nNow, answer the question based on the story {_BRIEFLY}\n\n"
    "Question: {input}\n\nAnswer:"
)

_CONCISELY = (
    "as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based "
    'on the information in the article, write "unanswerable". If the question is a yes/no question, answer "yes", '
    '"no", or "unanswerable". Do not provide any explanation.'
)

_ARTICLE = (
    f"You are given a scientific article and a question. Answer the question {_CONCISELY}\n\nArticle: {{context}}\n\n "
    f"Answer the question based on the above article {_CONCISELY}\n\nQuestion: {{input}}\n\nAnswer:"
)

_FIELDS = (
    "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the "
    "above text, only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:"
)

_PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "The following are given passages.\n{context}\n\nAnswer the question based on the given passages. Only give me "
    "the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:"
)

_RETRIEVAL = (
    "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract is "
    "from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of the paragraph that "
    'the abstract is from. The answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: '
)

_COUNT = (
    "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read "
    "these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other words, "
    "how many non-repeating paragraphs are there in total?\n\n{context}\n\nPlease enter the final count of unique "
    "paragraphs after removing duplicates. The output format should only contain the number, such as 1, 2, 3, and so "
    "on.\n\nThe final answer is: "
)


def _load(limit: int, *source: str, **options: str) -> list[Mapping[str, Any]]:
    """The first rows of a data set that has one split.

    Raises:
        ModuleNotFoundError: if `datasets` is not installed.
    """
    try:
        from datasets import load_dataset  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'LongBench is loaded with datasets, which is not installed. Run: pip install "hf-paged[eval]"'
        ) from error
    rows = load_dataset(*source, split="train", **options)
    return list(rows.select(range(min(limit, len(rows)))))


def _examples_v1(
    name: str, prompt: str, tokenizer: PreTrainedTokenizerBase, context: int, limit: int, seed: int
) -> list[Example]:
    """The first ones, whatever the seed."""
    return [
        Example(truncate(tokenizer, prompt.format(**row), context), tuple(row["answers"]))
        for row in _load(limit, "json", data_files=f"zip://data/{name}.jsonl::{ARCHIVE}")
    ]


def _examples_v2(tokenizer: PreTrainedTokenizerBase, context: int, limit: int, seed: int) -> list[Example]:
    """The first ones, whatever the seed."""
    fields = ("context", "question", "choice_A", "choice_B", "choice_C", "choice_D")
    return [
        Example(
            truncate(tokenizer, _V2_PROMPT.format(**{field: row[field].strip() for field in fields}), context),
            (row["answer"],),
        )
        for row in _load(limit, V2)
    ]


def _task(name: str, description: str, prompt: str, metric: Metric, max_new_tokens: int) -> Task:
    return Task(f"longbench-{name}", description, metric, max_new_tokens, partial(_examples_v1, name, prompt))


LONGBENCH = (
    Task("longbench-v2", "LongBench v2: multiple choice", choice_accuracy, 128, _examples_v2),
    _task("narrativeqa", "LongBench: a question about a story", _STORY, token_f1, 128),
    _task("qasper", "LongBench: a question about a scientific article", _ARTICLE, token_f1, 128),
    _task("multifieldqa_en", "LongBench: a question about one document", _FIELDS, token_f1, 64),
    _task("hotpotqa", "LongBench: a question about several passages", _PASSAGES, token_f1, 32),
    _task("2wikimqa", "LongBench: a question about several passages", _PASSAGES, token_f1, 32),
    _task("musique", "LongBench: a question about several passages", _PASSAGES, token_f1, 32),
    _task("passage_retrieval_en", "LongBench: the paragraph of an abstract", _RETRIEVAL, number_precision, 32),
    _task("passage_count", "LongBench: how many paragraphs differ", _COUNT, number_precision, 32),
)
"""Tasks whose examples are downloaded."""
