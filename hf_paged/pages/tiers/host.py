"""The tier in memory of the host."""

import threading
from collections import OrderedDict, deque
from itertools import count
from typing import Protocol
from weakref import finalize

from torch import Tensor
from typing_extensions import override

from hf_paged.errors import OutOfPagesError
from hf_paged.pages.tiers.base import PageKey, PageTier
from hf_paged.pages.tiers.transport import host_bytes


class SetAside:
    """Bytes of a host tier that are for somebody else than its pages, for as long as this object lives."""

    def __init__(self, num_bytes: int, given_back: deque[int]) -> None:
        self.num_bytes = num_bytes
        # It may run in the middle of anything, so it takes no lock.
        finalize(self, given_back.append, num_bytes).atexit = False


class Offer(Protocol):
    """Something in pages that may be moved to the host.

    Attributes:
        turn: those with a smaller one are moved first.
    """

    turn: int

    def move(self) -> bool:
        """Move it; return whether its pages are free."""


class HostTier(PageTier):
    """The content of pages in memory of the host, and of rows that were swapped out. Threads may share it.

    What is set aside for rows comes first. Pages have the rest, and the least recently used make room.

    Args:
        max_bytes: of all of it. A page that is on its way to the next tier counts no more.
        next_tier: is given the pages that make room for others; None: they are gone.
    """

    def __init__(self, max_bytes: int, next_tier: PageTier | None = None) -> None:
        self.max_bytes = max_bytes
        self.next_tier = next_tier
        self._contents: OrderedDict[PageKey, Tensor] = OrderedDict()  # the one that was used last comes last
        self._num_bytes = 0
        self._set_aside_bytes = 0
        self._given_back: deque[int] = deque()
        self.turns = count()
        """For who has something to offer."""
        self._offers: dict[int, Offer] = {}  # by turn; each operation is one of Python's own: finalisers take no lock
        self._lock = threading.Lock()

    @property
    def num_pages(self) -> int:
        """Pages that can be found."""
        return len(self._contents)

    @property
    @override
    def num_bytes(self) -> int:
        return self._num_bytes

    @property
    def set_aside_bytes(self) -> int:
        """Bytes of rows that were swapped out."""
        with self._lock:
            return self._count_set_aside()

    @override
    def put(self, key: PageKey, content: Tensor) -> None:
        size = host_bytes(content)
        with self._lock:
            if key in self._contents:
                self._contents.move_to_end(key)
                return
            room = self.max_bytes - self._count_set_aside()
            if size > room:
                dropped = [(key, content)]
            else:
                dropped = self._drop_beyond(room - size)
                self._contents[key] = content
                self._num_bytes += size
        self._hand_down(dropped)

    @override
    def get(self, key: PageKey) -> Tensor | None:
        with self._lock:
            content = self._contents.get(key)
            if content is not None:
                self._contents.move_to_end(key)
            return content

    @override
    def __contains__(self, key: PageKey) -> bool:
        return key in self._contents

    def contents(self) -> list[tuple[PageKey, Tensor]]:
        """All pages."""
        with self._lock:
            return list(self._contents.items())

    def clear(self) -> None:
        """Drop all pages."""
        with self._lock:
            self._contents.clear()
            self._num_bytes = 0

    def set_aside(self, num_bytes: int) -> SetAside:
        """Let somebody else have some of the bytes, for as long as what is returned lives.

        Raises:
            OutOfPagesError: if there are too few, even without any page; nothing has changed.
        """
        with self._lock:
            room = self.max_bytes - self._count_set_aside() - num_bytes
            if room < 0:
                raise OutOfPagesError(
                    f"Swapping out needs {num_bytes:,} bytes of the host, but of host_bytes={self.max_bytes:,} only "
                    f"{room + num_bytes:,} are not taken by rows that were swapped out before. Raise host_bytes, or "
                    "reset() or delete caches that are done."
                )
            dropped = self._drop_beyond(room)
            self._set_aside_bytes += num_bytes
        self._hand_down(dropped)
        return SetAside(num_bytes, self._given_back)

    def offer(self, offer: Offer) -> None:
        """Let something be moved here once pages run short."""
        self._offers[offer.turn] = offer

    def withdraw(self, offer: Offer) -> bool:
        """Let it be moved no more; return whether nobody has begun to."""
        return self._offers.pop(offer.turn, None) is not None

    def move_one(self) -> bool:
        """Free the pages of what was offered first, or of the next that there is room for; return whether any is."""
        for turn in sorted(self._offers):
            offer = self._offers.pop(turn, None)
            if offer is not None and offer.move():
                return True
        return False

    def _count_set_aside(self) -> int:
        while self._given_back:
            self._set_aside_bytes -= self._given_back.popleft()
        return self._set_aside_bytes

    def _drop_beyond(self, room: int) -> list[tuple[PageKey, Tensor]]:
        """Take out the least recently used pages until the others need no more than `room` bytes."""
        dropped = []
        while self._num_bytes > room:
            key, content = self._contents.popitem(last=False)
            self._num_bytes -= host_bytes(content)
            dropped.append((key, content))
        return dropped

    def _hand_down(self, dropped: list[tuple[PageKey, Tensor]]) -> None:
        # Without the lock: it may take long.
        if self.next_tier is not None:
            for key, content in dropped:
                self.next_tier.put(key, content)
