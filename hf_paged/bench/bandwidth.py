"""How fast this machine reads memory, and how near to that a decoding step comes.

A decoding step of one row does so little arithmetic that reading the weights and the cached keys and values bounds
it. A step of 30 ms that must read 538 MB of weights and 23 MB of keys and values reads 18.7 GB/s; on a machine that
reads 28.8 GB/s its share is 65 %.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from hf_paged.host_memory import untouched_memory

_BYTES = 2**30
_ROUNDS = 5


def read_bandwidth(device: torch.device, num_bytes: int = _BYTES) -> float:
    """Measure bytes per second that torch's threads read from memory: the best of several runs and two ways.

    Args:
        device: whose memory; of a CPU's, it is read in huge pages, as fast as it can be.
        num_bytes: read in each run, in two halves; far more than the processor's caches hold.
    """
    if device.type == "cpu":
        memory = untouched_memory(num_bytes, huge_pages=True).view(torch.float32)
    else:
        memory = torch.empty(num_bytes // 4, device=device)
    first, second = memory.fill_(1).view(2, -1)
    return max(_rate(lambda: first.sum() + second.sum(), first), _rate(lambda: first.dot(second), first))


def bandwidth_share(num_bytes: int, seconds: float, bandwidth: float) -> float:
    """The part of `bandwidth`, bytes per second, that reading `num_bytes` in `seconds` makes use of."""
    return num_bytes / seconds / bandwidth


def _rate(read: Callable[[], Tensor], half: Tensor) -> float:
    seconds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        read().item()
        seconds.append(time.perf_counter() - start)
    return 2 * half.nbytes / min(seconds)
