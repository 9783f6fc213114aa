"""Copies on the host that are made while the device goes on."""

import torch
from torch import Tensor


class Transfer:
    """Small tensors on their way to the host, behind what the current stream has been given so far.

    Args:
        tensors: all on one device.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        # On CUDA this takes pinned memory, and returns at once.
        self._copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self._arrival = torch.cuda.current_stream(tensors[0].device).record_event() if tensors[0].is_cuda else None

    def wait(self) -> list[Tensor]:
        """Wait for them, not for what the stream was given later."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._copies
