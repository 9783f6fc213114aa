"""A slow tier that is written beside everything else."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor
from typing_extensions import override

from hf_paged.pages.tiers.base import PageKey, PageTier

_MAX_BYTES = 256 * 2**20  # that wait, unless a single page is larger


class WriteBehind(PageTier):
    """Writes pages into a tier by a thread of its own, so that nobody waits who only needs room.

    Pages that come faster than they are written are not kept. What waits can be found, and is written before the
    process ends.

    Args:
        tier: that is written.
    """

    def __init__(self, tier: PageTier) -> None:
        self._tier = tier
        self._waiting: dict[PageKey, Tensor] = {}
        self._num_bytes = 0
        self._last: Future[None] | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="hf-paged-writer")
        self._lock = threading.Lock()

    @property
    @override
    def num_bytes(self) -> int:
        return self._tier.num_bytes

    @override
    def put(self, key: PageKey, content: Tensor) -> None:
        with self._lock:
            is_full = self._waiting and self._num_bytes + content.nbytes > _MAX_BYTES
            if key not in self._waiting and not is_full:
                self._waiting[key] = content
                self._num_bytes += content.nbytes
                self._last = self._writer.submit(self._write, key, content)

    @override
    def get(self, key: PageKey) -> Tensor | None:
        content = self._waiting.get(key)
        return self._tier.get(key) if content is None else content

    @override
    def __contains__(self, key: PageKey) -> bool:
        return key in self._waiting or key in self._tier

    def flush(self) -> None:
        """Wait until all is written that waits now."""
        if self._last is not None:
            self._last.result()

    def _write(self, key: PageKey, content: Tensor) -> None:
        try:
            self._tier.put(key, content)
        finally:
            with self._lock:
                del self._waiting[key]
                self._num_bytes -= content.nbytes
