"""A question about a long text, and the tasks that questions come from."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """What a model is given: text, in the tokenizer's chat template where it has one, and its tokens."""

    text: str
    input_ids: list[int]


@dataclass(frozen=True)
class Example:
    """A prompt and its right answer."""

    prompt: Prompt
    reference: str


@dataclass(frozen=True)
class Task:
    """Where examples come from, and how answers are scored.

    Attributes:
        name: for the command line.
        description: one line.
        score: of an answer and the reference, 0 to 1.
        max_new_tokens: room for an answer.
        examples: makes `limit` of them, or as many as there are, given a tokenizer, the most tokens of a prompt,
            `limit` and a seed.
    """

    name: str
    description: str
    score: Callable[[str, str], float]
    max_new_tokens: int
    examples: Callable[[PreTrainedTokenizerBase, int, int, int], list[Example]]


def compose(tokenizer: PreTrainedTokenizerBase, message: str, answer_prefix: str = "") -> Prompt:
    """Make a prompt of what the user says, and how the answer begins, which leads weak models to the point."""
    if tokenizer.chat_template is None:
        text = "\n".join(filter(None, (message, answer_prefix)))
        return Prompt(text, tokenizer(text)["input_ids"])
    conversation = [{"role": "user", "content": message}]
    templated = str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))
    text = templated + answer_prefix
    return Prompt(text, tokenizer(text, add_special_tokens=False)["input_ids"])


def fill(make: Callable[[Sequence[str]], Prompt], words: Sequence[str], context: int) -> Prompt:
    """Make the prompt with as many words as fit into `context` tokens, of which there are at least as many.

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
    """Make a prompt of a message, without its middle if it has too many tokens: its ends hold the instructions.

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
