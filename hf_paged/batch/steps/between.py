"""What happens to the sequences of a cache between two steps."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

from hf_paged.batch.edits import Edits
from hf_paged.batch.rows import Rows
from hf_paged.batch.steps.progress import Progress


class BetweenSteps(ABC):
    """Rows that are chosen, released or exchanged while no step is under way."""

    rows: Rows
    progress: Progress
    edits: Edits
    salt: str | None
    _records_past: bool

    @abstractmethod
    def commit_first(self) -> None:
        """Commit a step that is over."""

    @abstractmethod
    def end_step(self) -> None:
        """Come to a state between two steps."""

    @abstractmethod
    def roll_back(self) -> None:
        """Forget a step that did not go through all layers."""

    @property
    def records_past(self) -> bool:
        """Whether what has left a window, or a state, is kept until `truncate` or `end_step`."""
        return self._records_past

    @records_past.setter
    def records_past(self, value: bool) -> None:
        self.commit_first()
        self._records_past = value

    def clear(self) -> None:
        """Release all pages and have no rows."""
        self.edits.copies.clear()
        self.roll_back()
        self.rows.clear()

    def select(self, indices: Sequence[int]) -> None:
        """Let row `i` be what row `indices[i]` was.

        Raises:
            ValueError: if a row does not exist; nothing has changed.
        """
        self.end_step()
        if self.rows.columns.count:  # else as for Transformers' own caches
            self.rows.select(self.rows.existing(indices))

    def release(self, rows: Sequence[int]) -> None:
        """Give back the pages of rows that are finished.

        Raises:
            ValueError: if a row does not exist; nothing has changed.
        """
        self.end_step()
        self.rows.release(sorted(set(self.rows.existing(rows))))

    def become_fork_of(self, other: Self) -> None:
        """Hold what `other` holds, sharing its pages."""
        other.end_step()
        self.clear()
        self.rows = other.rows.fork()
        self._records_past = other._records_past
        self.progress.num_layers = other.progress.num_layers
        self.salt = other.salt

    def exchange(self, other: Self) -> None:
        """Hold what `other` holds, and let it hold what this does."""
        self.rows, other.rows = other.rows, self.rows
