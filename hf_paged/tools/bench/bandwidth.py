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
    """Bytes per second that memory gives, measured in turns with something else.

    On a CPU to a sum that reads it in huge pages, as fast as it can be; on a GPU to a copy, which reads and writes.

    Args:
        device: whose memory.
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
        if self._memory.is_cuda:
            return 2 * self._memory.nbytes / device_seconds(lambda: self._copy.copy_(self._memory))
        start = time.perf_counter()
        self._memory.sum().item()
        return self._memory.nbytes / (time.perf_counter() - start)


def device_seconds(action: Callable[[], object]) -> float:
    """Seconds that a GPU works on what is launched, by its own clock."""
    start, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
    start.record()
    action()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
