"""A Triton kernel that stores new keys and values on a GPU.

Imported where it is launched first: Triton is there with torch's builds for GPUs only.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

_FEW = 64  # tokens, each of which has a program of its own for each head
_MANY_AT_ONCE = 16


@triton.jit(do_not_specialize=["num_slots", "num_new", "num_tokens"])  # type: ignore[untyped-decorator]
def _store(
    new_ptr,
    held_ptr,
    slots,
    indices,
    is_token,
    row_stride,
    head_stride,
    token_stride,
    num_new,
    num_slots,
    head,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
):
    dims = tl.arange(0, PADDED)
    mask = is_token[:, None] & (dims < HEAD_DIM)[None, :]
    there = (indices // num_new).to(tl.int64) * row_stride + head * head_stride + (indices % num_new) * token_stride
    tokens = tl.load(new_ptr + there[:, None] + dims[None, :], mask=mask)
    here = head.to(tl.int64) * num_slots + slots
    tl.store(held_ptr + here[:, None] * HEAD_DIM + dims[None, :], tokens, mask=mask)


@triton.jit(do_not_specialize=["num_slots", "num_new", "num_tokens"])  # type: ignore[untyped-decorator]
def _store_keys_and_values(
    keys_ptr,
    values_ptr,
    held_keys_ptr,
    held_values_ptr,
    slots_ptr,
    index_ptr,
    key_row_stride,
    key_head_stride,
    key_token_stride,
    value_row_stride,
    value_head_stride,
    value_token_stride,
    num_new,
    num_slots,
    num_tokens,
    NUM_KEY_HEADS: tl.constexpr,
    NUM_VALUE_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_KEY_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    AT_ONCE: tl.constexpr,
    HAS_INDEX: tl.constexpr,
):
    head = tl.program_id(1)
    tokens = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    is_token = tokens < num_tokens
    slots = tl.load(slots_ptr + tokens, mask=is_token, other=0)
    indices = tl.load(index_ptr + tokens, mask=is_token, other=0).to(tl.int32) if HAS_INDEX else tokens
    if head < NUM_KEY_HEADS:
        _store(
            keys_ptr,
            held_keys_ptr,
            slots,
            indices,
            is_token,
            key_row_stride,
            key_head_stride,
            key_token_stride,
            num_new,
            num_slots,
            head,
            KEY_DIM,
            PADDED_KEY_DIM,
        )
    if head < NUM_VALUE_HEADS:
        _store(
            values_ptr,
            held_values_ptr,
            slots,
            indices,
            is_token,
            value_row_stride,
            value_head_stride,
            value_token_stride,
            num_new,
            num_slots,
            head,
            VALUE_DIM,
            PADDED_VALUE_DIM,
        )


def store_keys_and_values(
    keys: Tensor, values: Tensor, held: tuple[Tensor, Tensor], slots: Tensor, token_index: Tensor | None
) -> None:
    """Store tokens in their slots, all on one GPU.

    Args:
        keys: `(num_rows, num_kv_heads, num_new, head_dim)`.
        values: like `keys`.
        held: keys and values of a storage, each `(1, num_kv_heads, num_slots, head_dim)`.
        slots: `(num_tokens,)` int64, distinct.
        token_index: `(num_tokens,)` int64, which of the `num_rows * num_new` tokens they are; None: all.
    """
    if not len(slots):
        return
    keys, values = (tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in (keys, values))
    held_keys, held_values = held
    _, num_key_heads, num_new, key_dim = keys.shape
    num_value_heads, value_dim = values.shape[1], values.shape[3]
    at_once = 1 if len(slots) <= _FEW else _MANY_AT_ONCE
    launch: Any = _store_keys_and_values[triton.cdiv(len(slots), at_once), max(num_key_heads, num_value_heads)]
    launch(
        keys,
        values,
        held_keys,
        held_values,
        slots,
        slots if token_index is None else token_index,
        *keys.stride()[:3],
        *values.stride()[:3],
        num_new,
        held_keys.shape[2],
        len(slots),
        NUM_KEY_HEADS=num_key_heads,
        NUM_VALUE_HEADS=num_value_heads,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        PADDED_KEY_DIM=triton.next_power_of_2(key_dim),
        PADDED_VALUE_DIM=triton.next_power_of_2(value_dim),
        AT_ONCE=at_once,
        HAS_INDEX=token_index is not None,
        num_warps=1 if at_once == 1 else 4,
    )
