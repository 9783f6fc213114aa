"""Memory that stands behind a tensor: of what is mapped, a system backs only what was touched."""

import mmap
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

BoolVector = npt.NDArray[np.bool_]

PAGE_BYTES = mmap.PAGESIZE
"""A page of the operating system, not one of a cache."""

_PAGEMAP = Path("/proc/self/pagemap")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
_PRESENT, _SWAPPED, _EXCLUSIVE = (np.uint64(1 << bit) for bit in (63, 62, 56))


def num_os_pages(tensor: Tensor) -> int:
    """Pages of the operating system that hold bytes of a contiguous tensor."""
    first = tensor.data_ptr() // PAGE_BYTES
    return -(-(tensor.data_ptr() + tensor.nbytes) // PAGE_BYTES) - first


def resident_pages(tensor: Tensor) -> BoolVector | None:
    """Ask the system which of its pages behind a tensor take memory, or swap space.

    As in the resident set size, the one page of zeros that is read wherever nothing was written does not count.
    Neither does, as long as it lives, what a forked process shares.

    Args:
        tensor: contiguous, in main memory.

    Returns:
        `(num_os_pages(tensor),)`; None where the system doesn't tell. Linux does.

    Source:
        Documentation/admin-guide/mm/pagemap.rst of the Linux kernel.
    """
    first, count = tensor.data_ptr() // PAGE_BYTES, num_os_pages(tensor)
    try:
        with _PAGEMAP.open("rb", buffering=0) as file:
            file.seek(8 * first)
            entries = np.frombuffer(file.read(8 * count), dtype=np.uint64)
    except OSError:
        return None
    if len(entries) != count:
        return None
    own = _PRESENT | _EXCLUSIVE
    taken: BoolVector = ((entries & own) == own) | ((entries & _SWAPPED) > 0)
    return taken


def backing_bytes() -> int:
    """Bytes that the system may back where one is touched: a page, or a huge one where it gives these unasked."""
    is_always = _choice(_HUGE_PAGES) == "always"
    sizes = [PAGE_BYTES]
    folders = list(_HUGE_PAGES.glob("hugepages-*kB"))
    for folder in folders:
        if (chosen := _choice(folder)) == "always" or (chosen == "inherit" and is_always):
            sizes.append(1024 * int(folder.name.removeprefix("hugepages-").removesuffix("kB")))
    if is_always and not folders:  # before Linux 6.8 there was one size
        sizes.append(int((_HUGE_PAGES / "hpage_pmd_size").read_text(encoding="ascii")))
    return max(sizes)


def _choice(folder: Path) -> str | None:
    """What a setting like `always [madvise] never` is set to; None where there is none."""
    try:
        found = re.search(r"\[(\w+)\]", (folder / "enabled").read_text(encoding="ascii"))
    except OSError:
        return None
    return None if found is None else found[1]
