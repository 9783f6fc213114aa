"""Keys and values of one layer, for every page of the pool."""

import math
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hf_paged._torch.host_memory import memory_for_pages, untouched_memory

Slots = npt.NDArray[np.int64]

_DTYPES = torch.float16, torch.bfloat16, torch.float32, torch.float64


def disagreement(keys: Tensor, values: Tensor) -> str | None:
    """Say in words why keys and values can't belong to the same tokens; None if they can."""
    if (keys.shape[0], keys.shape[2]) != (values.shape[0], values.shape[2]):
        return f"values of shape {tuple(values.shape)} for keys of shape {tuple(keys.shape)}"
    if (keys.dtype, keys.device) != (values.dtype, values.device):
        return f"values in {values.dtype} on {values.device}, but keys in {keys.dtype} on {keys.device}"
    if keys.dtype not in _DTYPES:
        return f"keys and values in {keys.dtype}, but pages hold float16, bfloat16, float32 or float64"
    return None


def check_room(num_pages: int, page_size: int, token_bytes: int, device: torch.device | None) -> None:
    """Raise ValueError if there is less memory than so many pages take.

    Args:
        num_pages: that are to be reserved at once.
        page_size: tokens per page.
        token_bytes: of one token's keys and values in all layers, at least.
        device: where they are to be; None if that is not known yet.
    """
    page_bytes = page_size * token_bytes
    room = memory_for_pages(device)
    if room is not None and num_pages * page_bytes > room:
        raise ValueError(
            f"num_pages={num_pages} was asked for, which takes at least {num_pages * page_bytes / 2**30:,.1f} GiB in "
            f"pages of {page_size} tokens, but there are {room / 2**30:,.1f} GiB of memory"
            f"{'' if device is None else f' on {device}'}. Ask for fewer, or for a part of the memory: "
            "PagePool.from_model(model, memory_fraction=0.9). Without num_pages the pool grows as it is needed."
        )


def holds_pages(tensor: Tensor) -> bool:
    """Whether these are the keys or values of a storage, to be read through block tables only."""
    return getattr(tensor, "_hf_paged_storage", False)


class LayerStorage:
    """Two tensors `(1, num_kv_heads, num_slots, head_dim)`, as FlexAttention reads them.

    Head by head, so that what one head reads of a page is one contiguous piece; token by token, a page that comes from
    memory is read more slowly.

    Args:
        keys: `(sequences, num_kv_heads, num_tokens, head_dim)`; gives the head count, head size, dtype and device.
        values: like `keys`; the head size may differ.
        num_pages: pages to hold.
        page_size: tokens per page.
    """

    def __init__(self, keys: Tensor, values: Tensor, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.device = keys.device
        self.dtype = keys.dtype
        self.key_shape = (keys.shape[1], keys.shape[3])
        self.value_shape = (values.shape[1], values.shape[3])
        self._held = (*self.key_shape, *self.value_shape, keys.dtype, keys.dtype, keys.device, keys.device)
        self._hold(self._zeros(self.key_shape, num_pages), self._zeros(self.value_shape, num_pages))
        self.num_carried_pages = 0
        """Pages at the beginning that these tensors were made with: the last `resize` wrote every slot of them."""
        # Growth replaces the tensors; a write by another thread must land before the copy or in the new ones.
        self._lock = threading.Lock()

    @property
    def keys(self) -> Tensor:
        """`(1, num_kv_heads, num_slots, head_dim)`."""
        return self.tensors[0]

    @property
    def values(self) -> Tensor:
        """Like `keys`."""
        return self.tensors[1]

    @property
    def num_pages(self) -> int:
        """Pages that fit."""
        return self.keys.shape[2] // self.page_size

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        elements = self.key_shape[0] * self.key_shape[1] + self.value_shape[0] * self.value_shape[1]
        return elements * self.dtype.itemsize

    def fits(self, keys: Tensor, values: Tensor) -> bool:
        """Whether new keys and values belong together and are like what is stored here."""
        num_rows, num_heads, num_tokens, head_dim = keys.shape
        num_value_rows, num_value_heads, num_value_tokens, value_dim = values.shape
        found = num_heads, head_dim, num_value_heads, value_dim, keys.dtype, values.dtype, keys.device, values.device
        return found == self._held and num_rows == num_value_rows and num_tokens == num_value_tokens

    def is_like(self, other: "LayerStorage") -> bool:
        """Whether keys and values that fit here fit there."""
        return self._held == other._held

    def mismatch(self, keys: Tensor, values: Tensor) -> str | None:
        """Say in words how new keys and values differ from what is stored here; None if they fit."""
        found = ((keys.shape[1], keys.shape[3]), (values.shape[1], values.shape[3]), keys.dtype, keys.device)
        held = (self.key_shape, self.value_shape, self.dtype, self.device)
        if found == held:
            return None
        names = ("key heads and head size", "value heads and head size", "dtype", "device")
        differences = zip(names, found, held, strict=True)
        return next(f"{name} {new}, but this cache holds {old}" for name, new, old in differences if new != old)

    def write(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Store tokens in their slots.

        Args:
            keys: `(num_kv_heads, num_tokens, head_dim)`, rotary embedding applied.
            values: like `keys`.
            slots: `(num_tokens,)` int64, distinct, all in pages with one holder.
        """
        with self._lock:
            held_keys, held_values = self.tensors
            held_keys[0].index_copy_(1, slots, keys)
            held_values[0].index_copy_(1, slots, values)

    def write_one_each(self, keys: Tensor, values: Tensor, slots: Slots | int) -> None:
        """Store one token of each row, on a CPU: as `write`, with less to be done for each call.

        Args:
            keys: `(num_rows, num_kv_heads, 1, head_dim)`, rotary embedding applied.
            values: like `keys`.
            slots: `(num_rows,)`, distinct, all in pages with one holder; or the one of the only row.
        """
        new_keys, new_values = _array(keys), _array(values)
        with self._lock:
            held_keys, held_values = self._arrays
            if isinstance(slots, int):
                held_keys[:, slots], held_values[:, slots] = new_keys[0, :, 0], new_values[0, :, 0]
            else:
                held_keys[:, slots] = new_keys[:, :, 0].swapaxes(0, 1)
                held_values[:, slots] = new_values[:, :, 0].swapaxes(0, 1)

    def write_on_gpu(self, keys: Tensor, values: Tensor, slots: Tensor, token_index: Tensor | None) -> None:
        """Store tokens by one kernel.

        Args:
            keys: `(num_rows, num_kv_heads, num_new, head_dim)`, rotary embedding applied.
            values: like `keys`.
            slots: `(num_tokens,)` int64, distinct, all in pages with one holder.
            token_index: `(num_tokens,)` int64, which of the `num_rows * num_new` tokens they are; None: all.
        """
        from hf_paged.pages.write_kernel import store_keys_and_values

        with self._lock:
            store_keys_and_values(keys, values, self.tensors, slots, token_index)

    def gather(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Read tokens: keys and values, each `(num_kv_heads, num_tokens, head_dim)`, of `slots` `(num_tokens,)`."""
        return self.keys[0].index_select(1, slots), self.values[0].index_select(1, slots)

    def copy_pages(self, sources: Tensor, targets: Tensor) -> None:
        """Copy whole pages; both `(num_copies,)` int64."""
        with self._lock:
            for tensor in self.tensors:
                pages = self._by_page(tensor)
                pages.index_copy_(1, targets, pages.index_select(1, sources))

    def clear_values(self, pages: Tensor) -> None:
        """Zero the values in `pages` `(num_pages,)` int64."""
        with self._lock:
            self._by_page(self.values).index_fill_(1, pages, 0)

    def read_pages(self, pages: Tensor) -> Tensor:
        """Copy whole pages: `(num_pages, page_size * token_bytes)` uint8, of `pages` `(num_pages,)` int64.

        Each is keys, then values, head by head, token by token.
        """
        parts = (
            self._by_page(tensor).index_select(1, pages).transpose(0, 1).flatten(1).view(torch.uint8)
            for tensor in self.tensors
        )
        return torch.cat(tuple(parts), dim=1)

    def write_pages(self, pages: Tensor, content: Tensor) -> None:
        """Fill whole pages with what `read_pages` returned; `pages` distinct, all with one holder."""
        with self._lock:
            first = 0
            for tensor in self.tensors:
                by_page = self._by_page(tensor)
                num_bytes = by_page[:, 0].numel() * self.dtype.itemsize
                part = content[:, first : first + num_bytes].contiguous().view(self.dtype)
                by_page.index_copy_(1, pages, part.view(len(pages), len(by_page), -1).transpose(0, 1))
                first += num_bytes

    def resize(self, num_pages: int) -> None:
        """Hold `num_pages` pages from now on, keeping the content of those that remain."""
        with self._lock:
            num_carried = min(num_pages, self.num_pages)
            kept = num_carried * self.page_size
            keys, values = self._zeros(self.key_shape, num_pages), self._zeros(self.value_shape, num_pages)
            keys[:, :, :kept].copy_(self.keys[:, :, :kept])
            values[:, :, :kept].copy_(self.values[:, :, :kept])
            self.num_carried_pages = num_carried
            self._hold(keys, values)

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        self.tensors = keys, values  # in one go: a reader must not get keys and values of different sizes
        """Keys and values, each `(1, num_kv_heads, num_slots, head_dim)`; the head sizes may differ."""
        if self.device.type == "cpu":
            self._arrays = _array(keys)[0], _array(values)[0]

    def _by_page(self, tensor: Tensor) -> Tensor:
        _, num_heads, _, head_dim = tensor.shape
        return tensor.view(num_heads, -1, self.page_size * head_dim)

    def _zeros(self, head_shape: tuple[int, int], num_pages: int) -> Tensor:
        num_heads, head_dim = head_shape
        # One page at least, so that there is something to index when every token so far was padding.
        shape = (1, num_heads, max(1, num_pages) * self.page_size, head_dim)
        # Not an inference tensor, so that caches filled under inference_mode go on working outside of it.
        with torch.inference_mode(False):
            if self.device.type == "cpu":
                tensor = untouched_memory(math.prod(shape) * self.dtype.itemsize).view(self.dtype).view(shape)
            else:
                tensor = torch.zeros(shape, dtype=self.dtype, device=self.device)
        tensor._hf_paged_storage = True  # type: ignore[attr-defined]
        return tensor


def _array(tensor: Tensor) -> npt.NDArray[Any]:
    """The same memory for NumPy, which takes bfloat16 for integers, since it has no such type."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
