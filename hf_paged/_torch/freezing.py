"""Inductor at its fastest: weights as constants, and the fastest product of several."""

from contextlib import AbstractContextManager
from typing import Any

import torch._inductor.config


def frozen_weights() -> AbstractContextManager[Any]:
    """While it is open, graphs are compiled with frozen weights.

    Options of `torch.compile` are not enough: dynamo looks whether weights are frozen before inductor is given them.
    """
    flags: AbstractContextManager[Any] = torch._inductor.config.patch(
        freezing=True, max_autotune=True, max_autotune_gemm_backends="CPP,ATEN"
    )
    return flags
