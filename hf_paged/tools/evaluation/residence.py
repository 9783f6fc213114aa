"""The memory behind the storage of a pool, beside what the accounting of pages says must and may be there."""

from collections import Counter
from collections.abc import MutableMapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hf_paged.pages.group import PageGroup
from hf_paged.pages.pool import PagePool
from hf_paged.pages.stats import MemoryStats
from hf_paged.pages.storage import LayerStorage
from hf_paged.tools.lab.resident import PAGE_BYTES, backing_bytes, num_os_pages, resident_pages

BoolVector = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Residence:
    """Bytes behind the storage of a pool.

    On CPU memory is taken in pages of the operating system. Storage is head-major: a page of the cache is one piece
    for each head of the keys and of the values of each layer, and each piece is rounded by itself. On CUDA the caching
    allocator takes all that is reserved.

    Attributes:
        storage_bytes: of the tensors.
        touched_bytes: of the pages that were ever handed out, or copied by growth.
        resident_bytes: what takes memory; None where the system doesn't tell.
        least_bytes: what must: where a token was written.
        most_bytes: what may: the touched pages, rounded to what the system hands out at once.
        missing_bytes: what must and does not.
        stray_bytes: what may not and does.
    """

    storage_bytes: int
    touched_bytes: int
    resident_bytes: int | None
    least_bytes: int
    most_bytes: int
    missing_bytes: int
    stray_bytes: int

    def disagreements(self, stats: MemoryStats) -> tuple[str, ...]:
        """Say in words where memory and accounting disagree, and by how much.

        Args:
            stats: of the pool, at the same moment.
        """
        found = []
        if stats.reserved_bytes != self.storage_bytes:
            found.append(f"reserved_bytes is {stats.reserved_bytes:,}, but the storage has {self.storage_bytes:,}")
        if stats.active_bytes > self.touched_bytes:
            found.append(f"active_bytes is {stats.active_bytes:,}, but only {self.touched_bytes:,} were handed out")
        if self.resident_bytes is not None and stats.live_bytes > self.resident_bytes:
            found.append(f"live_bytes is {stats.live_bytes:,}, but only {self.resident_bytes:,} are resident")
        if self.missing_bytes:
            found.append(f"of {self.least_bytes:,} bytes where tokens were written {self.missing_bytes:,} are missing")
        if self.stray_bytes:
            found.append(f"{self.stray_bytes:,} bytes are resident that belong to no page ever handed out")
        return tuple(found)


class ResidenceWatch:
    """Looks at the memory behind a pool from time to time, and remembers where tokens were written.

    Args:
        pool: whose storage is looked at; no other thread may use it meanwhile.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._backing_bytes = backing_bytes()
        # By the keys of a layer, which growth replaces: which slots were written.
        self._written: MutableMapping[Tensor, BoolVector] = WeakTensorKeyDictionary()

    def look(self) -> Residence:
        """Compare what is resident now with what must and may be."""
        total: Counter[str] = Counter()
        on_cuda: Counter[torch.device] = Counter()
        is_told = True
        for group in self._pool.groups:
            for storage in filter(None, map(group.storage, group.layers)):
                num_touched = max(group.allocator.num_touched, storage.num_carried_pages)
                num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in storage.tensors)
                total["storage"] += num_bytes
                total["touched"] += num_touched * group.page_size * storage.token_bytes
                if storage.device.type == "cuda":
                    on_cuda[storage.device] += num_bytes
                elif storage.device.type == "cpu":
                    written = _runs(self._note_written(group, storage))
                    touched = np.array([[0, num_touched * group.page_size]])
                    for tensor in storage.tensors:
                        found = self._compare(tensor, written, touched)
                        is_told &= found is not None
                        total.update(found)
                else:
                    is_told = False
        for device, num_bytes in on_cuda.items():
            allocated = torch.cuda.memory_allocated(device)
            total.update(resident=min(num_bytes, allocated), least=num_bytes, most=num_bytes)
            total["missing"] += max(0, num_bytes - allocated)
        return Residence(
            storage_bytes=total["storage"],
            touched_bytes=total["touched"],
            resident_bytes=total["resident"] if is_told else None,
            least_bytes=total["least"],
            most_bytes=total["most"],
            missing_bytes=total["missing"],
            stray_bytes=total["stray"],
        )

    def _note_written(self, group: PageGroup, storage: LayerStorage) -> BoolVector:
        """`(num_slots,)` whether a token was ever written into each slot, as far as is known."""
        written = self._written.get(storage.keys)
        if written is None:
            written = self._written[storage.keys] = np.zeros(storage.keys.shape[2], dtype=bool)
            written[: storage.num_carried_pages * group.page_size] = True
        for holder in group.holders():
            for page, _, num_used in holder.held_pages():
                # Behind a window the used slots of a page need not be its first ones.
                if num_used == group.page_size or group.window is None:
                    written[page * group.page_size :][:num_used] = True
        return written

    def _compare(self, tensor: Tensor, written: Counts, touched: Counts) -> Counter[str] | None:
        resident = resident_pages(tensor)
        if resident is None:
            return None
        must = _os_pages(tensor, _pieces(tensor, written), PAGE_BYTES)
        # Where memory comes in huge pages, a neighbour in the address space may bring some of ours.
        begin, end = tensor.data_ptr(), tensor.data_ptr() + num_os_pages(tensor) * PAGE_BYTES
        neighbours = np.array([[begin - 1, begin], [end, end + 1]])
        may = _os_pages(tensor, np.concatenate([_pieces(tensor, touched), neighbours]), self._backing_bytes)
        sizes = {
            "resident": resident,
            "least": must,
            "most": may,
            "missing": must & ~resident,
            "stray": resident & ~may,
        }
        return Counter({name: int(pages.sum()) * PAGE_BYTES for name, pages in sizes.items()})


def _runs(flags: BoolVector) -> Counts:
    """`(num_runs, 2)` first and last but one of each run of True: `[0, 1, 1, 0, 1]` gives `[[1, 3], [4, 5]]`."""
    edges = np.diff(flags.astype(np.int8), prepend=0, append=0)
    return np.stack([np.flatnonzero(edges > 0), np.flatnonzero(edges < 0)], axis=1)


def _pieces(tensor: Tensor, runs: Counts) -> Counts:
    """`(num_pieces, 2)` addresses of runs of slots in each head of `(1, num_kv_heads, num_slots, head_dim)`."""
    _, num_heads, num_slots, head_dim = tensor.shape
    slots = np.arange(num_heads)[:, None, None] * num_slots + runs
    return tensor.data_ptr() + slots.reshape(-1, 2) * (head_dim * tensor.element_size())


def _os_pages(tensor: Tensor, pieces: Counts, rounding: int) -> BoolVector:
    """`(num_os_pages(tensor),)` which of them lie in the pieces, rounded outwards to multiples of `rounding`."""
    first, count = tensor.data_ptr() // PAGE_BYTES, num_os_pages(tensor)
    pieces = pieces[pieces[:, 0] < pieces[:, 1]]  # an empty one would be rounded to something
    begins = (pieces[:, 0] // rounding * rounding // PAGE_BYTES - first).clip(0, count)
    ends = (-(-pieces[:, 1] // rounding) * rounding // PAGE_BYTES - first).clip(0, count)
    marks = np.zeros(count + 1, dtype=np.int64)
    np.add.at(marks, begins, 1)
    np.add.at(marks, ends, -1)
    inside: BoolVector = marks[:-1].cumsum() > 0
    return inside
