"""A question about a long text, and the tasks that questions come from."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from hf_paged.tools.evaluation.answer_metrics import Metric


@dataclass(frozen=True)
class Prompt:
    """What a model is given.

    Attributes:
        text: in the tokenizer's chat template, where it has one.
        input_ids: its tokens.
    """

    text: str
    input_ids: list[int]


@dataclass(frozen=True)
class Example:
    """A prompt and its right answers, of which one is enough."""

    prompt: Prompt
    references: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """Where examples come from, and how answers are scored.

    Attributes:
        name: for the command line.
        description: one line.
        metric: of one answer and one reference.
        max_new_tokens: room for an answer.
        examples: makes `limit` of them, or as many as there are, given a tokenizer, the most tokens of a prompt,
            `limit` and a seed.
    """

    name: str
    description: str
    metric: Metric
    max_new_tokens: int
    examples: Callable[[PreTrainedTokenizerBase, int, int, int], list[Example]]

    def score(self, answer: str, example: Example) -> float:
        """Score an answer beside the reference that it is nearest to."""
        return max(self.metric(answer, reference) for reference in example.references)


def compose(tokenizer: PreTrainedTokenizerBase, message: str, answer_prefix: str = "") -> Prompt:
    """Make a prompt.

    Args:
        tokenizer: its chat template is used, if it has one.
        message: what the user says.
        answer_prefix: how the answer begins, which leads weak models to the point.
    """
    if tokenizer.chat_template is None:
        text = "\n".join(filter(None, (message, answer_prefix)))
        return Prompt(text, tokenizer(text)["input_ids"])
    conversation = [{"role": "user", "content": message}]
    templated = str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))
    text = templated + answer_prefix
    return Prompt(text, tokenizer(text, add_special_tokens=False)["input_ids"])


def fill(make: Callable[[Sequence[str]], Prompt], words: Sequence[str], context: int) -> Prompt:
    """Make the prompt with as many words as fit.

    Args:
        make: turns words into a prompt.
        words: at least `context` of them.
        context: the most tokens of the prompt, which falls short of it by less than its next word takes.

    Raises:
        ValueError: if the prompt is too long without any words.
    """
    count = bisect_right(range(context + 1), context, key=lambda count: len(make(words[:count]).input_ids)) - 1
    if count < 0:
        raise ValueError(
            f"A context of {context} tokens was asked for, but the prompt takes {len(make([]).input_ids)} tokens "
            "without any text around it. Ask for a longer context."
        )
    return make(words[:count])


def truncate(tokenizer: PreTrainedTokenizerBase, message: str, context: int) -> Prompt:
    """Make a prompt of a message, without its middle if it has too many tokens.

    Source:
        LongBench: Bai et al., 2023. Beginning and end hold the instructions.

    Raises:
        ValueError: if the chat template alone is too long.
    """
    prompt = compose(tokenizer, message)
    ids: list[int] = tokenizer(message, add_special_tokens=False)["input_ids"]
    kept = len(ids)
    # Halves that are decoded and encoded again may have some tokens more than before, so this may take several turns.
    while len(prompt.input_ids) > context:
        if not kept:
            raise ValueError(
                f"A context of {context} tokens was asked for, but the chat template takes {len(prompt.input_ids)}. "
                "Ask for a longer context."
            )
        kept = max(0, kept - (len(prompt.input_ids) - context))
        halves = (ids[: kept - kept // 2], ids[len(ids) - kept // 2 :])
        prompt = compose(tokenizer, "".join(str(tokenizer.decode(half, skip_special_tokens=True)) for half in halves))
    return prompt
