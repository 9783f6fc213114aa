"""The pages of all layers, which several caches may share."""

import threading
from collections.abc import Iterator, Sequence
from typing import Protocol
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from hf_paged.allocator import PageAllocator
from hf_paged.config import check_page_size, layer_specs
from hf_paged.errors import OutOfPagesError
from hf_paged.stats import MemoryStats
from hf_paged.storage import LayerStorage, disagreement

_FIRST_PAGES = 16  # an unbounded pool starts with as many


class PageHolder(Protocol):
    """Rows that hold pages."""

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row."""

    def row_pages(self, row: int) -> list[int]:
        """Page ids of a row, in order."""

    def pages_with_tokens(self) -> Iterator[tuple[int, int]]:
        """Each page of each row, with the number of its slots that the row uses."""


class PagePool:
    """Key and value storage of every layer in pages of one size, allocated when the first key shows its device.

    Caches, forks, beams and threads hold pages of one pool. The pool is safe to share between threads; a single
    cache is not.

    Args:
        config: the model's configuration; says how many layers store keys and values.
        num_pages: at most so many pages, reserved at once. None: grows by doubling.
        page_size: tokens per page: 16, 32, 64 or 128. Small pages waste less memory, large ones are faster.
        watermark: pages that new rows leave free for the rows that are already running.

    Raises:
        ValueError: for a page size that the kernel can't take, or a model whose layers keep another state.
    """

    def __init__(
        self, config: PreTrainedConfig, num_pages: int | None = None, page_size: int = 128, watermark: int = 0
    ) -> None:
        if num_pages is not None and num_pages < 1:
            raise ValueError(f"num_pages={num_pages} was asked for; a pool needs at least one page.")
        self.config = config.get_text_config(decoder=True)
        self.page_size = check_page_size(page_size)
        self.layers = layer_specs(config)
        self.is_bounded = num_pages is not None
        self.allocator = PageAllocator(num_pages or 0, watermark)
        self._holders: WeakSet[PageHolder] = WeakSet()
        self._storages: list[LayerStorage | None] = [None] * len(self.layers)
        # The place of a page in its row. Rows that share a page have it at the same place, so one entry is enough.
        self._page_index = torch.from_numpy(np.zeros(max(1, self.num_pages), dtype=np.int32))
        self._page_index_on: dict[torch.device, Tensor] = {}
        self._lock = threading.RLock()

    @property
    def num_pages(self) -> int:
        """Pages that exist, held or free."""
        return self.allocator.num_pages

    def register(self, holder: PageHolder) -> None:
        """Count in what `holder` holds, as long as it lives."""
        with self._lock:
            self._holders.add(holder)

    def storage(self, layer: int) -> LayerStorage | None:
        """Storage of a layer; None before its first key."""
        return self._storages[layer]

    def open_storage(self, layer: int, keys: Tensor, values: Tensor) -> LayerStorage:
        """Return the storage of a layer, made on the first call for keys and values like these.

        Raises:
            ValueError: if keys and values don't belong together, or head counts, head sizes, dtype or device differ
                from what the layer holds.
        """
        storage = self._storages[layer]
        difference = disagreement(keys, values)
        if storage is None and difference is None:
            with self._lock:
                storage = self._storages[layer]
                if storage is None:
                    storage = LayerStorage(keys, values, self.num_pages, self.page_size)
                    self._storages[layer] = storage
        if storage is None or (difference := difference or storage.mismatch(keys, values)) is not None:
            raise ValueError(
                f"Layer {layer} was given {difference}. One pool serves one model on one device in one dtype: "
                "make a new PagedCache for this model."
            )
        return storage

    def take(self, count: int, *, admit: bool = False) -> list[int]:
        """Take free pages, growing an unbounded pool if there are too few.

        Args:
            count: pages to take, each with one holder afterwards.
            admit: the pages are for rows that hold nothing yet.

        Raises:
            OutOfPagesError: if a bounded pool has fewer; nothing is taken.
        """
        if self.is_bounded:
            return self.allocator.allocate(count, admit=admit)
        with self._lock:
            try:
                return self.allocator.allocate(count, admit=admit)
            except OutOfPagesError:
                missing = count + self.allocator.watermark - self.allocator.num_free
                self._grow(max(2 * self.num_pages, self.num_pages + missing, _FIRST_PAGES))
                return self.allocator.allocate(count, admit=admit)

    def place(self, pages: Sequence[int], indices: Sequence[int]) -> None:
        """Note that each page is the page number `index` of its row."""
        with self._lock:
            self._page_index.numpy()[pages] = indices
            for device, mirror in self._page_index_on.items():
                mirror[torch.tensor(pages, device=device)] = torch.tensor(indices, dtype=torch.int32, device=device)

    def page_index(self, device: torch.device) -> Tensor:
        """`(num_pages,)` int32: the place of every held page in its row."""
        with self._lock:  # not in the middle of a growth
            if device.type == "cpu":
                return self._page_index
            if device not in self._page_index_on:
                with torch.inference_mode(False):  # it must be writable outside of inference mode too
                    self._page_index_on[device] = self._page_index.clone().to(device)
            return self._page_index_on[device]

    def copy_pages(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole pages in every layer."""
        for storage in filter(None, self._storages):
            storage.copy_pages(
                torch.tensor(sources, device=storage.device), torch.tensor(targets, device=storage.device)
            )

    def clear_values(self, pages: Sequence[int]) -> None:
        """Zero the values of pages that won't be filled at once.

        A masked slot has weight 0, but what is left in it takes part all the same, and 0 times NaN is NaN.
        """
        for storage in filter(None, self._storages):
            storage.clear_values(torch.tensor(pages, dtype=torch.int64, device=storage.device))

    def trim(self) -> None:
        """Give memory back: drop the free pages behind the last held one. Only an unbounded pool can shrink."""
        if not self.is_bounded:
            with self._lock:
                self._resize(self.allocator.shrink())

    def stats(self) -> MemoryStats:
        """Account for the pages and bytes of every cache on this pool."""
        return self.account(self._live_holders())

    def account(self, holders: Sequence[PageHolder]) -> MemoryStats:
        """Account for what `holders` hold."""
        used: dict[int, int] = {}
        for holder in holders:
            for page, num_tokens in holder.pages_with_tokens():
                used[page] = max(num_tokens, used.get(page, 0))
        storages = list(filter(None, self._storages))
        num_pages, num_free = self.num_pages, self.allocator.num_free
        return MemoryStats(
            num_pages=num_pages,
            num_free_pages=num_free,
            num_cached_pages=num_pages - num_free - self.allocator.num_active,
            num_active_pages=len(used),
            num_shared_pages=sum(self.allocator.ref_count(page) > 1 for page in used),
            num_tokens=sum(int(holder.lengths.sum()) for holder in holders),
            num_unique_tokens=sum(used.values()),
            page_size=self.page_size,
            token_bytes=sum(storage.token_bytes for storage in storages),
            reserved_bytes=sum(s.num_pages * self.page_size * s.token_bytes for s in storages),
        )

    def check_integrity(self) -> None:
        """Raise RuntimeError unless every page is free or held, once, by exactly its holders."""
        holders: dict[int, int] = {}
        for holder in self._live_holders():
            for row in range(len(holder.lengths)):
                for index, page in enumerate(holder.row_pages(row)):
                    holders[page] = holders.get(page, 0) + 1
                    if self._page_index[page] != index:
                        raise RuntimeError(f"Page {page} is page {index} of a row, not {int(self._page_index[page])}.")
        self.allocator.check_integrity(holders)
        for layer, storage in enumerate(self._storages):
            if storage is not None and storage.num_pages < self.num_pages:
                raise RuntimeError(f"Layer {layer} has {storage.num_pages} pages of {self.num_pages}.")

    def _live_holders(self) -> list[PageHolder]:
        with self._lock:
            return list(self._holders)

    def _grow(self, num_pages: int) -> None:
        # The allocator comes last: pages are handed out only when every layer has them.
        self._resize(num_pages)
        self.allocator.grow(num_pages)

    def _resize(self, num_pages: int) -> None:
        for storage in filter(None, self._storages):
            if storage.num_pages != max(1, num_pages):
                storage.resize(num_pages)
        page_index = np.zeros(max(1, num_pages), dtype=np.int32)
        kept = min(len(page_index), len(self._page_index))
        page_index[:kept] = self._page_index.numpy()[:kept]
        self._page_index = torch.from_numpy(page_index)
        self._page_index_on.clear()
