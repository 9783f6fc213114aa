"""Pages of prefixes that have left their device, and how they come back."""

import logging
import threading
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache as once
from hashlib import sha256
from time import perf_counter

from torch import Tensor

from hf_paged.errors import OutOfPagesError
from hf_paged.pages.group import PageGroup
from hf_paged.pages.prefix_index import TOKEN_BYTES, Prefix, unseen_tokens
from hf_paged.pages.tiers.arrivals import INTO_PAGES, Arrivals, CopyStreams
from hf_paged.pages.tiers.base import PageKey, PageTier
from hf_paged.pages.tiers.host import HostTier
from hf_paged.pages.tiers.speeds import Speeds
from hf_paged.pages.tiers.transport import page_bytes, read_pages

logger = logging.getLogger(__name__)

_READ_BYTES = 64 * 2**20  # of a tier that isn't memory, at once
_NUM_READERS = 4  # threads


class PrefixTiers:
    """Keeps the content of pages that a prefix index evicts, and brings it back where computing would take longer.

    Threads may share it.

    Args:
        groups: of the pool.
        tiers: by name, the nearest first, which is given what is evicted.
    """

    def __init__(self, groups: Sequence[PageGroup], tiers: Mapping[str, PageTier]) -> None:
        self.speeds = Speeds()
        self.num_demoted_pages = 0
        """Pages of which the content was moved off their device, ever."""
        self.num_promoted_pages = 0
        """Pages of which the content was brought back, ever."""
        self.groups = list(groups)
        self.tiers = dict(tiers)
        self._streams = CopyStreams()
        self._readers = ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="hf-paged-reader")
        self._lock = threading.Lock()

    def arrivals(self) -> Arrivals:
        """Return what knows which of the pages that are brought next are there."""
        return Arrivals(self._streams, self.speeds)

    def demote(self, group: int, pages: Sequence[int], rows: Sequence[tuple[Hashable, bytes]]) -> None:
        """Give the content of full pages to the first tier, unless it has it. If that fails, a log line says so.

        Args:
            group: of layers.
            pages: that nobody writes or takes meanwhile.
            rows: for each of them what made it, and the tokens of its row up to its end.
        """
        try:
            num_copied = self.copy(group, pages, rows, next(iter(self.tiers.values())))
        except (MemoryError, RuntimeError) as error:
            _say(str(error))
        else:
            with self._lock:
                self.num_demoted_pages += num_copied

    def copy(self, group: int, pages: Sequence[int], rows: Sequence[tuple[Hashable, bytes]], tier: PageTier) -> int:
        """Give the content of full pages to a tier, unless it has it; arguments as for `demote`.

        Returns:
            How many pages it was given.
        """
        storages = self.groups[group].storages()
        if len(storages) < len(self.groups[group].layers):
            return 0
        wanted: dict[int, PageKey] = {}
        for page, (origin, tokens) in zip(pages, rows, strict=True):
            parent = parent_of(origin, self.groups[group])
            key = PageKey(sha256(parent + tokens).digest(), parent, tokens)
            if key not in tier:
                wanted[page] = key
        for key, content in zip(wanted.values(), read_pages(storages, list(wanted)), strict=True):
            tier.put(key, content)
        return len(wanted)

    def extend(
        self, origin: Hashable, tokens: bytes, prefix: Prefix, ahead: Sequence[dict[int, int]], arrivals: Arrivals
    ) -> Prefix:
        """Go on where a prefix ends on the device, as far as that is expected to be faster than computing.

        Args:
            origin: what made the keys and values.
            tokens: of the row, int32.
            prefix: what was found on the device.
            ahead: for each group pages behind it, by their place in the row. The caller holds these as well.
            arrivals: is to be waited for before the pages are read.

        Returns:
            The longer prefix. Whoever was given it holds its pages, and no other of `prefix` and `ahead`.
        """
        row = _Row(self, origin, tokens, prefix, ahead, arrivals)
        try:
            return row.bring()
        finally:
            with self._lock:
                self.num_promoted_pages += row.num_brought

    def read(self, name: str, keys: Sequence[PageKey]) -> list[Tensor | None]:
        """Read pages of a tier; None for each that isn't there any more."""
        tier, began = self.tiers[name], perf_counter()
        contents = list(map(tier.get, keys) if isinstance(tier, HostTier) else self._readers.map(tier.get, keys))
        num_bytes = sum(content.nbytes for content in contents if content is not None)
        if num_bytes:
            self.speeds.note_moved(name, num_bytes, perf_counter() - began)
        return contents


def parent_of(origin: Hashable, group: PageGroup) -> bytes:
    """What pages of a group have in common if they hold the same tokens: what made them, and how they are laid out."""
    layers = [
        (layer, storage.key_shape, storage.value_shape, str(storage.dtype))
        for layer, storage in zip(group.layers, group.storages(), strict=False)
    ]
    return repr((origin, group.page_size, group.window, layers)).encode()


class _Row:
    """One row on its way back. Arguments as for `PrefixTiers.extend`."""

    def __init__(
        self,
        tiers: PrefixTiers,
        origin: Hashable,
        tokens: bytes,
        prefix: Prefix,
        ahead: Sequence[dict[int, int]],
        arrivals: Arrivals,
    ) -> None:
        self._tiers = tiers
        self._groups = tiers.groups
        self._arrivals = arrivals
        self._tokens = tokens
        self._page_size = tiers.groups[0].page_size
        self._first = prefix.num_pages
        self._end = len(tokens) // (self._page_size * TOKEN_BYTES)
        self._parents = [parent_of(origin, group) for group in tiers.groups]
        self._hashes = [sha256(parent) for parent in self._parents]
        self._digests: list[list[bytes]] = [[] for _ in tiers.groups]  # by place
        self._names: dict[tuple[int, int], str | None] = {}  # of the tiers that have a group's page
        self._pages = [dict(by_place) for by_place in ahead]  # all that are held, by place
        for by_place, pages, start in zip(self._pages, prefix.pages, prefix.starts, strict=True):
            by_place.update(enumerate(pages, start // self._page_size))
        self._is_given_up = False
        self.num_brought = 0

    def bring(self) -> Prefix:
        """Bring pages; return the prefix that they make."""
        try:
            end = self._first
            if all(len(group.storages()) == len(group.layers) for group in self._groups):
                end = self._bring_whole()
                while end > self._first and not self._bring_windows(end):
                    end = self._first if self._is_given_up else end - 1
            return self._prefix(end)
        except BaseException:
            self._prefix(0)
            raise

    def _bring_whole(self) -> int:
        """Bring pages of the group without a window, if there is one; return how many pages are there then."""
        for index, group in enumerate(self._groups):
            if group.window is None:
                return self._bring(index, range(self._first, self._end), None)
        return self._end

    def _bring_windows(self, end: int) -> bool:
        """Bring what the next query sees through windows behind so many pages; return whether all of it is there."""
        needed = {
            index: range(unseen_tokens(group, end) // self._page_size, end)
            for index, group in enumerate(self._groups)
            if group.window is not None
        }
        if not all(self._is_anywhere(index, place) for index, places in needed.items() for place in places):
            return False
        num_tokens = (end - self._first) * self._page_size
        return all(self._bring(index, places, num_tokens) == places.stop for index, places in needed.items())

    def _bring(self, group: int, places: range, num_tokens: int | None) -> int:
        """Bring pages of a group one behind the other, as long as that is worth it; return where they end.

        Args:
            group: its index.
            places: of the pages in the row.
            num_tokens: that need not be computed if all are there; None: as many as the pages hold.
        """
        place = places.start
        while place < places.stop:
            if place in self._pages[group]:
                place += 1
                continue
            name = self._name(group, place)
            if name is None:
                break
            most = min(places.stop, place + self._most(name, group))
            others = (stop for stop in range(place + 1, most) if not self._is_only_in(name, group, stop))
            stop = next(others, most)
            if not self._is_worth(group, range(place, stop if num_tokens is None else places.stop), num_tokens):
                self._tiers.speeds.note_passed_over(name)
                self._is_given_up = True
                break
            if not self._fill(group, range(place, stop), name):
                break
        return place

    def _fill(self, group: int, places: range, name: str) -> bool:
        """Bring pages from one tier; return whether any came."""
        contents: list[Tensor] = []
        for place, content in zip(places, self._tiers.read(name, [self._key(group, p) for p in places]), strict=True):
            if content is None:
                self._names[group, place] = None
                break
            contents.append(content)
        if not contents:
            return False
        try:
            pages = self._groups[group].take(len(contents), admit=True)
        except OutOfPagesError:
            self._is_given_up = True
            return False
        self._pages[group].update(zip(places, pages, strict=False))
        self._groups[group].place(pages, places[: len(pages)])
        self._arrivals.write(self._groups[group], pages, contents)
        self.num_brought += len(pages)
        return True

    def _prefix(self, num_pages: int) -> Prefix:
        """Give so many pages out of hand, and release all others."""
        starts = [unseen_tokens(group, num_pages) for group in self._groups]
        kept = [
            [by_place.pop(place) for place in range(start // self._page_size, num_pages)]
            for start, by_place in zip(starts, self._pages, strict=True)
        ]
        if any(self._pages):
            self._arrivals.finish()
        for group, by_place in zip(self._groups, self._pages, strict=True):
            group.allocator.release(list(by_place.values()))
        return Prefix(num_pages, kept, starts)

    def _is_anywhere(self, group: int, place: int) -> bool:
        return place in self._pages[group] or self._name(group, place) is not None

    def _is_only_in(self, name: str, group: int, place: int) -> bool:
        return place not in self._pages[group] and self._name(group, place) == name

    def _name(self, group: int, place: int) -> str | None:
        """The nearest tier that has a page."""
        if (group, place) not in self._names:
            key = self._key(group, place)
            self._names[group, place] = next((name for name, tier in self._tiers.tiers.items() if key in tier), None)
        return self._names[group, place]

    def _key(self, group: int, place: int) -> PageKey:
        size, digests, running = self._page_size * TOKEN_BYTES, self._digests[group], self._hashes[group]
        while len(digests) <= place:
            running.update(self._tokens[len(digests) * size : (len(digests) + 1) * size])
            digests.append(running.copy().digest())
        return PageKey(digests[place], self._parents[group], self._tokens[: (place + 1) * size])

    def _most(self, name: str, group: int) -> int:
        """Pages that are read at once: a single one as long as it is not known how long it takes."""
        if not self._tiers.speeds.knows(name):
            return 1
        if isinstance(self._tiers.tiers[name], HostTier):
            return self._end
        return max(_NUM_READERS, _READ_BYTES // page_bytes(self._groups[group].storages()))

    def _is_worth(self, group: int, places: range, num_tokens: int | None) -> bool:
        """Whether pages are expected to be there sooner than so many tokens are computed; None: those in them."""
        speeds, num_bytes = self._tiers.speeds, page_bytes(self._groups[group].storages())
        names = [self._name(group, place) for place in places if place not in self._pages[group]]
        seconds = sum(speeds.seconds_to_move(name, num_bytes) for name in names if name is not None)
        seconds += speeds.seconds_to_move(INTO_PAGES, len(names) * num_bytes)
        return seconds < speeds.seconds_to_compute(len(places) * self._page_size if num_tokens is None else num_tokens)


@once
def _say(reason: str) -> None:
    logger.warning("Pages that make room for others are not kept: they could not be copied to the host: %s", reason)
