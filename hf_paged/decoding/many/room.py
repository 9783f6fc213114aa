"""Whether the pages of a pool have room for another prompt."""

import math
from collections.abc import Hashable, Sequence

import numpy as np
from transformers import PreTrainedModel

from hf_paged._transformers import recurrent_layer
from hf_paged.pages.group import PageGroup
from hf_paged.pages.pool import PagePool


def growing_pool(model: PreTrainedModel, page_size: int) -> PagePool:
    """Make a pool that grows as rows need it, and keeps what they leave until others need the pages."""
    pool = PagePool.from_model(model, page_size=page_size, prefix_cache=recurrent_layer(model.config) is None)
    for group in pool.groups:
        group.evicts_first = True
    return pool


class Room:
    """Pages that are free or can be made free, as prompts are given some of them.

    A guess: what layers with a window keep of a prompt is counted as a window, and other holders of the pool may be
    faster. Too little room is found out by `OutOfPagesError`.

    Args:
        pool: where the pages are.
        kept_free: of each group of layers, for the rows that are running.
    """

    def __init__(self, pool: PagePool, kept_free: int) -> None:
        self._pool = pool
        self._left = [_available(group) - kept_free for group in pool.groups]

    def take(self, ids: Sequence[int], origin: Hashable | None = None) -> bool:
        """Take what a prompt needs; return whether there is as much.

        Args:
            ids: its tokens.
            origin: what computes it: pages of the same origin that rows hold anyway are not counted. None: all are.
        """
        held = [0] * len(self._left) if origin is None else self._held(ids, origin)
        needed = [_needed(group, len(ids)) - count for group, count in zip(self._pool.groups, held, strict=True)]
        if any(count > left for count, left in zip(needed, self._left, strict=True)):
            return False
        self._left = [left - count for left, count in zip(self._left, needed, strict=True)]
        return True

    def _held(self, ids: Sequence[int], origin: Hashable) -> list[int]:
        """Pages of each group with the beginning of a prompt that somebody holds."""
        index = self._pool.prefix_index
        if index is None or all(left == math.inf for left in self._left):
            return [0] * len(self._left)
        found = index.match(origin, np.array(ids[:-1], dtype="<i4").tobytes())
        counts = []
        for group, pages in zip(self._pool.groups, found.pages, strict=True):
            group.allocator.release(pages)
            counts.append(sum(group.allocator.num_holders(page) > 0 for page in pages))
        return counts


def _available(group: PageGroup) -> float:
    if group.max_pages is None:
        return math.inf
    return group.max_pages - group.num_pages + group.allocator.num_free + group.allocator.num_cached


def _needed(group: PageGroup, num_tokens: int) -> int:
    """Pages for a prompt, and one to go on with."""
    kept = num_tokens if group.window is None else min(num_tokens, group.window)
    return -(-kept // group.page_size) + 1
