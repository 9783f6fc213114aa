"""Guesses of the next tokens of each row, and who makes them."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from hf_paged.batch.padding import BoolMatrix, Counts
from hf_paged.decoding.speculate.text import Text


@dataclass(frozen=True)
class Drafts:
    """Guesses of the next tokens of each row.

    Attributes:
        tokens: `(num_rows, max_drafted)`, valid up to `counts`.
        counts: `(num_rows,)` how many there are of each row.
        probabilities: `(num_rows, max_drafted, vocab_size)`, those that the tokens were drawn with, 0 behind `counts`;
            None for tokens that were not drawn.
    """

    tokens: Counts
    counts: Counts
    probabilities: Tensor | None = None


class Drafter(Protocol):
    """Guesses tokens for the rows of one `generate()`."""

    cost: float
    """Of one token of all rows, as a share of the cost of a pass of the model over one token of each."""

    def available(self) -> Counts:
        """`(num_rows,)` how many tokens there would be at most of each row."""

    def foreseen(self) -> Counts:
        """`(num_rows,)` the next token of each row, as far as that costs nothing; -1 where it would."""

    def draft(self, counts: Counts) -> Drafts:
        """Guess `counts[row]` tokens of each row, at most so many as are available."""

    def close(self) -> None:
        """Release what is held."""


def prompt_mask(text: Text, inputs: dict[str, Any]) -> BoolMatrix | None:
    """`(num_rows, num_prompt)` which columns of the prompt are tokens; None: all, as far as is known."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.shape != (len(text.ids), text.num_prompt):
        return None
    on_host: BoolMatrix = mask.bool().cpu().numpy()
    return on_host


def check_positive(name: str, number: int) -> None:
    """Raise ValueError unless an argument of a caller's is at least 1."""
    if number < 1:
        raise ValueError(f"{name}={number} was given, but it takes a number of tokens, at least 1.")
