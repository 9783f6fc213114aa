"""Who holds which page. No torch here: pages are integers."""

import threading
from array import array
from collections import deque
from collections.abc import Collection, Sequence
from itertools import islice

from hf_paged.errors import OutOfPagesError


class PageAllocator:
    """A free list with reference counts. Every operation takes constant time per page; threads may share it.

    A page is free, active (somebody holds it) or cached: nobody holds it, but the prefix index can still hand it out.

    To take one page, and to give back one that nobody else holds, takes no lock: threads that wait for one lock wake
    each other for every page. Those two pop from the list of free pages and append to it, which Python does in one go;
    so nothing else may do more than that with the list, or put another in its place. A page that is just changing
    hands is not in the list, and counts as held.

    Args:
        num_pages: pages that exist; `grow` adds more.
        watermark: pages that `allocate(..., admit=True)` leaves free for the rows that are already running.
    """

    def __init__(self, num_pages: int, watermark: int = 0) -> None:
        if num_pages < 0 or watermark < 0:
            raise ValueError(f"num_pages={num_pages} and watermark={watermark} were asked for; both must be >= 0.")
        self.watermark = watermark
        self._ref_counts = array("i", bytes(4 * num_pages))
        self._is_indexed = bytearray(num_pages)
        self._cached: dict[int, None] = {}  # the one that was given back first is the first
        self._free: list[int] = []  # released pages, a stack
        self._num_touched = 0  # pages from here on have never been handed out
        self._num_shared = 0
        self._lock = threading.Lock()
        self._dropped: deque[Sequence[int]] = deque()

    @property
    def num_pages(self) -> int:
        """Pages that exist."""
        return len(self._ref_counts)

    @property
    def num_touched(self) -> int:
        """Pages at the beginning that somebody holds or held; what is behind them was never handed out."""
        return self._num_touched

    @property
    def num_free(self) -> int:
        """Pages that nobody holds, and that nobody can find."""
        with self._lock:
            self._collect()
            return self._count_free()

    @property
    def num_active(self) -> int:
        """Pages that somebody holds."""
        with self._lock:
            self._collect()
            return self.num_pages - self._count_free() - len(self._cached)

    @property
    def num_cached(self) -> int:
        """Pages that nobody holds, but that the prefix index can hand out."""
        with self._lock:
            self._collect()
            return len(self._cached)

    @property
    def num_shared(self) -> int:
        """Pages with more than one holder."""
        with self._lock:
            self._collect()
            return self._num_shared

    def num_holders(self, page: int) -> int:
        """Number of holders of `page`."""
        if self._dropped:
            with self._lock:
                self._collect()
        return self._ref_counts[page]

    def ref_count(self, page: int) -> int:
        """Number of holders of `page`, the prefix index included; a page with more than one is never written."""
        return self.num_holders(page) + self._is_indexed[page]

    def allocate(self, count: int, *, admit: bool = False) -> list[int]:
        """Take `count` free pages, each with one holder.

        Args:
            count: pages to take.
            admit: the pages are for rows that hold nothing yet; the watermark stays free.

        Raises:
            OutOfPagesError: if there are fewer; nothing is taken.
        """
        if count == 1 and not admit and not self._dropped:
            try:
                page = self._free.pop()
            except IndexError:
                pass
            else:
                self._ref_counts[page] = 1
                return [page]
        with self._lock:
            self._collect()
            pages = self._take(count, self.watermark if admit else 0)
            for page in pages:
                self._ref_counts[page] = 1
            return pages

    def retain(self, pages: Sequence[int], times: int = 1) -> None:
        """Add `times` holders to each of `pages`, which the caller holds, or has found in the prefix index.

        Raises:
            ValueError: if a page is free, or `times` is below 1; nothing is retained.
        """
        if times < 1:
            raise ValueError(f"times={times} holders were to be added; at least 1 is needed.")
        with self._lock:
            counts = self._ref_counts
            for page in pages:
                if not 0 <= page < len(counts) or counts[page] + self._is_indexed[page] < 1:
                    raise ValueError(f"Page {page} has no holder, so it can't be shared.")
            for page in pages:
                count = counts[page]
                if count == 0:
                    del self._cached[page]
                self._num_shared += count <= 1 < count + times
                counts[page] = count + times

    def release(self, pages: Sequence[int]) -> None:
        """Drop one holder from each of `pages`; a page without holders is free at once, or cached.

        Of pages that become cached together the last ones are evicted first.

        Raises:
            ValueError: if a page has no holder; nothing is released.
        """
        counts = self._ref_counts
        # Whoever lets a page be indexed holds it, so that it can't be just now, by somebody else.
        if len(pages) == 1 and 0 <= (page := pages[0]) < len(counts) and counts[page] == 1 > self._is_indexed[page]:
            counts[page] = 0
            self._free.append(page)
            return
        with self._lock:
            self._release(pages)

    def release_later(self, pages: Sequence[int]) -> None:
        """Like `release`, at the next operation. For finalisers, which may run while this thread holds the lock."""
        self._dropped.append(pages)

    def index(self, pages: Sequence[int]) -> None:
        """Let the prefix index hand out `pages`, which the caller holds, once nobody does."""
        with self._lock:
            for page in pages:
                self._is_indexed[page] = True

    def unindex(self, pages: Sequence[int]) -> None:
        """Take `pages` out of the prefix index; those that nobody holds are free."""
        with self._lock:
            for page in pages:
                self._is_indexed[page] = False
                if page in self._cached:
                    del self._cached[page]
                    self._free.append(page)

    def oldest_cached(self, count: int) -> list[int]:
        """Up to `count` of the cached pages, those first that were given back first."""
        with self._lock:
            self._collect()
            return list(islice(self._cached, count))

    def grow(self, num_pages: int) -> None:
        """Let there be `num_pages` pages, if there are fewer."""
        with self._lock:
            self._is_indexed.extend(bytes(max(0, num_pages - self.num_pages)))
            self._ref_counts.extend([0] * (num_pages - self.num_pages))

    def shrink(self, num_kept: int = 0) -> int:
        """Forget free pages at the end, but none of the first `num_kept`; return how many pages stay."""
        with self._lock:
            self._collect()
            free = self._pop(self.num_pages)
            droppable, remaining = set(free), self.num_pages
            while remaining > num_kept and (remaining > self._num_touched or remaining - 1 in droppable):
                remaining -= 1
            del self._ref_counts[remaining:], self._is_indexed[remaining:]
            self._num_touched = min(self._num_touched, remaining)
            self._free.extend(sorted((page for page in free if page < remaining), reverse=True))
            return remaining

    def check_integrity(self, holders: dict[int, int], indexed: Collection[int] = ()) -> None:
        """Compare with an independent count; raise RuntimeError where the books don't balance.

        Args:
            holders: page to number of holders, for every page that somebody holds.
            indexed: pages that the prefix index can hand out.
        """
        with self._lock:
            self._collect()
            counted = {page: count for page, count in enumerate(self._ref_counts) if count}
            if counted != holders:
                wrong = {page for page in counted.keys() | holders.keys() if counted.get(page) != holders.get(page)}
                raise RuntimeError(f"Reference counts differ from the holders at pages {sorted(wrong)[:10]}.")
            if {page for page, flag in enumerate(self._is_indexed) if flag} != set(indexed):
                raise RuntimeError("The pages that are said to be indexed aren't those that the prefix index has.")
            if self._cached.keys() != set(indexed) - counted.keys():
                raise RuntimeError("The cached pages aren't those that are indexed and that nobody holds.")
            free = [*self._free, *range(self._num_touched, self.num_pages)]
            others = counted.keys() | self._cached.keys()
            if len(set(free)) != len(free) or set(free) & others or len(free) + len(others) != self.num_pages:
                raise RuntimeError(
                    f"{len(free)} free, {len(counted)} held and {len(self._cached)} cached pages don't make "
                    f"{self.num_pages} pages."
                )
            if self._num_shared != sum(count > 1 for count in counted.values()):
                raise RuntimeError(f"{self._num_shared} pages are said to be shared, which is not so.")

    def _take(self, count: int, held_back: int) -> list[int]:
        is_enough = count <= self._count_free() - held_back
        pages = self._pop(count) if is_enough else []
        missing = count - len(pages)
        if not is_enough or missing > self.num_pages - self._num_touched:
            self._free.extend(reversed(pages))
            kept = f" ({held_back} of them held back for running rows)" if held_back else ""
            cached = f" and {len(self._cached)} can be evicted" if self._cached else ""
            raise OutOfPagesError(
                f"This step needs {count} more pages, but {self._count_free()} of {self.num_pages} are free"
                f"{kept}{cached}. "
                "Raise num_pages, or free pages: reset() or delete caches that are done."
            )
        pages.extend(range(self._num_touched, self._num_touched + missing))
        self._num_touched += missing
        return pages

    def _pop(self, count: int) -> list[int]:
        """Up to `count` of the released pages, the last one first."""
        pages: list[int] = []
        try:
            while len(pages) < count:
                pages.append(self._free.pop())
        except IndexError:  # other threads may have been faster
            pass
        return pages

    def _count_free(self) -> int:
        return len(self._free) + self.num_pages - self._num_touched

    def _collect(self) -> None:
        while self._dropped:
            self._release(self._dropped.popleft())

    def _release(self, pages: Sequence[int]) -> None:
        counts, num_pages = self._ref_counts, self.num_pages
        freed: list[int] = []
        cached: list[int] = []
        num_unshared = 0
        for done, page in enumerate(pages):
            count = counts[page] if 0 <= page < num_pages else 0
            if count == 1:
                (cached if self._is_indexed[page] else freed).append(page)
            elif count == 2:
                num_unshared += 1
            elif count == 0:
                for undone in pages[:done]:
                    counts[undone] += 1
                raise ValueError(f"Page {page} was released more often than it was held.")
            counts[page] = count - 1
        self._num_shared -= num_unshared
        self._free.extend(freed)
        self._cached.update(dict.fromkeys(reversed(cached)))
