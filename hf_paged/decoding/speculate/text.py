"""What all rows say, on the host: tokens that are known, and guesses behind them."""

import numpy as np
import torch
from torch import Tensor

from hf_paged.batch.padding import Counts


class Text:
    """The tokens of all rows, which need not be equally far.

    Args:
        input_ids: `(num_rows, num_columns)`, the prompt.

    Attributes:
        ids: `(num_rows, any)` of all columns. Behind those that are known there may be guesses.
        known: `(num_rows,)` columns of each row that are known.
        num_prompt: columns of the prompt.
    """

    def __init__(self, input_ids: Tensor) -> None:
        self._prompt = input_ids
        self.ids: Counts = input_ids.cpu().numpy().astype(np.int64)
        num_rows, self.num_prompt = self.ids.shape
        self.known: Counts = np.full(num_rows, self.num_prompt)

    def guess(self, tokens: Counts) -> None:
        """Put `(num_rows, num_guessed)` tokens behind those that are known."""
        if not tokens.shape[1]:
            return
        self.widen(tokens.shape[1])
        columns = self.known[:, None] + np.arange(tokens.shape[1])
        np.put_along_axis(self.ids, columns, tokens, axis=1)

    def add(self, tokens: Counts, counts: Counts) -> None:
        """Know `counts[row]` more tokens of each row, the first ones of `(num_rows, any)`."""
        self.guess(tokens)
        self.known = self.known + counts

    def fill_up(self, rows: Counts, token: int) -> None:
        """Let rows be as long as the longest one, with this token."""
        length = int(self.known.max())
        for row in rows.tolist():
            self.ids[row, self.known[row] : length] = token
        self.known[rows] = length

    @property
    def device(self) -> torch.device:
        """Where the prompt is."""
        return self._prompt.device

    def pad(self, rows: Counts, num_more: int, token: int) -> None:
        """Put a token into the next columns behind those that are known of some rows."""
        self.widen(num_more)
        for row in rows.tolist():
            self.ids[row, self.known[row] : self.known[row] + num_more] = token

    def at(self, begins: Counts, num_columns: int) -> Counts:
        """`(num_rows, num_columns)` tokens of each row from its column of `begins` on."""
        self.widen(num_columns)
        return np.take_along_axis(self.ids, begins[:, None] + np.arange(num_columns), axis=1)

    def next_to(self, columns: Counts) -> Counts:
        """`(num_rows,)` the token in a column of each row; whatever where that is behind all that are known."""
        return np.asarray(self.ids[np.arange(len(columns)), np.minimum(columns, self.ids.shape[1] - 1)])

    def widen(self, num_more: int) -> None:
        """Have room for so many guesses behind each row."""
        missing = int(self.known.max()) + num_more - self.ids.shape[1]
        if missing > 0:
            self.ids = np.pad(self.ids, ((0, 0), (0, missing + self.ids.shape[1] // 2)))

    def up_to(self, num_columns: int, rows: Counts | slice = slice(None)) -> Tensor:
        """The first columns of all rows, or of some, `(num_rows, num_columns)`, where the prompt is."""
        return torch.from_numpy(self.ids[rows, :num_columns]).to(self._prompt)
