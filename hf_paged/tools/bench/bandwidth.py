"""How fast this machine reads memory, and how near to that a decoding step comes.

A decoding step of one row does so little arithmetic that reading the weights and the cached keys and values bounds
it. A step of 30 ms that must read 538 MB of weights and 23 MB of keys and values reads 18.7 GB/s; on a machine that
reads 28.8 GB/s its share is 65 %.
"""

import statistics
import time
from collections.abc import Callable

import torch

from hf_paged._torch.host_memory import untouched_memory

_BYTES_ON_CPU, _BYTES = 2**28, 2**30  # far more than the processor's caches hold
_NUM_WARM_UPS = 5


class Bandwidth:
    """Bytes per second that a device's memory gives, measured in turns with something else.

    On a CPU to a sum that reads it in huge pages, as fast as it can be; on a GPU to a copy, which reads and writes.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type == "cpu":
            memory = untouched_memory(_BYTES_ON_CPU, huge_pages=True).view(torch.float32)
        else:
            memory = torch.empty(_BYTES // 4, device=device)
            self._copy = torch.empty_like(memory)
        self._memory = memory.fill_(1)
        for _ in range(_NUM_WARM_UPS):
            self._rate()
        self._rates: list[float] = []

    def measure(self) -> None:
        """Read the memory once, or copy it."""
        self._rates.append(self._rate())

    def take_median(self) -> float:
        """Return the median since the last time, bytes per second."""
        rates, self._rates = self._rates, []
        return statistics.median(rates)

    def _rate(self) -> float:
        memory = self._memory
        if memory.is_cuda:
            return 2 * memory.nbytes / seconds(lambda: self._copy.copy_(memory), memory.device)
        return memory.nbytes / seconds(memory.sum, memory.device)


def seconds(action: Callable[[], object], device: torch.device) -> float:
    """Seconds that an action takes, on a GPU by its own clock, without the launch."""
    if device.type != "cuda":
        start = time.perf_counter()
        action()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    before.record()
    action()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / 1e3
