"""Criteria that do something to rows, besides saying which have ended."""

from abc import abstractmethod
from typing import Any

from torch import Tensor
from transformers import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

_OF_TENSORS = {EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria}


class ActingCriterion(StoppingCriteria):
    """A criterion that ends nothing, but does something to some rows between two passes.

    To `generate()` it is one as any other. `hf_paged.sample` has the rows found while the device goes on, and lets it
    act on them once they are known.

    Attributes:
        criteria: others that it asks.
    """

    criteria: StoppingCriteriaList

    @abstractmethod
    def find(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return `(num_rows,)` bool, which rows to act on; arguments as for any criterion."""

    @abstractmethod
    def act(self, rows: list[int], num_rows: int) -> None:
        """Act on rows that were found, of `num_rows`."""


def waits_for_values(criterion: StoppingCriteria) -> bool:
    """Whether a criterion may have the host wait for what tensors hold. Only those that are known do not."""
    if isinstance(criterion, ActingCriterion):
        return any(map(waits_for_values, criterion.criteria))
    return type(criterion) not in _OF_TENSORS
