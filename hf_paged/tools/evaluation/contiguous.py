"""What Transformers' own caches would hold in the place of a paged one.

Their own code says so: they are filled with tensors of the meta device, which have a shape and take no memory.
"""

from typing import Any

import torch
from transformers import Cache, DynamicCache, StaticCache

from hf_paged.pages.pool import PagePool
from hf_paged.tools.lab.memory import kv_bytes


def padded_bytes(pool: PagePool, num_rows: int, num_columns: int) -> int:
    """Bytes of a `DynamicCache`: every row is as wide as the widest, and shares nothing.

    The pool says what a token is in each layer; layers that have seen no key yet count as nothing.
    """
    return _filled_bytes(DynamicCache(config=pool.config), pool, num_rows, num_columns)


def static_bytes(pool: PagePool, num_rows: int, max_length: int) -> int:
    """Bytes of a `StaticCache`, which has room for `max_length` columns from the first token on."""
    return _filled_bytes(StaticCache(config=pool.config, max_cache_len=max_length), pool, num_rows, 1)


def _filled_bytes(cache: Cache, pool: PagePool, num_rows: int, num_columns: int) -> int:
    if num_rows == 0 or num_columns == 0:
        return 0
    for index in pool.group_of_layer:
        storage = pool.storage(index)
        if storage is None:
            continue
        keys, values = (
            torch.empty((num_rows, num_heads, num_columns, head_dim), dtype=storage.dtype, device="meta")
            for num_heads, head_dim in (storage.key_shape, storage.value_shape)
        )
        layer: Any = cache.layers[index]
        layer.update(keys, values)
    return kv_bytes(cache)
