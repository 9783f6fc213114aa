"""What a model may be run under, and with which tensors, for pages to take part in it."""

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from hf_paged._torch.private import Private
from hf_paged._torch.tricks import Trick

_NO_PROFILER = nullcontext()

_DISPATCH = Private("torch._C", check=lambda module: [module._get_dispatch_mode(key) for key in _keys(module)])
_TRANSFORM = Private("torch._C:_functorch.peek_interpreter_stack", check=lambda peek: peek())
_GRADIENT_LEVEL = Private("torch.autograd.forward_ad", check=lambda module: module._current_level >= 0)
_PROFILER = Private("torch.autograd.profiler", check=lambda module: bool(module._is_profiler_enabled))

MODES = Trick(
    "refuse_tracing",
    "a pass under FakeTensorMode, make_fx or torch.export is refused",
    "nothing tells such a pass, and what it returns is wrong",
    _DISPATCH,
    can_be_switched_off=False,
)
TRANSFORMS = Trick(
    "refuse_transforms",
    "a pass under vmap, grad or jvp of torch.func is refused",
    "nothing tells such a pass, and what it returns is wrong",
    _TRANSFORM,
    can_be_switched_off=False,
)
GRADIENTS = Trick(
    "refuse_forward_gradients",
    "a pass with forward-mode gradients is refused",
    "nothing tells such a pass, and its gradients are wrong",
    _GRADIENT_LEVEL,
    can_be_switched_off=False,
)
PROFILER = Trick(
    "profiler_ranges",
    "torch's profiler shows what is ours as hf_paged::...",
    "its operations are shown without a name",
    _PROFILER,
)


def check_surroundings() -> None:
    """Refuse a pass that isn't computed as it is written.

    Pages are written in place, and which ones is decided in Python: a trace would hold the pages of one pass for good,
    and a transform of `torch.func` would have to see what is written. What can't be told with this torch is not
    refused; a log message says so.

    Raises:
        ValueError: if a transform, a trace, forward-mode gradients or fake tensors are under way.
    """
    where = next((where for is_there, where in _surroundings() if is_there()), None)
    if where is not None:
        raise ValueError(
            f"A model was run with a PagedCache {where}, but pages are written in place, which can't be traced or "
            "transformed. Run it with Transformers' DynamicCache there, or outside of it."
        )


@cache
def _surroundings() -> tuple[tuple[Callable[[], bool], str], ...]:
    """Whether a pass is under way somewhere, and where; as far as this torch lets it be told."""
    found: list[tuple[Callable[[], bool], str]] = []
    if TRANSFORMS.is_on:
        peek = _TRANSFORM.value
        found.append((lambda: peek() is not None, "under a transform of torch.func (vmap, grad, jvp)"))
    found.append((torch.jit.is_tracing, "while torch.jit traces it"))  # type: ignore[attr-defined]
    if GRADIENTS.is_on:
        module = _GRADIENT_LEVEL.value
        found.append((lambda: module._current_level >= 0, "with forward-mode gradients"))
    if MODES.is_on:
        mode_of = _DISPATCH.value._get_dispatch_mode
        names = "under FakeTensorMode", "while make_fx or torch.export traces it", "while torch.export traces it"
        for key, where in zip(_keys(_DISPATCH.value), names, strict=True):
            found.append((lambda key=key: mode_of(key) is not None, where))  # type: ignore[misc]
    return tuple(found)


def profiled(name: str) -> AbstractContextManager[object]:
    """Have what happens within shown by torch's profiler as `hf_paged::{name}`."""
    if _profiler()._is_profiler_enabled:
        return torch.autograd.profiler.record_function(f"hf_paged::{name}")
    return _NO_PROFILER


@cache
def _profiler() -> Any:
    return _PROFILER.value if PROFILER.is_on else SimpleNamespace(_is_profiler_enabled=False)


def _keys(module: Any) -> tuple[Any, ...]:
    kinds = module._TorchDispatchModeKey
    return kinds.FAKE, kinds.PROXY, kinds.FUNCTIONAL


def check_dense(tensor: Tensor) -> None:
    """Refuse keys or values that aren't an ordinary dense tensor.

    Raises:
        ValueError: if it is fake, distributed, nested, sparse or quantised.
    """
    kind = type(tensor)
    if kind is not Tensor and kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        found = f"a {kind.__name__}"
    elif tensor.layout is not torch.strided:
        found = f"a sparse tensor ({tensor.layout})"
    elif tensor.is_nested or tensor.is_quantized:
        found = "a nested tensor" if tensor.is_nested else f"a quantised tensor ({tensor.dtype})"
    else:
        return
    raise ValueError(
        f"Keys or values were given as {found}, but the pages of a PagedCache hold ordinary dense tensors. Give those "
        "(a DTensor has to_local(), others to_dense(), dequantize() or to_padded_tensor()), or use Transformers' "
        "DynamicCache."
    )


@cache
def can_launch(device: torch.device) -> bool:
    """Whether Triton's kernels can be launched there; it comes with torch's builds for the GPUs of NVIDIA and AMD."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None
