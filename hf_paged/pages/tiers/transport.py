"""Whole pages brought to the memory of the host, and back.

On the host a page is one tensor: the layers in order, each as `LayerStorage.read_pages` gives it. A copy between a
device and the host goes at full speed if it is large, both sides are contiguous, and the host's is pinned. So a page
is copied in pieces of a few layers, gathered on the device first.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_paged.pages.storage import LayerStorage

_PIECE_BYTES = 2 * 2**20  # a copy of less than a quarter of it takes longer to launch than to make
_STAGED_BYTES = 64 * 2**20  # gathered on the device at once, unless one piece is larger


def page_bytes(storages: Sequence[LayerStorage]) -> int:
    """Bytes of one page in some layers."""
    return sum(storage.page_size * storage.token_bytes for storage in storages)


def page_host_bytes(storages: Sequence[LayerStorage]) -> int:
    """Bytes of the host that one page in some layers takes once it was read."""
    return _taken(page_bytes(storages), _are_pinned(storages))


def host_bytes(content: Tensor) -> int:
    """Bytes of the host that the content of a page takes."""
    return _taken(content.nbytes, content.is_pinned())


@torch.no_grad()
def read_pages(storages: Sequence[LayerStorage], pages: Sequence[int]) -> list[Tensor]:
    """Copy pages to the host, pinned where they come from a CUDA device.

    Args:
        storages: of some layers of one group.
        pages: their ids, held by the caller until this returns.

    Returns:
        For each page `(page_bytes(storages),)` uint8, the layers in order.
    """
    size, is_pinned = page_bytes(storages), _are_pinned(storages)
    with torch.inference_mode(False):
        contents = [torch.empty(size, dtype=torch.uint8, pin_memory=is_pinned) for _ in range(len(pages))]
    for piece in _pieces(storages):
        for some in piece.batches(len(pages)):
            ids = piece.sent(pages[some])
            staged = torch.cat([storage.read_pages(ids) for storage in piece.storages], dim=1)
            for source, content in zip(staged, contents[some], strict=True):
                content[piece.first : piece.end].copy_(source, non_blocking=piece.is_asynchronous)
    for device in {storage.device for storage in storages if storage.device.type == "cuda"}:
        torch.cuda.current_stream(device).synchronize()
    return contents


def write_pages(storages: Sequence[LayerStorage], pages: Sequence[int], contents: Sequence[Tensor]) -> None:
    """Fill pages with what `read_pages` returned for these layers; arguments as for `writing_pages`."""
    for _ in writing_pages(storages, pages, contents):
        pass


def writing_pages(
    storages: Sequence[LayerStorage], pages: Sequence[int], contents: Sequence[Tensor]
) -> Iterator[list[LayerStorage]]:
    """Fill pages, the first layer of all pages first, while somebody asks which layers are done.

    On a CUDA device this only launches the copies, on the current stream.

    Args:
        storages: as for `read_pages`.
        pages: their ids, distinct, each with one holder.
        contents: for each of them `(page_bytes(storages),)` uint8 on the host; not to be changed afterwards.

    Yields:
        Storages of which all pages are filled.
    """
    for piece in _pieces(storages):
        piece.write(pages, contents)
        yield piece.storages


@dataclass
class _Piece:
    """Layers that follow one another on one device, whose part of a page is copied at once.

    Attributes:
        storages: of these layers.
        first: where their part of a page begins, in bytes.
    """

    storages: list[LayerStorage]
    first: int

    @property
    def device(self) -> torch.device:
        return self.storages[0].device

    @property
    def is_asynchronous(self) -> bool:
        """Whether the host may go on while the copy is made."""
        return self.device.type == "cuda"

    @property
    def num_bytes(self) -> int:
        return page_bytes(self.storages)

    @property
    def end(self) -> int:
        return self.first + self.num_bytes

    def takes(self, storage: LayerStorage) -> bool:
        """Whether another layer is to be copied with these."""
        return storage.device == self.device and self.num_bytes < _PIECE_BYTES

    @torch.no_grad()
    def write(self, pages: Sequence[int], contents: Sequence[Tensor]) -> None:
        """Fill this part of pages."""
        for some in self.batches(len(pages)):
            staged = torch.empty((len(pages[some]), self.num_bytes), dtype=torch.uint8, device=self.device)
            for target, content in zip(staged, contents[some], strict=True):
                target.copy_(content[self.first : self.end], non_blocking=self.is_asynchronous)
            ids, first = self.sent(pages[some]), 0
            for storage in self.storages:
                end = first + page_bytes([storage])
                storage.write_pages(ids, staged[:, first:end])
                first = end

    def batches(self, num_pages: int) -> Iterator[slice]:
        """Cut pages into as many as may be gathered at once."""
        size = max(1, _STAGED_BYTES // self.num_bytes)
        for first in range(0, num_pages, size):
            yield slice(first, first + size)

    def sent(self, pages: Sequence[int]) -> Tensor:
        """`(num_pages,)` int64 on the device."""
        return torch.tensor(pages, dtype=torch.int64).to(self.device, non_blocking=True)


def _are_pinned(storages: Sequence[LayerStorage]) -> bool:
    return any(storage.device.type == "cuda" for storage in storages)


def _taken(num_bytes: int, is_pinned: bool) -> int:
    """Bytes that torch takes for a tensor: it rounds pinned memory up to a power of two."""
    return 1 << (num_bytes - 1).bit_length() if num_bytes and is_pinned else num_bytes


def _pieces(storages: Sequence[LayerStorage]) -> list[_Piece]:
    pieces: list[_Piece] = []
    end = 0
    for storage in storages:
        if pieces and pieces[-1].takes(storage):
            pieces[-1].storages.append(storage)
        else:
            pieces.append(_Piece([storage], end))
        end += page_bytes([storage])
    return pieces
