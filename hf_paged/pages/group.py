"""The pages of the layers that keep the same tokens."""

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from types import MappingProxyType
from typing import Any, Protocol
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hf_paged._torch.host_memory import free_bytes
from hf_paged.errors import OutOfPagesError
from hf_paged.pages.allocator import PageAllocator
from hf_paged.pages.storage import LayerStorage, check_room

_FIRST_PAGES = 16  # a group that grows starts with as many
# On CPU the system backs only what was touched. Elsewhere what is reserved is taken, so a pool grows in small steps;
# not in single pages, since all are copied, and steps captured as CUDA graphs are captured anew.
_GROWTH_ON_CPU, _GROWTH = 2.0, 1 + 1 / 16
_LEAST_GROWTH = 8
_CACHED_FRACTION = 0.25  # of the free memory, that cached pages of a group without a bound may take


class PageHolder(Protocol):
    """Rows that hold pages."""

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row."""

    def held_pages(self) -> Iterator[tuple[int, int, int]]:
        """Each page of each row: its id, its place in the row, and how many of its slots the row uses."""


class PageGroup:
    """Key and value storage in pages, for layers with one window; what a page id means is the group's own affair.

    Args:
        layers: indices of the layers.
        window: tokens that a query of these layers sees, itself included; None without a bound.
        num_pages: pages that exist at once.
        max_pages: pages that it may grow to; None without a bound.
        page_size: tokens per page.
        watermark: pages that new rows leave free for the rows that are already running.
    """

    def __init__(
        self,
        layers: Sequence[int],
        window: int | None,
        num_pages: int,
        max_pages: int | None,
        page_size: int,
        watermark: int,
    ) -> None:
        self.layers = tuple(layers)
        self.window = window
        self.max_pages = max_pages
        self.page_size = page_size
        self.num_copied_pages = 0
        """Pages that `copy_pages` has copied, ever."""
        self.allocator = PageAllocator(num_pages, watermark)
        self.evict: Callable[[int], None] | None = None
        """Lets so many of the cached pages be free; None where there are none."""
        self.move_idle: Callable[[], bool] | None = None
        """Moves rows to the host that may be; returns whether it did. None without memory of the host."""
        self.storage_version = object()
        """Another object whenever the storage of any layer is made or moved."""
        self.evicts_first = False
        """Whether cached pages are evicted before pages are taken that nobody has written to yet."""
        self._first_pages = num_pages
        self._holders: WeakSet[PageHolder] = WeakSet()
        self._storages: dict[int, LayerStorage] = {}
        self._prepared: dict[int, LayerStorage] = {}  # of layers before their first key, in case they are like others
        # The place of a page in its row. Rows that share a page have it at the same place, so one entry is enough.
        self._physical_to_logical = torch.from_numpy(np.zeros(max(1, num_pages), dtype=np.int32))
        self._physical_to_logical_on: dict[torch.device, Tensor] = {}
        self._sink_page: int | None = None
        self._lock = threading.RLock()

    @property
    def num_pages(self) -> int:
        """Pages that exist, held or free."""
        return self.allocator.num_pages

    @property
    def stays_in_place(self) -> bool:
        """Whether all pages exist from the beginning, so that nothing ever moves them."""
        return self._first_pages == self.max_pages

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in these layers; 0 until the first key says how large it is."""
        return sum(storage.token_bytes for storage in self._storages.values())

    @property
    def reserved_bytes(self) -> int:
        """Bytes of the storage."""
        return sum(s.num_pages * self.page_size * s.token_bytes for s in self._storages.values())

    def register(self, holder: PageHolder) -> None:
        """Count in what `holder` holds, as long as it lives."""
        with self._lock:
            self._holders.add(holder)

    def holders(self) -> list[PageHolder]:
        """Everyone who holds pages."""
        with self._lock:
            return list(self._holders)

    def storage(self, layer: int) -> LayerStorage | None:
        """Storage of a layer; None before its first key."""
        return self._storages.get(layer)

    def storages(self) -> list[LayerStorage]:
        """Storage of all layers that have one, in their order."""
        storages = self._storages
        return [storages[layer] for layer in self.layers if layer in storages]

    def staying_in_place(self) -> AbstractContextManager[Any]:
        """A context in which no other thread lets the pages grow, or drops some, and so moves them."""
        return self._lock

    def open_storage(self, layer: int, keys: Tensor, values: Tensor) -> LayerStorage:
        """Return the storage of a layer, made on the first call for keys and values like these."""
        with self._lock:
            storage = self._storages.get(layer)
            if storage is None:
                if self._first_pages and not self._storages:
                    token_bytes = sum(each.shape[1] * each.shape[3] * each.itemsize for each in (keys, values))
                    check_room(self._first_pages, self.page_size, len(self.layers) * token_bytes, keys.device)
                self._make_room(keys.device)
                storage = self._prepared.pop(layer, None)
                if storage is None or storage.num_pages != max(1, self.num_pages) or not storage.fits(keys, values):
                    storage = LayerStorage(keys, values, self.num_pages, self.page_size)
                    self._prepare_others(layer, keys, values)
                self._storages = self._storages | {layer: storage}  # not in place: other threads may go through it
                self.storage_version = object()
            return storage

    def _make_room(self, device: torch.device) -> None:
        """Let the pages grow while there is nothing to be copied, on a CPU, where it costs nothing.

        The pages of a first prompt are just as many as it needs, and the token after it would move all of them.
        """
        if not self._storages and device.type == "cpu" and self.num_pages != self.max_pages:
            self._grow(max(self.num_pages, self._bounded(math.ceil(_GROWTH_ON_CPU * self.allocator.num_active))))

    def _prepare_others(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Make storage for all layers when the first one is opened, on a CPU, where it takes no memory yet.

        Between two layers, whose weights push it out of the processor's caches, making it takes several times as long.
        """
        if not self._storages and keys.device.type == "cpu":
            others = (other for other in self.layers if other != layer)
            self._prepared = {other: LayerStorage(keys, values, self.num_pages, self.page_size) for other in others}

    def take(self, count: int, *, admit: bool = False) -> list[int]:
        """Take free pages, growing if there are too few and it is allowed; then cached ones.

        Args:
            count: pages to take, each with one holder afterwards.
            admit: the pages are for rows that hold nothing yet.

        Raises:
            OutOfPagesError: if there are fewer and may not be more; nothing is taken.
        """
        if self.num_pages == self.max_pages:
            return self._allocate(count, admit)
        if self.evicts_first:
            self._release_cached(count)
        with self._lock:
            try:
                return self.allocator.allocate(count, admit=admit)
            except OutOfPagesError:
                if self.max_pages is None and self._has_enough_cached():
                    with suppress(OutOfPagesError):
                        return self._allocate(count, admit)
                missing = count + self.allocator.watermark - self.allocator.num_free
                grown = max(math.ceil(self._growth * self.num_pages), self.num_pages + _LEAST_GROWTH)
                wanted = max(grown if self.num_pages else _FIRST_PAGES, self.num_pages + missing)
                self._grow(self._bounded(wanted))
                return self._allocate(count, admit)

    def place(self, pages: Sequence[int], indices: Sequence[int]) -> None:
        """Note that each page is the page number `index` of its row."""
        with self._lock:
            self._physical_to_logical.numpy()[pages] = indices
            for device, mirror in self._physical_to_logical_on.items():
                mirror[_sent(pages, device)] = _sent(indices, device).int()

    def physical_to_logical(self, device: torch.device) -> Tensor:
        """`(num_pages,)` int32: the place of every held page in its row."""
        with self._lock:  # not in the middle of a growth
            if device.type == "cpu":
                return self._physical_to_logical
            if device not in self._physical_to_logical_on:
                with torch.inference_mode(False):  # it must be writable outside of inference mode too
                    self._physical_to_logical_on[device] = self._physical_to_logical.clone().to(device)
            return self._physical_to_logical_on[device]

    def copy_pages(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole pages in every layer."""
        self.num_copied_pages += len(sources)
        for device, storages in self._by_device().items():
            pages = _sent(sources, device), _sent(targets, device)
            for storage in storages:
                storage.copy_pages(*pages)

    def clear_values(self, pages: Sequence[int]) -> None:
        """Zero the values of pages that won't be filled at once.

        A masked slot has weight 0, but what is left in it takes part all the same, and 0 times NaN is NaN.
        """
        for device, storages in self._by_device().items():
            sent = _sent(pages, device)
            for storage in storages:
                storage.clear_values(sent)

    def sink_page(self) -> int:
        """A page whose values are 0, held from now on: the token that attention sinks give a score to.

        Raises:
            OutOfPagesError: if there is no page for it.
        """
        with self._lock:
            if self._sink_page is None:
                (self._sink_page,) = self.take(1)
                self.place([self._sink_page], [-1])
                self.clear_values([self._sink_page])
            return self._sink_page

    def trim(self) -> None:
        """Drop the free pages behind the last held one, except those that were reserved at once."""
        with self._lock:
            self._resize(self.allocator.shrink(self._first_pages))

    def first_kept(self, first: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The first token of each row that is to be kept, as those before it have left the window.

        What is seen from behind the last full page of a row is looked for, where there is a prefix index. It may hand
        out any page, also to rows that see all of it, so that pages are kept whole.

        Args:
            first: `(num_rows,)` the first one that the next query sees.
            lengths: `(num_rows,)` tokens.
        """
        if self.evict is None or self.window is None:
            return first
        first = np.minimum(first, np.maximum(0, lengths // self.page_size * self.page_size + 1 - self.window))
        return first // self.page_size * self.page_size

    def check_integrity(self, indexed: Mapping[int, int] = MappingProxyType({})) -> None:
        """Raise RuntimeError unless every page is free, cached or held, once, by exactly its holders.

        Args:
            indexed: pages that the prefix index can hand out, and their places in their rows.
        """
        for page, index in indexed.items():
            if self._physical_to_logical[page] != index:
                raise RuntimeError(f"Page {page} is indexed as page {index} of a row, which it isn't.")
        counts: dict[int, int] = {} if self._sink_page is None else {self._sink_page: 1}
        for holder in self.holders():
            for page, index, _ in holder.held_pages():
                counts[page] = counts.get(page, 0) + 1
                if self._physical_to_logical[page] != index:
                    raise RuntimeError(
                        f"Page {page} is page {index} of a row, not {int(self._physical_to_logical[page])}."
                    )
        self.allocator.check_integrity(counts, indexed)
        for layer, storage in self._storages.items():
            if storage.num_pages < self.num_pages:
                raise RuntimeError(f"Layer {layer} has {storage.num_pages} pages of {self.num_pages}.")

    @property
    def _growth(self) -> float:
        on_cpu = all(storage.device.type == "cpu" for storage in self._storages.values())
        return _GROWTH_ON_CPU if on_cpu else _GROWTH

    def _by_device(self) -> dict[torch.device, list[LayerStorage]]:
        by_device: dict[torch.device, list[LayerStorage]] = {}
        for storage in self._storages.values():
            by_device.setdefault(storage.device, []).append(storage)
        return by_device

    def _allocate(self, count: int, admit: bool) -> list[int]:
        """Take free pages, evicting cached ones if that makes enough, and moving idle rows to the host if not."""
        while True:
            try:
                return self.allocator.allocate(count, admit=admit)
            except OutOfPagesError:
                missing = count + (self.allocator.watermark if admit else 0) - self.allocator.num_free
                # If others take what is freed, there is less the next time.
                if self.evict is not None and missing <= self.allocator.num_cached:
                    self.evict(missing)
                elif self.num_pages != self.max_pages or self.move_idle is None or not self.move_idle():
                    raise

    def _release_cached(self, count: int) -> None:
        """Let as many pages be free that were written to as are going to be taken, if there are cached ones."""
        num_written = self.allocator.num_free - (self.num_pages - self.allocator.num_touched)
        if self.evict is not None and num_written < count and self.allocator.num_cached:
            self.evict(count - num_written)

    def _has_enough_cached(self) -> bool:
        """Whether cached pages take so much memory that they are to be evicted before the group grows."""
        if self.evict is None or not self._storages or not self.allocator.num_cached:
            return False
        device = next(iter(self._storages.values())).device
        held = self.allocator.num_cached * self.page_size * self.token_bytes
        return held > _CACHED_FRACTION * (held + free_bytes(device))

    def _bounded(self, num_pages: int) -> int:
        return num_pages if self.max_pages is None else min(num_pages, self.max_pages)

    def _grow(self, num_pages: int) -> None:
        # The allocator comes last: pages are handed out only when every layer has them.
        self._resize(num_pages)
        self.allocator.grow(num_pages)

    def _resize(self, num_pages: int) -> None:
        self.storage_version = object()
        for storage in self._storages.values():
            if storage.num_pages != max(1, num_pages):
                storage.resize(num_pages)
        physical_to_logical = np.zeros(max(1, num_pages), dtype=np.int32)
        kept = min(len(physical_to_logical), len(self._physical_to_logical))
        physical_to_logical[:kept] = self._physical_to_logical.numpy()[:kept]
        self._physical_to_logical = torch.from_numpy(physical_to_logical)
        self._physical_to_logical_on.clear()


def _sent(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Numbers on a device, int64. `torch.tensor(..., device=...)` would wait for all that the device has to do."""
    return torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)
