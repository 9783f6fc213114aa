"""What a model may be run under, and with which tensors, for pages to take part in it."""

import torch
from torch import Tensor
from torch._C import _functorch, _get_dispatch_mode, _TorchDispatchModeKey
from torch.autograd import forward_ad

_MODES = {
    _TorchDispatchModeKey.FAKE: "under FakeTensorMode",
    _TorchDispatchModeKey.PROXY: "while make_fx or torch.export traces it",
    _TorchDispatchModeKey.FUNCTIONAL: "while torch.export traces it",
}


def check_surroundings() -> None:
    """Refuse a pass that isn't computed as it is written.

    Pages are written in place, and which ones is decided in Python: a trace would hold the pages of one pass for good,
    and a transform of `torch.func` would have to see what is written.

    Raises:
        ValueError: if a transform, a trace, forward-mode gradients or fake tensors are under way.
    """
    where = next((name for mode, name in _MODES.items() if _get_dispatch_mode(mode) is not None), None)
    if _functorch.peek_interpreter_stack() is not None:
        where = "under a transform of torch.func (vmap, grad, jvp)"
    elif torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        where = "while torch.jit traces it"
    elif forward_ad._current_level >= 0:
        where = "with forward-mode gradients"
    if where is not None:
        raise ValueError(
            f"A model was run with a PagedCache {where}, but pages are written in place, which can't be traced or "
            "transformed. Run it with Transformers' DynamicCache there, or outside of it."
        )


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
