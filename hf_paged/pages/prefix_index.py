"""Finds pages by the tokens they hold and all tokens before these. No torch here: tokens are bytes."""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from hf_paged.pages.group import PageGroup

if TYPE_CHECKING:
    from hf_paged.pages.tiers.prefixes import PrefixTiers

TOKEN_BYTES = 4  # of a token: int32
_MAX_STATES = 32  # of rows, those that were used last
_DEMOTED = 8  # pages, at least, that leave the device at once: each time it is waited for


class _Node:
    """A page's worth of tokens, behind those of its parent."""

    __slots__ = ("children", "origin", "pages", "parent", "states", "tokens")

    def __init__(self, origin: Hashable, parent: "_Node | None", tokens: bytes, num_groups: int) -> None:
        self.origin = origin
        self.parent = parent
        self.tokens = tokens
        self.pages: list[int | None] = [None] * num_groups
        self.states: Any = None
        self.children: dict[bytes, _Node] = {}


@dataclass(frozen=True)
class Prefix:
    """Pages that hold the first tokens of a row. Whoever was given them holds them.

    Attributes:
        num_pages: pages of the prefix.
        pages: for each group the last of them, as many as the next query sees of it.
        starts: for each group the tokens at the beginning that the next query doesn't see.
        states: what recurrent layers keep behind it; None where there are none.
        num_alike: pages in which the row is like one before it, also where no states were kept.
    """

    num_pages: int
    pages: list[list[int]]
    starts: list[int]
    states: Any = None
    num_alike: int = 0


def unseen_tokens(group: PageGroup, num_pages: int) -> int:
    """Tokens at the beginning of a row that a query behind so many pages doesn't see."""
    return 0 if group.window is None else max(0, num_pages * group.page_size + 1 - group.window)


class PrefixIndex:
    """Which full pages hold which tokens: a tree, with one node for a page of tokens behind its parent's.

    A node is found by comparing tokens: nothing is told apart by a hash. It costs one look into a dictionary per page,
    however many pages there are. Threads may share it. Pages stay where they are until they are evicted; the index
    goes through the allocator's lock to hand out a page that nobody holds.

    Args:
        groups: of the pool; they have the index evict cached pages when free ones run short.
        tiers: are given what is evicted; None without.
        needs_states: whether a prefix ends only where there are states of recurrent layers. Few are kept.
    """

    def __init__(
        self, groups: Sequence[PageGroup], tiers: "PrefixTiers | None" = None, *, needs_states: bool = False
    ) -> None:
        self.tiers = tiers
        self.num_looked_up_tokens = 0
        """Tokens that were looked for, ever."""
        self.num_hit_tokens = 0
        """Tokens that were found, ever."""
        self.num_evicted_pages = 0
        """Pages that were taken for other tokens, ever."""
        self._groups = list(groups)
        self.page_size = groups[0].page_size
        self._roots: dict[Hashable, _Node] = {}
        self._nodes: list[dict[int, _Node]] = [{} for _ in groups]  # by page
        self._needs_states = needs_states
        self._with_states: OrderedDict[_Node, None] = OrderedDict()  # the one that was used last is the last
        self._lock = threading.RLock()
        for index, group in enumerate(groups):
            group.evict = partial(_evict, weakref.ref(self), index)

    def match(self, origin: Hashable, tokens: bytes) -> Prefix:
        """Find the longest prefix of which each group of layers has what the next query sees, and hold its pages.

        Args:
            origin: what made the keys and values: nothing is found that another one made.
            tokens: of the row, int32.
        """
        with self._lock:
            path, num_alike = self._path(origin, tokens)
            pages, starts = [], []
            for index, group in enumerate(self._groups):
                starts.append(unseen_tokens(group, len(path)))
                found = [node.pages[index] for node in path[starts[-1] // self.page_size :]]
                pages.append([page for page in found if page is not None])
                group.allocator.retain(pages[-1])
            states = path[-1].states if path else None
            if states is not None:
                self._with_states.move_to_end(path[-1])
            return Prefix(len(path), pages, starts, states, num_alike)

    def ahead(self, origin: Hashable, tokens: bytes, num_pages: int) -> list[dict[int, int]]:
        """Find what groups have of a row behind its first pages, and hold it.

        Args:
            origin: what made the keys and values.
            tokens: of the row, int32.
            num_pages: pages that are left out.

        Returns:
            For each group pages by their place in the row.
        """
        found: list[dict[int, int]] = [{} for _ in self._groups]
        size = self.page_size * TOKEN_BYTES
        with self._lock:
            node = self._roots.get(origin)
            for place in range(len(tokens) // size):
                node = None if node is None else node.children.get(tokens[place * size : (place + 1) * size])
                if node is None:
                    break
                for page, by_place in zip(node.pages, found, strict=True):
                    if place >= num_pages and page is not None:
                        by_place[place] = page
            for group, by_place in zip(self._groups, found, strict=True):
                group.allocator.retain(list(by_place.values()))
        return found

    def add(self, origin: Hashable, tokens: bytes, pages: Sequence[dict[int, int]]) -> None:
        """Let pages be found.

        Args:
            origin: what made the keys and values.
            tokens: of the row, int32.
            pages: for each group pages by their place in the row, all full and held by the caller.
        """
        size = self.page_size * TOKEN_BYTES
        end = max((place + 1 for by_place in pages for place in by_place), default=0)
        if not end:
            return
        with self._lock:
            node = self._roots.get(origin)
            if node is None:
                node = self._roots[origin] = self._new(origin, None, b"")
            for place in range(end):
                part = tokens[place * size : (place + 1) * size]
                child = node.children.get(part)
                if child is None:
                    child = node.children[part] = self._new(origin, node, part)
                node = child
                for index, group in enumerate(self._groups):
                    page = pages[index].get(place)
                    if page is not None and node.pages[index] is None and page not in self._nodes[index]:
                        node.pages[index] = page
                        self._nodes[index][page] = node
                        group.allocator.index([page])

    def keep(self, origin: Hashable, tokens: bytes, num_pages: int, states: Any) -> None:
        """Let states of recurrent layers be found behind the first pages of a row, as long as these are.

        Args:
            origin: what made them.
            tokens: of the row, int32.
            num_pages: that they are behind.
            states: are never changed.
        """
        size = self.page_size * TOKEN_BYTES
        with self._lock:
            node = self._roots.get(origin)
            for place in range(num_pages):
                node = None if node is None else node.children.get(tokens[place * size : (place + 1) * size])
            if node is None or any(page is None for page in node.pages):
                return
            node.states = states
            self._with_states[node] = None
            self._with_states.move_to_end(node)
            if len(self._with_states) > _MAX_STATES:
                self._with_states.popitem(last=False)[0].states = None

    def found(self, group: int) -> tuple[list[int], list[tuple[Hashable, bytes]]]:
        """All pages of a group that can be found, those first that would be evicted first; the caller holds them.

        Returns:
            The pages, and for each of them what made it, and the tokens of its row up to its end.
        """
        with self._lock:
            nodes, allocator = self._nodes[group], self._groups[group].allocator
            pages = list(dict.fromkeys([*allocator.oldest_cached(len(nodes)), *nodes]))
            allocator.retain(pages)
            return pages, [(nodes[page].origin, _row(nodes[page])) for page in pages]

    def count(self, num_looked_up: int, num_hits: int) -> None:
        """Count tokens of a row that were looked for, and those of them that need not be computed."""
        with self._lock:
            self.num_looked_up_tokens += num_looked_up
            self.num_hit_tokens += num_hits

    def evict(self, group: int, count: int) -> None:
        """Let up to `count` of the cached pages of a group be free, least recently used first.

        The pages of a row were given back with its last one first, so that its suffix goes before its beginning. With
        tiers, a few more are evicted at once.
        """
        with self._lock:
            allocator = self._groups[group].allocator
            pages = allocator.oldest_cached(count if self.tiers is None else max(count, _DEMOTED))
            if self.tiers is not None:
                nodes = [self._nodes[group][page] for page in pages]
                self.tiers.demote(group, pages, [(node.origin, _row(node)) for node in nodes])
            self._forget(group, pages)
            self.num_evicted_pages += len(pages)

    def clear(self) -> None:
        """Let no page be found any more."""
        with self._lock:
            for index, nodes in enumerate(self._nodes):
                self._forget(index, list(nodes))

    def places(self, group: int) -> dict[int, int]:
        """The pages of a group that can be found, with their places in their rows."""
        with self._lock:
            return {page: _depth(node) - 1 for page, node in self._nodes[group].items()}

    def _path(self, origin: Hashable, tokens: bytes) -> tuple[list[_Node], int]:
        """The nodes of the longest prefix that is found, and how many there are with those behind it."""
        size, node = self.page_size * TOKEN_BYTES, self._roots.get(origin)
        path: list[_Node] = []
        num_found, runs = 0, [0] * len(self._groups)
        while node is not None and (len(path) + 1) * size <= len(tokens):
            node = node.children.get(tokens[len(path) * size : (len(path) + 1) * size])
            if node is None:
                break
            path.append(node)
            is_found = not self._needs_states or node.states is not None
            for index, group in enumerate(self._groups):
                runs[index] = 0 if node.pages[index] is None else runs[index] + 1
                if runs[index] < len(path) - unseen_tokens(group, len(path)) // self.page_size:
                    if group.window is None:
                        return path[:num_found], len(path) - 1
                    is_found = False
            if is_found:
                num_found = len(path)
        return path[:num_found], len(path)

    def _new(self, origin: Hashable, parent: _Node | None, tokens: bytes) -> _Node:
        return _Node(origin, parent, tokens, len(self._groups))

    def _forget(self, group: int, pages: Sequence[int]) -> None:
        for page in pages:
            node = self._nodes[group].pop(page)
            node.pages[group] = node.states = None
            self._with_states.pop(node, None)
            while node.parent is not None and not node.children and not any(p is not None for p in node.pages):
                del node.parent.children[node.tokens]
                node = node.parent
            if node.parent is None and not node.children:
                self._roots = {origin: root for origin, root in self._roots.items() if root is not node}
        self._groups[group].allocator.unindex(pages)


def _evict(index: "weakref.ref[PrefixIndex]", group: int, count: int) -> None:
    found = index()
    if found is not None:
        found.evict(group, count)


def _row(node: _Node) -> bytes:
    """The tokens of a node, and all before them."""
    parts: list[bytes] = []
    while node.parent is not None:
        parts.append(node.tokens)
        node = node.parent
    return b"".join(reversed(parts))


def _depth(node: _Node | None) -> int:
    depth = -1
    while node is not None:
        node, depth = node.parent, depth + 1
    return depth
