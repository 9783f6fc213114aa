"""LongBench v2, out of the Hugging Face hub: multiple choice over texts of up to two million words.

Prompt, room for the answer, truncation and score are those of the benchmark.

Source:
    Bai et al., "LongBench v2: Towards Deeper Understanding and Reasoning on Realistic Long-context Multitasks", 2024.
"""

import re

from transformers import PreTrainedTokenizerBase

from hf_paged.tools.long_context.example import Example, Task, truncate

_FIELDS = ("context", "question", "choice_A", "choice_B", "choice_C", "choice_D")
_PROMPT = """Please read the following text and answer the question below.

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


def examples(tokenizer: PreTrainedTokenizerBase, context: int, limit: int, seed: int) -> list[Example]:
    """The first ones, whatever the seed."""
    from datasets import load_dataset  # not above: the other tasks do without it

    rows = load_dataset("zai-org/LongBench-v2", split="train")
    return [
        Example(
            truncate(tokenizer, _PROMPT.format(**{field: row[field].strip() for field in _FIELDS}), context),
            row["answer"],
        )
        for row in rows.select(range(min(limit, len(rows))))
    ]


def choice_accuracy(prediction: str, reference: str) -> float:
    """1 if `The correct answer is (A)`, brackets or not, names the reference's letter."""
    match = re.search(r"The correct answer is (?:\(([A-D])\)|([A-D]))", prediction.replace("*", ""))
    return float(match is not None and (match[1] or match[2]) == reference)


LONGBENCH_V2 = Task("longbench-v2", "LongBench v2: multiple choice (downloaded)", choice_accuracy, 128, examples)
