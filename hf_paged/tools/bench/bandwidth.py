"""How fast this machine reads memory, and how near to that a decoding step comes.

A decoding step of one row does so little arithmetic that reading the weights and the cached keys and values bounds
it. A step of 30 ms that must read 538 MB of weights and 23 MB of keys and values reads 18.7 GB/s; on a machine that
reads 28.8 GB/s its share is 65 %.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from hf_paged._torch.host_memory import untouched_memory

_BYTES_ON_CPU, _BYTES = 2**28, 2**30  # far more than the processor's caches hold
_ROUNDS = 5


class Bandwidth:
    """Bytes per second that torch's threads read from memory, measured in turns with something else.

    Args:
        device: whose memory; of a CPU's, it is read in huge pages, as fast as it can be.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type == "cpu":
            memory = untouched_memory(_BYTES_ON_CPU, huge_pages=True).view(torch.float32)
        else:
            memory = torch.empty(_BYTES // 4, device=device)
        self._halves = memory.fill_(1).view(2, -1)
        self._rates: list[float] = []
        best = {read: max(self._rate(read) for _ in range(_ROUNDS)) for read in (_sum, _dot)}
        self._read = max(best, key=lambda read: best[read])

    def measure(self) -> None:
        """Read the memory once, in the faster of two ways."""
        self._rates.append(self._rate(self._read))

    def take_median(self) -> float:
        """Return the median since the last time, bytes per second."""
        rates, self._rates = self._rates, []
        return statistics.median(rates)

    def _rate(self, read: Callable[[Tensor, Tensor], Tensor]) -> float:
        start = time.perf_counter()
        read(*self._halves).item()
        return self._halves.nbytes / (time.perf_counter() - start)


def bandwidth_share(num_bytes: int, seconds: float, bandwidth: float) -> float:
    """The part of `bandwidth`, bytes per second, that reading `num_bytes` in `seconds` makes use of."""
    return num_bytes / seconds / bandwidth


def _sum(first: Tensor, second: Tensor) -> Tensor:
    return first.sum() + second.sum()


def _dot(first: Tensor, second: Tensor) -> Tensor:
    return first.dot(second)
