"""Texts cut into windows that a model has room for."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of one text.

    Attributes:
        text: index of the text.
        token_ids: at least two.
        first_scored: index of the first token that is scored, at least 1; those before it are context only.
    """

    text: int
    token_ids: Sequence[int]
    first_scored: int

    @property
    def num_inputs(self) -> int:
        """Tokens that a model is given: all but the last, after which nothing is predicted."""
        return len(self.token_ids) - 1

    @property
    def num_scored(self) -> int:
        """Tokens that are scored."""
        return len(self.token_ids) - self.first_scored

    def first(self, count: int) -> "Window":
        """The window of the first `count` tokens."""
        return Window(self.text, self.token_ids[:count], self.first_scored)


def cut(text: int, token_ids: Sequence[int], max_length: int, stride: int) -> Iterator[Window]:
    """Cut a text into windows that begin every `stride` tokens and score what no window before has scored.

    The first token of a window has nothing before it and is never scored. So with `stride < max_length` every token
    of the text is scored once, but for the very first; with `stride == max_length` one token per window is lost, as in
    "Perplexity of fixed-length models" in the documentation of Transformers. 6 tokens with `max_length=4` are cut into
    `0 [1 2 3]` and `4 [5]` by a stride of 4, and into `0 [1 2 3]` and `2 3 [4 5]` by one of 2, where brackets mean
    scored.
    """
    end = 0
    for begin in range(0, len(token_ids), stride):
        first_scored = max(end, begin + 1)
        end = min(begin + max_length, len(token_ids))
        if first_scored < end:
            yield Window(text, token_ids[begin:end], first_scored - begin)
        if end == len(token_ids):
            return


def windows_of(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str | Sequence[int]],
    max_length: int,
    stride: int,
    max_tokens: int | None,
) -> Iterator[Window]:
    """Tokenize texts that are no tokens yet, with the special tokens that the tokenizer adds, and cut them.

    They are read one by one, and no further than needed: the last window is shortened so that `max_tokens` are scored.
    """
    num_scored = 0
    for index, text in enumerate(texts):
        token_ids = tokenizer(text, verbose=False)["input_ids"] if isinstance(text, str) else text
        for window in cut(index, token_ids, max_length, stride):
            num_scored += window.num_scored
            if max_tokens is not None and num_scored >= max_tokens:
                yield window.first(len(window.token_ids) - (num_scored - max_tokens))
                return
            yield window
