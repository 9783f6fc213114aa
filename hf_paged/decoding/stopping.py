"""Criteria that do something to rows, besides saying which have ended, as to give their pages back."""

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    PrefixConstrainedLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from typing_extensions import override

from hf_paged.cache.encoder_decoder import PagedEncoderDecoderCache
from hf_paged.cache.paged import PagedCache

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


def leave_models_alone(called: Iterable[Any]) -> bool:
    """Whether processors, criteria and streamers leave the model as it is: anybody's own might switch its adapter."""
    for one in called:
        if type(one).__module__.partition(".")[0] not in ("transformers", "hf_paged"):
            return False
        calls_function = isinstance(one, PrefixConstrainedLogitsProcessor)
        if calls_function or not leave_models_alone(getattr(one, "criteria", ())):
            return False
    return True


class ReleaseFinished(ActingCriterion):
    """Releases each row of a cache as soon as it is finished, while `generate()` goes on with the others.

    `generate()` fills finished rows up with padding until the last row is done. Without this they go on growing. Pass
    it in `stopping_criteria`; it stops nothing by itself.

    Args:
        cache: the cache that is given to `generate()`.
        eos_token_id: the token, or tokens, that end a row, as in the generation configuration.
        criteria: further criteria that end a row, those that are given to `generate()`.

    Raises:
        ValueError: if neither a token nor a criterion says when a row is finished, or it is given no cache over pages.
    """

    def __init__(
        self,
        cache: PagedCache | PagedEncoderDecoderCache,
        eos_token_id: int | list[int] | None = None,
        criteria: list[StoppingCriteria] | None = None,
    ) -> None:
        if not isinstance(cache, PagedCache | PagedEncoderDecoderCache):
            raise ValueError(
                f"ReleaseFinished was given a {type(cache).__name__}, but it takes the cache that generate() is given."
            )
        if eos_token_id is None and not criteria:
            raise ValueError(
                "ReleaseFinished was given neither eos_token_id nor criteria, so no row would ever be finished. Pass "
                "eos_token_id=model.generation_config.eos_token_id."
            )
        self._cache = cache
        self._eos_token_ids = torch.tensor([] if eos_token_id is None else eos_token_id, dtype=torch.int64).view(-1)
        self.criteria = StoppingCriteriaList(criteria or [])

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Release the rows that end with this token; all False.

        Args:
            input_ids: `(num_rows, num_columns)`.
            scores: of the last token.
            **kwargs: for the criteria.

        Raises:
            ValueError: if these are not the rows of the cache, as with beams.
        """
        is_finished = self.find(input_ids, scores, **kwargs)
        self.act(is_finished.nonzero().flatten().tolist(), len(input_ids))
        return torch.zeros_like(is_finished)

    @override
    def find(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self._eos_token_ids = self._eos_token_ids.to(input_ids.device)
        is_finished = torch.isin(input_ids[:, -1], self._eos_token_ids)
        return is_finished | self.criteria(input_ids, scores, **kwargs) if self.criteria else is_finished

    @override
    def act(self, rows: list[int], num_rows: int) -> None:
        if num_rows != self._cache.batch_size:
            raise ValueError(
                f"ReleaseFinished was asked about {num_rows} rows, but its cache holds {self._cache.batch_size}. Give "
                "it the cache that is passed to generate(), and use it for greedy decoding and sampling only."
            )
        self._cache.release(rows)
