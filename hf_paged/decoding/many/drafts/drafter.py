"""Who guesses the next tokens of rows that come and go."""

from collections.abc import Sequence
from typing import Protocol

from hf_paged.batch.padding import Counts
from hf_paged.decoding.many.row import Row


class RowDrafter(Protocol):
    """Guesses tokens for the rows of a batch, as a `Drafter` does for those of one `generate()`."""

    num_tokens: int
    """To draft at most for a row."""
    cost: float
    """As that of a `Drafter`."""

    def available(self, rows: Sequence[Row]) -> Counts:
        """`(num_rows,)` how many tokens there would be at most of each row."""

    def foreseen(self, rows: Sequence[Row]) -> Counts:
        """`(num_rows,)` the next token of each row, as far as that costs nothing; -1 where it would."""

    def draft(self, rows: Sequence[Row], counts: Counts) -> list[list[int]]:
        """Guess at most `counts[row]` tokens of each row, which has as many available."""

    def keep(self, rows: Sequence[Row]) -> None:
        """Release what is held of all rows but these."""

    def close(self) -> None:
        """Release what is held."""
