"""What is kept of a batch of windows."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Score:
    """What one cache made of a batch of windows.

    Attributes:
        nll: of each window, the sum over its scored tokens, nats.
        squared_difference: of the NLL from the reference's, squared, the sum over the scored tokens of the batch.
        kl: from the reference, the sum over the scored tokens of the batch, nats.
        max_logit_difference: from the reference, the largest over the vocabulary and the scored tokens.
        num_agreeing: scored tokens for which the reference finds the same token the likeliest.
        seconds: of the forward passes.
        kv_bytes: keys and values held, at most.
    """

    nll: list[float]
    squared_difference: float
    kl: float
    max_logit_difference: float
    num_agreeing: int
    seconds: float
    kv_bytes: int


@dataclass(frozen=True)
class Record:
    """A finished batch.

    Attributes:
        batch: its index among all batches.
        scores: by the name of the cache.
    """

    batch: int
    scores: dict[str, Score]

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON has it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Record":
        """The record that `to_dict` gave, to the last bit."""
        return cls(data["batch"], {name: Score(**score) for name, score in data["scores"].items()})
