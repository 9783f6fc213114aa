"""The dtype of attention under `torch.autocast`."""

import torch
from torch import Tensor


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """Return what `torch.autocast` would have attention computed in, where this tensor is; None if it is off."""
    device = tensor.device.type
    if not _has_autocast(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch.compile before torch 2.13 can't look into what is called
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)
