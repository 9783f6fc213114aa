"""How much memory is held, and how little would do."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryStats:
    """Pages and bytes of a cache or of a pool, over all layers.

    Attributes:
        num_pages: pages of the pool.
        num_free_pages: pages of the pool that nobody holds.
        num_cached_pages: pages of the pool that nobody holds but whose tokens can still be found.
        num_active_pages: pages held by this cache (for a pool: by anyone), each counted once.
        num_shared_pages: of the active pages, those with more than one holder anywhere.
        num_tokens: tokens of all rows, padding excluded; a shared token counts once per row.
        num_unique_tokens: token slots in use; a shared token counts once.
        page_size: tokens per page.
        token_bytes: keys and values of one token; 0 until the first key says how large it is.
        reserved_bytes: storage of the whole pool. On CPU the operating system backs only what was touched.
    """

    num_pages: int
    num_free_pages: int
    num_cached_pages: int
    num_active_pages: int
    num_shared_pages: int
    num_tokens: int
    num_unique_tokens: int
    page_size: int
    token_bytes: int
    reserved_bytes: int

    @property
    def active_bytes(self) -> int:
        """Bytes of the active pages."""
        return self.num_active_pages * self.page_size * self.token_bytes

    @property
    def live_bytes(self) -> int:
        """Bytes of the slots in use."""
        return self.num_unique_tokens * self.token_bytes

    @property
    def minimum_bytes(self) -> int:
        """The theoretical minimum: every distinct token held, stored once, and nothing else."""
        return self.live_bytes

    @property
    def wasted_bytes(self) -> int:
        """Bytes of slots in active pages that hold no token."""
        return self.active_bytes - self.live_bytes

    @property
    def shared_bytes(self) -> int:
        """Bytes that sharing saves: what the same rows would hold more without it."""
        return (self.num_tokens - self.num_unique_tokens) * self.token_bytes

    @property
    def overhead(self) -> float:
        """Bytes held beyond the minimum, as a fraction of the minimum; 0 when nothing is held."""
        if self.num_unique_tokens == 0:
            return 0.0
        return self.num_active_pages * self.page_size / self.num_unique_tokens - 1.0
