"""Memory of the host, from the operating system itself, and what of any device's is free."""

import contextlib
import ctypes
import mmap
import os

import numpy as np
import torch
from torch import Tensor

from hf_paged._torch.tricks import Trick

HUGE_PAGES = Trick(
    "huge_pages",
    "weights that gather_weights() moves are put into huge pages",
    "they are put into pages of 4 KiB",
    device_type="cpu",
)


def untouched_memory(num_bytes: int, huge_pages: bool = False) -> Tensor:
    """Zeros, `(num_bytes,)` uint8, that take no memory before they are touched and give it back when they are gone.

    Not from an allocator, which may keep what is freed, and zero by hand, and so touch, what it hands out again.

    Args:
        num_bytes: at least 1.
        huge_pages: let the system take memory 2 MiB at a time, where it can, in place of 4 KiB: the processor then
            looks up fewer addresses. For what is going to be touched as a whole.

    Raises:
        MemoryError: if the system can't give as much.
    """
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(
            f"The system can't give {num_bytes / 2**30:,.1f} GiB at once. Where these are the pages of a layer, ask "
            "for fewer (num_pages)."
        ) from error
    if huge_pages and HUGE_PAGES.is_on and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.from_numpy(np.frombuffer(memory, dtype=np.uint8))


def give_back_freed() -> None:
    """Let the C library give back to the system what was freed, tens of MiB after large tensors came and went.

    It takes some milliseconds. Nothing happens where the C library has no such call.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def memory_for_pages(device: torch.device | None) -> int | None:
    """Bytes that pages may be promised at once: all of a CPU, which gives what is touched, and what is free of a GPU.

    Args:
        device: where the first layer is; None if it is not known yet: then the most that there may be anywhere. The
            other layers may be on other GPUs.

    Returns:
        The bytes; None where they can't be told.
    """
    gpus = {index: torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())}
    if device is not None and device.type == "cuda":
        return free_bytes(device) + sum(gpus.values()) - gpus[device.index]
    if device is not None and device.type != "cpu":
        return None
    try:
        of_host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):
        return None  # not on this system
    return of_host if device is not None else max(of_host, sum(gpus.values()))


def free_bytes(device: torch.device) -> int:
    """Bytes of a device's memory that nobody uses; what torch only keeps for later counts as free.

    Raises:
        ValueError: if that can't be told of this device.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        if device.type == "cpu":
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):
        pass  # not on this system
    raise ValueError(
        f"How much memory is free on {device.type} can't be told, so memory_fraction can't be used. Pass num_pages."
    )
