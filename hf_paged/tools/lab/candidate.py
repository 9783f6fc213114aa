"""A cache that is compared with others on one model, with the attention that goes with it."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from hf_paged.attention.mask import NAME
from hf_paged.cache.paged import PagedCache


@dataclass(frozen=True)
class Candidate:
    """A kind of cache, and a model object whose attention is the one for it.

    Attributes:
        name: one of `CANDIDATES`.
        model: shares its weights with those of the other candidates.
        new_cache: makes an empty cache for up to that many columns.
    """

    name: str
    model: PreTrainedModel
    new_cache: Callable[[int], Cache]


def sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model, its configuration included, but none of its weights and buffers."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


def _dynamic(model: PreTrainedModel, page_size: int) -> Callable[[int], Cache]:
    return lambda max_length: DynamicCache(config=model.config)


def _static(model: PreTrainedModel, page_size: int) -> Callable[[int], Cache]:
    return lambda max_length: StaticCache(config=model.config, max_cache_len=max_length)


def _paged(model: PreTrainedModel, page_size: int) -> Callable[[int], Cache]:
    return lambda max_length: PagedCache.from_model(model, page_size=page_size)


CANDIDATES = {"dynamic": (_dynamic, "sdpa"), "paged": (_paged, NAME), "static": (_static, "sdpa")}
"""By name: what makes its caches, and the attention it is read by."""


def candidates(model: PreTrainedModel, names: Sequence[str], page_size: int) -> list[Candidate]:
    """Make candidates for one model.

    Args:
        model: is not changed.
        names: of `CANDIDATES`, in the order wanted.
        page_size: tokens per page, where there are pages.

    Raises:
        ValueError: for a name that is none of `CANDIDATES`.
    """
    unknown = [name for name in names if name not in CANDIDATES]
    if unknown:
        raise ValueError(f"Caches {unknown} were asked for; there are {', '.join(CANDIDATES)}.")
    made = []
    for name in names:
        maker, attention = CANDIDATES[name]
        own = sharing_weights(model)
        own.set_attn_implementation(attention)
        made.append(Candidate(name, own, maker(own, page_size)))
    return made
