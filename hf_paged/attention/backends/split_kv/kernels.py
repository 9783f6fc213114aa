"""Triton kernels: attention to one piece of a row's keys and values, and what puts the pieces of a row together.

Imported where one of them is launched first: Triton is there with torch's builds for GPUs only.
"""

import triton
import triton.language as tl

_NO_SPECIALIZATION = ["num_slots", "num_queries", "table_width"]


@triton.jit  # type: ignore[untyped-decorator]
def _add_block(
    begin,
    offsets,
    stop,
    query,
    top,
    total,
    output,
    kv_stop,
    kv_start,
    keys_ptr,
    values_ptr,
    row_pages_ptr,
    first_slot,
    key_dims,
    value_dims,
    scale,
    softcap,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_KEY_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_START: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """Attend to one more block of tokens, up to `stop` unless it `IS_WHOLE`."""
    tokens = begin + offsets
    is_held = tokens < stop
    if PAGE_SIZE % BLOCK == 0:
        page = tl.load(row_pages_ptr + begin // PAGE_SIZE).to(tl.int64)
    elif IS_WHOLE:
        page = tl.load(row_pages_ptr + tokens // PAGE_SIZE).to(tl.int64)
    else:
        page = tl.load(row_pages_ptr + tokens // PAGE_SIZE, mask=is_held, other=0).to(tl.int64)
    slots = first_slot + page * PAGE_SIZE + tokens % PAGE_SIZE
    # Slots behind the end of the row are read, too: loads without a mask are on their way while others are used.
    keys_at = keys_ptr + slots[:, None] * KEY_DIM + key_dims[None, :]
    if KEY_DIM == PADDED_KEY_DIM:
        keys = tl.load(keys_at)
    else:
        keys = tl.load(keys_at, mask=(key_dims < KEY_DIM)[None, :], other=0.0)
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
    if HAS_SOFTCAP:
        scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
    scores *= 1.4426950408889634
    is_seen = tokens[None, :] < kv_stop[:, None]
    if HAS_START:
        is_seen &= tokens[None, :] >= kv_start[:, None]
    scores = tl.where(is_seen, scores, -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    least = tl.where(new_top == -float("inf"), 0.0, new_top)
    weights = tl.exp2(scores - least[:, None])
    decay = tl.exp2(top - least)
    values_at = values_ptr + slots[:, None] * VALUE_DIM + value_dims[None, :]
    if VALUE_DIM == PADDED_VALUE_DIM:
        values = tl.load(values_at)
    else:
        values = tl.load(values_at, mask=(value_dims < VALUE_DIM)[None, :], other=0.0)
    if not IS_WHOLE:
        values = tl.where(is_held[:, None], values, 0.0)  # they have no weight, but may be NaN
    output = output * decay[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    return new_top, total * decay + tl.sum(weights, 1), output


@triton.jit(do_not_specialize=_NO_SPECIALIZATION)  # type: ignore[untyped-decorator]
def attend_to_split(
    query_ptr,
    keys_ptr,
    values_ptr,
    parts_ptr,
    lse_ptr,
    table_ptr,
    splits_ptr,
    kv_stop_ptr,
    kv_start_ptr,
    scale,
    softcap,
    row_stride,
    head_stride,
    query_stride,
    num_slots,
    num_queries,
    table_width,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    GQA_RATIO: tl.constexpr,
    STACKED: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_KEY_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_START: tl.constexpr,
):
    """Attend to one split with the queries of its row that share a key/value head.

    One program for each key/value head and split. `STACKED` is the next power of two, of 16 at least, of the queries
    times the heads that share one; scores are in powers of two.
    """
    head = tl.program_id(0)
    split = tl.program_id(1)
    row = tl.load(splits_ptr + 3 * split)
    start = tl.load(splits_ptr + 3 * split + 1)
    stop = tl.load(splits_ptr + 3 * split + 2)
    if start >= stop:
        return
    stacked = tl.arange(0, STACKED)
    asked = stacked // GQA_RATIO
    is_query = asked < num_queries
    key_dims = tl.arange(0, PADDED_KEY_DIM)
    value_dims = tl.arange(0, PADDED_VALUE_DIM)
    own_head = head * GQA_RATIO + stacked % GQA_RATIO
    query_at = row.to(tl.int64) * row_stride + own_head * head_stride + asked * query_stride
    query = tl.load(
        query_ptr + query_at[:, None] + key_dims[None, :],
        mask=is_query[:, None] & (key_dims < KEY_DIM)[None, :],
        other=0.0,
    )
    kv_stop = tl.load(kv_stop_ptr + row * num_queries + asked, mask=is_query, other=0)
    kv_start = tl.load(kv_start_ptr + row * num_queries + asked, mask=is_query, other=0)
    row_pages_ptr = table_ptr + row * table_width
    first_slot = head.to(tl.int64) * num_slots
    offsets = tl.arange(0, BLOCK)
    top = tl.full([STACKED], -float("inf"), tl.float32)
    total = tl.zeros([STACKED], tl.float32)
    output = tl.zeros([STACKED, PADDED_VALUE_DIM], tl.float32)
    whole_stop = stop - stop % BLOCK
    for begin in range(start, whole_stop, BLOCK):
        top, total, output = _add_block(
            begin, offsets, stop, query, top, total, output, kv_stop, kv_start, keys_ptr, values_ptr, row_pages_ptr,
            first_slot, key_dims, value_dims, scale, softcap, PAGE_SIZE, BLOCK, KEY_DIM, VALUE_DIM, PADDED_KEY_DIM,
            PADDED_VALUE_DIM, HAS_SOFTCAP, HAS_START, True,
        )  # fmt: skip
    if whole_stop < stop:
        top, total, output = _add_block(
            whole_stop, offsets, stop, query, top, total, output, kv_stop, kv_start, keys_ptr, values_ptr,
            row_pages_ptr, first_slot, key_dims, value_dims, scale, softcap, PAGE_SIZE, BLOCK, KEY_DIM, VALUE_DIM,
            PADDED_KEY_DIM, PADDED_VALUE_DIM, HAS_SOFTCAP, HAS_START, False,
        )  # fmt: skip
    num_stacked = num_queries * GQA_RATIO
    part_at = (split * tl.num_programs(0) + head).to(tl.int64) * num_stacked + stacked
    held = tl.where(total > 0, total, 1.0)
    tl.store(
        parts_ptr + part_at[:, None] * VALUE_DIM + value_dims[None, :],
        output / held[:, None],
        mask=is_query[:, None] & (value_dims < VALUE_DIM)[None, :],
    )
    tl.store(lse_ptr + part_at, tl.where(total > 0, top + tl.log2(held), -float("inf")), mask=is_query)


@triton.jit(do_not_specialize=["num_queries"])  # type: ignore[untyped-decorator]
def merge_splits(
    parts_ptr,
    lse_ptr,
    first_split_ptr,
    sinks_ptr,
    output_ptr,
    num_queries,
    NUM_KV_HEADS: tl.constexpr,
    GQA_RATIO: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    AT_ONCE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Put the parts of a row together, one program for each query and head; 0 where nothing is seen."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    asked = tl.program_id(2)
    stacked = asked * GQA_RATIO + head % GQA_RATIO
    num_stacked = num_queries * GQA_RATIO
    first = tl.load(first_split_ptr + row)
    last = tl.load(first_split_ptr + row + 1)
    dims = tl.arange(0, PADDED_VALUE_DIM)
    offsets = tl.arange(0, AT_ONCE)
    output = tl.zeros([PADDED_VALUE_DIM], tl.float32)
    top = tl.full([], -float("inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    if HAS_SINKS:
        top = tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
        total += 1.0
    for begin in range(first, last, AT_ONCE):
        splits = begin + offsets
        is_own = splits < last
        part_at = (splits.to(tl.int64) * NUM_KV_HEADS + head // GQA_RATIO) * num_stacked + stacked
        lse = tl.load(lse_ptr + part_at, mask=is_own, other=-float("inf"))
        new_top = tl.maximum(top, tl.max(lse, 0))
        least = tl.where(new_top == -float("inf"), 0.0, new_top)
        shares = tl.exp2(lse - least)
        decay = tl.exp2(top - least)
        parts = tl.load(
            parts_ptr + part_at[:, None] * VALUE_DIM + dims[None, :],
            mask=is_own[:, None] & (dims < VALUE_DIM)[None, :],
            other=0.0,
        )
        output = output * decay + tl.sum(parts * shares[:, None], 0)
        total = total * decay + tl.sum(shares, 0)
        top = new_top
    output = output / tl.where(total > 0, total, 1.0)
    num_heads: tl.constexpr = NUM_KV_HEADS * GQA_RATIO
    at = (row.to(tl.int64) * num_queries + asked) * num_heads + head
    tl.store(output_ptr + at * VALUE_DIM + dims, output.to(output_ptr.dtype.element_ty), mask=dims < VALUE_DIM)
