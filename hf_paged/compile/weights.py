"""The weights of a model on a CPU, put where they are read fastest."""

import threading
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hf_paged._torch.host_memory import untouched_memory
from hf_paged._transformers import not_a_model

_ALIGNMENT = 64  # bytes: a line of the processor's caches, and its widest vectors

_addresses: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()  # to which a tensor was moved
_lock = threading.Lock()


@dataclass
class _Piece:
    """Memory of one tensor, or of several that overlap: from one address up to another, in bytes."""

    start: int
    stop: int
    tensors: list[Tensor]

    @property
    def is_moved(self) -> bool:
        return any(_addresses.get(tensor) == tensor.data_ptr() for tensor in self.tensors)

    def move(self, storage: torch.UntypedStorage) -> None:
        """Copy to a storage of `stop - start` bytes, and let the tensors go on from there."""
        for tensor in self.tensors:
            offset = (tensor.data_ptr() - self.start) // tensor.itemsize
            flat_shape = (_span(tensor) // tensor.itemsize,)
            # What was made under inference_mode takes no other data than what was made so.
            with torch.inference_mode(tensor.is_inference()):
                moved = torch.empty(0, dtype=tensor.dtype)
                moved.set_(storage, offset, flat_shape, (1,)).copy_(tensor.as_strided(flat_shape, (1,)))
                tensor.data = moved.as_strided(tensor.shape, tensor.stride())
            _addresses[tensor] = tensor.data_ptr()


def gather_weights(model: torch.nn.Module) -> None:
    """Move the parameters and buffers that are on a CPU together into memory with huge pages.

    A model that was loaded reads its weights from a file that is mapped into memory, in pages of 4 KiB, or from
    wherever an allocator put them. To read all weights for each token is then bounded by looking up addresses rather
    than by the memory. The tensors remain the same objects with the same values, shapes and strides. Those that share
    memory go on sharing it, but not with what is no part of the model. Where they were is let go one by one. What was
    moved before stays, and so does what other processes may see or torch does not lay out by strides. There is no way
    back, as there is none from `model.to`.

    It is worth a call before `compiled(model)`, and before a server forks its workers, so that they share this memory,
    as they would have shared the file. Uncompiled it brings nothing.

    Args:
        model: that no other thread is running meanwhile.

    Raises:
        ValueError: if it is no model.
    """
    if not isinstance(model, torch.nn.Module):
        raise not_a_model(model, "gather_weights()")
    with _lock, torch.no_grad():
        pieces = [piece for piece in _pieces(model) if not piece.is_moved]
        if not pieces:
            return
        sizes = [-(-(piece.stop - piece.start) // _ALIGNMENT) * _ALIGNMENT for piece in pieces]
        memory = untouched_memory(sum(sizes), huge_pages=True).numpy()
        begin = 0
        for piece, size in zip(pieces, sizes, strict=True):
            # A storage of its own each, as torch.save writes whole storages.
            piece.move(torch.from_numpy(memory[begin : begin + piece.stop - piece.start]).untyped_storage())
            begin += size


def _pieces(model: torch.nn.Module) -> Iterator[_Piece]:
    tensors = filter(_is_movable, chain(model.parameters(), model.buffers()))
    piece = _Piece(0, 0, [])
    for tensor in sorted(tensors, key=Tensor.data_ptr):
        start = tensor.data_ptr()
        if start >= piece.stop:
            if piece.tensors:
                yield piece
            piece = _Piece(start, start, [])
        piece.stop = max(piece.stop, start + _span(tensor))
        piece.tensors.append(tensor)
    if piece.tensors:
        yield piece


def _is_movable(tensor: Tensor) -> bool:
    is_strided = tensor.layout == torch.strided and not tensor.is_quantized
    is_plain = type(tensor) in (Tensor, torch.nn.Parameter) and is_strided
    return is_plain and tensor.device.type == "cpu" and tensor.numel() > 0 and not tensor.is_shared()  # type: ignore[no-untyped-call]


def _span(tensor: Tensor) -> int:
    """Bytes from the first element to the last one."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in steps)) * tensor.itemsize
