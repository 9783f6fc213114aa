"""Objects that compiled graphs take as inputs without looking into them."""

from collections.abc import Callable
from typing import Any, TypeVar

from hf_paged._torch.private import Private
from hf_paged._torch.tricks import Trick

C = TypeVar("C", bound=type)

_BASE = Private("torch._custom_class_base:CustomClassBase", "torch._opaque_base:OpaqueBase")
_REGISTER = Private(
    "torch._library.opaque_object:register_custom_class", "torch._library.opaque_object:register_opaque_type"
)

OPAQUE_INPUTS = Trick(
    "opaque_inputs",
    "compiled graphs take a step's metadata as an input that they don't look into",
    "compiled() runs models uncompiled, and torch.compile parts graphs at each attention",
    _BASE,
    _REGISTER,
)

Opaque: Any = _BASE.value if OPAQUE_INPUTS.is_on else object
"""Base of classes that are given to `opaque`."""


def opaque(kind: C) -> C:
    """Make a class derived from `Opaque` known to torch, as inputs of graphs."""
    if OPAQUE_INPUTS.is_on:
        register: Callable[..., None] = _REGISTER.value
        # torch 2.14 renamed the function, and what it calls objects that are never looked into.
        try:
            register(kind, typ="symbolic" if register.__name__ == "register_custom_class" else "reference")
        except Exception as error:
            OPAQUE_INPUTS.fall_back(error)
    return kind
