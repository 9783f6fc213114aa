"""How fast tokens are computed, and bytes of their pages moved."""

import math
import threading
from collections import deque

_HALF_BYTES = 64 * 2**20  # after as many more, what was measured before counts half
_LEAST_TOKENS = 64  # fewer take as long
_NUM_COMPUTED = 16  # measurements that are looked at
_PATIENCE = 100  # times that a way is passed over before it is measured again


class Speeds:
    """Running estimates, by which pages are brought from a tier or computed. Threads may share them.

    Bytes are moved in ways that have names: out of a tier, or into pages.
    """

    def __init__(self) -> None:
        self._computing: deque[float] = deque(maxlen=_NUM_COMPUTED)  # seconds per token
        self._moving: dict[str, _Rate] = {}
        self._num_passed_over: dict[str, int] = {}
        self._lock = threading.Lock()

    def note_computed(self, num_tokens: int, seconds: float) -> None:
        """Take note of how long it took to compute some tokens, if they are enough to tell."""
        if num_tokens >= _LEAST_TOKENS:
            with self._lock:
                self._computing.append(seconds / num_tokens)

    def note_moved(self, way: str, num_bytes: int, seconds: float) -> None:
        """Take note of how long it took to move some bytes."""
        with self._lock:
            self._moving.setdefault(way, _Rate()).note(num_bytes, seconds)
            self._num_passed_over[way] = 0

    def note_passed_over(self, way: str) -> None:
        """Take note that something was computed since moving it would take longer.

        After a hundred times it is not known any more how long that takes: what made it slow may be gone.
        """
        with self._lock:
            self._num_passed_over[way] = self._num_passed_over.get(way, 0) + 1
            if self._num_passed_over[way] >= _PATIENCE:
                self._num_passed_over[way] = 0
                self._moving.pop(way, None)

    def knows(self, way: str) -> bool:
        """Whether anything was moved that way lately; if not, a single page shows how long it takes."""
        with self._lock:
            return way in self._moving

    def seconds_to_compute(self, num_tokens: int) -> float:
        """How long it takes at best, as what is compiled on the way is not compiled again; infinite if not known."""
        with self._lock:
            return num_tokens * min(self._computing) if self._computing else math.inf

    def seconds_to_move(self, way: str, num_bytes: int) -> float:
        """How long it takes on average; 0 if not known."""
        with self._lock:
            rate = self._moving.get(way)
            return 0.0 if rate is None else num_bytes * rate.seconds_per_byte


class _Rate:
    """An average of what was moved, what was moved last counting most."""

    def __init__(self) -> None:
        self._num_bytes = 0.0
        self._seconds = 0.0

    @property
    def seconds_per_byte(self) -> float:
        return self._seconds / self._num_bytes

    def note(self, num_bytes: int, seconds: float) -> None:
        kept = 0.5 ** (num_bytes / _HALF_BYTES)
        self._num_bytes = kept * self._num_bytes + num_bytes
        self._seconds = kept * self._seconds + seconds
