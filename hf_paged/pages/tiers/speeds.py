"""How fast pages are computed, and brought from each tier."""

import threading

_KEPT = 0.8  # of what was measured before, each time that something is measured
_PATIENCE = 100  # times that a tier is passed over before it is measured again


class Speeds:
    """Running estimates, by which pages are brought from a tier or computed. Threads may share them."""

    def __init__(self) -> None:
        self._computing = _Rate()
        self._bringing: dict[str, _Rate] = {}
        self._num_refused: dict[str, int] = {}
        self._lock = threading.Lock()

    def note_computed(self, num_tokens: int, seconds: float) -> None:
        """Take note of how long it took to compute some tokens."""
        with self._lock:
            self._computing.note(num_tokens, seconds)

    def note_brought(self, tier: str, num_bytes: int, seconds: float) -> None:
        """Take note of how long it took to bring pages from a tier to their device."""
        with self._lock:
            self._bringing.setdefault(tier, _Rate()).note(num_bytes, seconds)
            self._num_refused[tier] = 0

    def knows(self, tier: str) -> bool:
        """Whether anything was brought from a tier lately; if not, a single page shows how long it takes."""
        with self._lock:
            return tier in self._bringing

    def favors(self, tier: str, num_bytes: int, num_tokens: int) -> bool:
        """Whether bringing pages is expected to be faster than computing them, or one of both is not known yet.

        A tier that was passed over a hundred times is not known any more: what made it slow may be gone.

        Args:
            tier: where they are.
            num_bytes: of all of them.
            num_tokens: that they hold.
        """
        with self._lock:
            bringing, computing = self._bringing.get(tier), self._computing
            if bringing is None or not computing.amount:
                return True
            if num_bytes * bringing.seconds_each < num_tokens * computing.seconds_each:
                return True
            self._num_refused[tier] += 1
            if self._num_refused[tier] == _PATIENCE:
                del self._bringing[tier]
            return False


class _Rate:
    """Seconds for each of many, what was measured last counting most."""

    def __init__(self) -> None:
        self.amount = 0.0
        self._seconds = 0.0

    @property
    def seconds_each(self) -> float:
        return self._seconds / self.amount

    def note(self, amount: int, seconds: float) -> None:
        self.amount = _KEPT * self.amount + amount
        self._seconds = _KEPT * self._seconds + seconds
