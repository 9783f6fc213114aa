"""The dtype of attention under `torch.autocast`."""

import torch
from torch import Tensor


def autocast(tensor: Tensor) -> Tensor:
    """Give queries, keys or values the dtype that `torch.autocast`, if it is on, would have attention computed in."""
    device = tensor.device.type
    if not _has_autocast(device) or not torch.is_autocast_enabled(device):
        return tensor
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.get_autocast_dtype(device))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch.compile before torch 2.13 can't look into what is called
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)
