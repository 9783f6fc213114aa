"""What a model computes keys and values by: whether two passes, at different times, do so alike."""

import hashlib
from collections.abc import Iterator
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

_NUM_SAMPLES = 4  # of each weight
PLAIN = (bool, int, float, str, torch.dtype)
OF_ADAPTERS = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")
"""What the layers of PEFT say of their adapters, beside weights."""
_serial: WeakKeyDictionary[torch.nn.Module, int] = WeakKeyDictionary()
_serials = count()


def fingerprint(model: torch.nn.Module) -> bytes:
    """Tell apart all that a model computes keys and values by, within this process.

    That is the model itself, its weights and buffers (their addresses, versions and some of their values: what is
    written around torch's versions, as by `weight.data += delta`, changes most values), numbers, flags and names in
    its modules, its adapters, and `torch.autocast`. Not noticed are single values written through `weight.data`.
    """
    found: list[Any] = [_serial.setdefault(model, next(_serials))]
    samples: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for module in model.modules():
        held = vars(module)
        found += (item for item in held.items() if type(item[1]) in PLAIN)
        if type(module).__module__.startswith("peft."):
            found += (held.get(name) for name in OF_ADAPTERS)
        for weight in (*held["_parameters"].values(), *held["_buffers"].values()):
            for tensor in plain_tensors(weight):
                found += (
                    id(weight),
                    tensor.data_ptr(),
                    tensor.shape,
                    -1 if weight.is_inference() else weight._version,
                )
                if tensor.numel() and not tensor.is_meta:
                    samples.setdefault((tensor.dtype, tensor.device), []).append(_sample(tensor.detach()))
    for device in {device.type for _, device in samples}:
        found += (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
    digest = hashlib.sha256(repr(found).encode())
    for taken in samples.values():
        digest.update(torch.cat(taken).cpu().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def plain_tensors(weight: Tensor | None) -> Iterator[Tensor]:
    """A weight itself, or those that it is made of, as quantised and distributed ones are."""
    if weight is None:
        return
    if not hasattr(weight, "__tensor_flatten__"):
        yield weight
        return
    for name in weight.__tensor_flatten__()[0]:
        yield from plain_tensors(getattr(weight, name))


def _sample(tensor: Tensor) -> Tensor:
    step = max(1, tensor.numel() // _NUM_SAMPLES)
    if tensor.is_contiguous():
        return tensor.as_strided((min(_NUM_SAMPLES, tensor.numel()),), (step,), tensor.storage_offset())
    return tensor.flatten()[::step][:_NUM_SAMPLES]
