"""How much memory is held, and how little would do."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from hf_paged.pages.views.report import report


class HoldsStates(Protocol):
    """What holds the states of recurrent layers."""

    @property
    def tensors(self) -> Sequence[Tensor]:
        """All of them."""
        ...


def bytes_of_states(holders: Iterable[HoldsStates]) -> int:
    """Count the bytes of states, of tensors that several have once."""
    tensors = {id(tensor): tensor for holder in holders for tensor in holder.tensors}
    return sum(tensor.nbytes for tensor in tensors.values())


@dataclass(frozen=True)
class MemoryStats:
    """Pages and bytes of a cache or of a pool, over all layers; `print` lays them out.

    Where a model has layers with a sliding window beside others, each kind has pages of its own; pages and bytes count
    both.

    Attributes:
        num_pages: pages of the pool.
        num_free_pages: pages of the pool that nobody holds.
        num_cached_pages: pages of the pool that nobody holds but whose tokens can still be found.
        num_active_pages: pages held by this cache (for a pool: by anyone), each counted once.
        num_shared_pages: of the active pages, those with more than one holder anywhere.
        num_copied_pages: pages of the pool that were copied because a shared one was to be written, ever.
        num_tokens: tokens of all rows, padding excluded; a shared token counts once per row.
        num_unique_tokens: tokens of which a layer holds something; a shared token counts once.
        page_size: tokens per page.
        token_bytes: keys and values of one token in all layers; 0 until the first key says how large it is.
        active_bytes: bytes of the active pages.
        live_bytes: bytes of the slots in use.
        shared_bytes: what sharing saves: what the same rows would hold more without it.
        reserved_bytes: storage of the whole pool. On CPU the operating system backs only what was touched.
        padded_bytes: what the same caches would hold without pages: every row of one as wide as its longest, and
            nothing shared.
        num_looked_up_tokens: tokens that `prefill` has looked for in the pool's prefix index, ever.
        num_hit_tokens: of these, tokens that were found, and so were not computed.
        num_evicted_pages: cached pages of the pool that were taken for other tokens, ever.
        swapped_bytes: memory of the host that rows take which were swapped out. Nothing else here counts these rows.
        host_bytes: memory of the host that pages of prefixes take which made room for others.
        store_bytes: what the store takes, by whoever it was filled.
        num_demoted_pages: pages of the pool of which the content went to the host, ever.
        num_promoted_pages: pages of the pool of which the content was brought back from there or from the store, ever.
        state_bytes: states of recurrent layers, which are in no page: those of rows, for a pool also those behind
            prefixes, and the room that compiled steps write to. What forks share counts once.
    """

    num_pages: int
    num_free_pages: int
    num_cached_pages: int
    num_active_pages: int
    num_shared_pages: int
    num_copied_pages: int
    num_tokens: int
    num_unique_tokens: int
    page_size: int
    token_bytes: int
    active_bytes: int
    live_bytes: int
    shared_bytes: int
    reserved_bytes: int
    padded_bytes: int
    num_looked_up_tokens: int = 0
    num_hit_tokens: int = 0
    num_evicted_pages: int = 0
    swapped_bytes: int = 0
    host_bytes: int = 0
    store_bytes: int = 0
    num_demoted_pages: int = 0
    num_promoted_pages: int = 0
    state_bytes: int = 0

    def __str__(self) -> str:
        return report(self)

    @property
    def minimum_bytes(self) -> int:
        """The theoretical minimum: every distinct token that a layer may still read, stored once, and nothing else."""
        return self.live_bytes

    @property
    def wasted_bytes(self) -> int:
        """Bytes of slots in active pages that hold no token."""
        return self.active_bytes - self.live_bytes

    @property
    def hit_rate(self) -> float:
        """Part of the tokens that were looked for which was found; 0 when none were."""
        return self.num_hit_tokens / self.num_looked_up_tokens if self.num_looked_up_tokens else 0.0

    @property
    def overhead(self) -> float:
        """Bytes held beyond the minimum, as a fraction of the minimum; 0 when nothing is held."""
        return self.active_bytes / self.live_bytes - 1.0 if self.live_bytes else 0.0
