"""How many tokens are worth drafting."""

import numpy as np
import numpy.typing as npt
import torch

from hf_paged.batch.padding import BoolVector, Counts

Floats = npt.NDArray[np.float64]

_WIDTHS = 1, 2, 3, 4, 6, 8, 12, 16, 24, 32  # tokens of each row that a pass has: few, as kernels are made for them
# Tokens over which a pass takes twice as long as over none, since it computes as long as it reads weights.
_BALANCE_ON_CPU, _BALANCE = 40, 256
FIRST_HITS = 0.8
"""The share of drafted tokens that is taken for right as long as nothing is known."""
_NEWS = 0.3  # weight of one pass in what is known of a row
_FORGETTING = 0.005  # weight of knowing nothing, in each pass that tells nothing


class Budget:
    """Chooses how many tokens are drafted for each row, by what came of the last ones.

    All rows of a pass are equally wide. So a width is worth its cost if the tokens that all rows together may be
    expected to gain by it make up for it. Rows that nothing is drafted for are watched, where it costs nothing to know
    what would have been drafted; else what is known of them is forgotten little by little, so that they are tried
    again. Nothing here depends on time: the same call drafts the same tokens again.

    Args:
        num_rows: for which drafts succeed or fail apart.
        num_tokens: to draft at most.
        batch_size: rows of a pass.
        device: of the model.
        cost: of drafting one token, as `Drafter.cost`.

    Attributes:
        hits: `(num_rows,)` the share of drafted tokens that is taken for right.
    """

    def __init__(self, num_rows: int, num_tokens: int, batch_size: int, device: torch.device, cost: float) -> None:
        self.hits = np.full(num_rows, FIRST_HITS)
        self._widths = np.array([width for width in _WIDTHS if width <= num_tokens + 1])
        balance = _BALANCE_ON_CPU if device.type == "cpu" else _BALANCE
        self._forgetting = _FORGETTING if cost > 0 else 0.0
        extra = self._widths - 1
        self._costs = 1 + extra * (batch_size / (balance + batch_size) + cost) + (extra > 0) * cost

    @property
    def max_drafted(self) -> int:
        """Tokens of a row that are drafted at most."""
        return int(self._widths[-1]) - 1

    def choose(self, available: Counts, is_going: BoolVector) -> Counts:
        """Return how many tokens to draft of each row.

        Args:
            available: `(num_rows,)` how many there would be.
            is_going: `(num_rows,)` bool, rows that have not ended.
        """
        available = np.minimum(np.where(is_going, available, 0), self.max_drafted)
        if not available.any():
            return np.zeros_like(available)
        powers = self.hits[:, None] ** np.arange(self.max_drafted + 1)
        expected = powers.cumsum(axis=1)  # tokens of a row with 0, 1, ... drafted ones
        drafted = np.minimum(available[:, None], self._widths - 1)
        gained = (np.take_along_axis(expected, drafted, axis=1) * is_going[:, None]).sum(axis=0)
        return np.asarray(drafted[:, int(np.argmax(gained / self._costs))])

    def note(self, drafted: Counts, accepted: Counts, is_foreseen: Floats) -> None:
        """Learn from a pass.

        Args:
            drafted: `(batch_size,)` how many tokens of each row were drafted.
            accepted: `(batch_size,)` how many of them were right.
            is_foreseen: `(batch_size,)` 1 or 0, whether the token that came is the one that would have been drafted;
                NaN where that is not known.
        """
        share = accepted / np.maximum(np.minimum(drafted, accepted + 1), 1)
        share = np.where(drafted > 0, share, is_foreseen)
        if len(self.hits) == 1 and not np.isnan(share).all():
            share = np.nanmin(share, keepdims=True)  # as far as the slowest row
        is_known = ~np.isnan(share[: len(self.hits)])
        news = np.where(is_known, _NEWS * (share - self.hits), self._forgetting * (FIRST_HITS - self.hits))
        self.hits = self.hits + news
