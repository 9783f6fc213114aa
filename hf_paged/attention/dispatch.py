"""Which backend attends to pages, and what it is told."""

import enum

import torch
from torch import Tensor

from hf_paged._torch.inductor import can_compile
from hf_paged._torch.surroundings import can_launch
from hf_paged._torch.tricks import Trick
from hf_paged._transformers import expands_latents, has_latents
from hf_paged.attention.backends import flex
from hf_paged.attention.backends.base import Attention, AttentionParams
from hf_paged.attention.backends.latents import Sizes, asking_queries, attend_to_latents, queries_of_a_row, way_of
from hf_paged.attention.backends.split_kv import cpu, gpu
from hf_paged.attention.backends.varlen_sdpa import varlen_attention, varlen_rows_of
from hf_paged.attention.metadata import AttentionMetadata
from hf_paged.batch.steps.step import KVRanges
from hf_paged.pages.block_table import BlockTable
from hf_paged.pages.pool import PagePool
from hf_paged.pages.storage import LayerStorage

SPLIT_KV_CPU = Trick(
    "split_kv_cpu",
    "single tokens are attended to piece by piece of their rows, shared out among the threads of a CPU",
    "FlexAttention attends to them, one thread for each key/value head of a row",
    device_type="cpu",
)

SPLIT_KV_GPU = Trick(
    "split_kv_gpu",
    "few tokens of each row are attended to in equal pieces of the rows, one for each program of a GPU",
    "FlexAttention attends to them, whose programs wait for the longest row",
    device_type="cuda",
)

VARLEN_SDPA = Trick(
    "varlen_sdpa",
    "several queries of a row are SDPA's on a CPU, row by row, packed or padded",
    "FlexAttention attends to them, for which a kernel is compiled",
    device_type="cpu",
)


class Backend(enum.Enum):
    """Ways to attend to pages; where none of them reads pages, SDPA is handed a copy."""

    FLEX = "FlexAttention over block lists"
    SPLIT_KV_CPU = "single queries over pieces of pages, shared out among the threads of a CPU"
    SPLIT_KV_GPU = "few queries over equal pieces of rows, shared out among the programs of a GPU"
    VARLEN_SDPA = "SDPA over one row after another, copied out of the pages"


def reads_pages(pool: PagePool, num_new: int) -> bool:
    """Whether a pass over `num_new` new columns reads pages in place; else SDPA is handed a copy, layer by layer."""
    if has_latents(pool.config):
        # Else the model would make keys and values of everything in the pool, not of its rows alone.
        return expands_latents(pool.config)
    storage = pool.any_storage()
    if not can_compile(None if storage is None else storage.device):
        return False
    if storage is None:
        return True
    # Where tiles must be small, many queries are SDPA's.
    return flex.takes(storage.dtype) and (num_new == 1 or not flex.repacks_storage(storage.dtype, storage.device))


def choose_backend(query: Tensor, key: Tensor, ranges: KVRanges | None, has_bias: bool = False) -> Backend:
    """Say what attends, from queries and keys, what they see (None: token by token), and whether a bias is added.

    On a CPU single queries, and several of a row, have ways of their own, which are faster there. On a GPU a packed
    chunk has many rows, each of which would be several launches; few queries for each row are read for in equal
    pieces.
    """
    is_on_cpu = query.device.type == "cpu"
    if ranges is None or has_bias or not (is_on_cpu or query.device.type == "cuda"):
        return Backend.FLEX
    if is_on_cpu and ranges.rows is None and query.shape[2] == 1:
        return Backend.SPLIT_KV_CPU if SPLIT_KV_CPU.is_on else Backend.FLEX
    if is_on_cpu:
        return Backend.VARLEN_SDPA if VARLEN_SDPA.is_on else Backend.FLEX
    if ranges.rows is not None:
        return Backend.FLEX
    takes_gpu = SPLIT_KV_GPU.is_on and can_launch(query.device) and gpu.takes(query, key)
    return Backend.SPLIT_KV_GPU if takes_gpu else Backend.FLEX


def bind(
    metadata: AttentionMetadata,
    table: BlockTable,
    storage: LayerStorage | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    params: AttentionParams,
    bias: Tensor | None = None,
) -> tuple[Attention, Tensor, Tensor]:
    """Return the attention of layers with tensors of these shapes, dtype and device in this pass.

    Args:
        metadata: of the pass.
        table: the rows, in the layers' group.
        storage: of the layer that is computed first; None where its keys are something else by now.
        query: `(num_rows, num_heads, num_queries, head_dim)`.
        key: `(1, num_kv_heads, num_slots, head_dim)`.
        value: `(1, num_kv_heads, num_slots, value_head_dim)`.
        params: what the layers want.
        bias: `(num_rows, num_heads, num_queries, num_columns)`, or of one row for all, added to the scores of the
            columns that the layers see; None without.

    Returns:
        The attention, and the keys and values that it was bound to: others than were given if the storage has grown
        for the page of the sinks. Only tensors of their sizes may be given to it.

    Raises:
        ValueError: if a token is to be seen that was dropped, for a dtype that the backend does not take, or a bias
            over something else than the columns.
    """
    ranges = metadata.ranges if table.group.window is None else metadata.ranges_of(table)
    backend = choose_backend(query, key, ranges, bias is not None)
    if backend is Backend.VARLEN_SDPA and ranges is not None:
        rows = varlen_rows_of(table, ranges)
        return varlen_attention(query, value, rows, table.group.page_size, params), key, value
    if backend is Backend.SPLIT_KV_CPU and ranges is not None:
        return cpu.split_kv_attention(query, key, value, cpu.kv_splits_of(table, ranges), params), key, value
    if backend is Backend.SPLIT_KV_GPU:
        splits = metadata.device_lists(table, gpu.SplitLayout(key.shape[1], key.device), key.shape[2])
        return gpu.split_kv_attention(query, key, value, splits, table.group.page_size, params), key, value
    sink_page = table.group.sink_page() if params.has_sinks else None
    if sink_page is not None and storage is not None:
        key, value = storage.tensors  # taking the page may have let the storage grow
    layout = flex.layout_for(query, key, sink_page)
    block_lists = metadata.device_lists(table, layout, key.shape[2])
    by_token = None if bias is None else metadata.bias_by_token(bias, table)
    return flex.paged_attention(query, key, value, block_lists, table.group.page_size, params, by_token), key, value


def latent_attention(
    metadata: AttentionMetadata,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: int,
    scale: float,
) -> Tensor:
    """Attend to the latents in the pages of each row, of which the layer was handed none but the new ones.

    Args:
        metadata: of the pass.
        module: the layer, which makes keys and values of latents.
        query: `(num_rows, num_heads, num_queries, head_dim)`.
        key: `(num_rows, num_heads, num_queries, head_dim)`, what it made of the new ones.
        value: `(num_rows, num_heads, num_queries, value_head_dim)`, like `key`.
        layer: its index.
        scale: factor on the scores.

    Returns:
        `(num_rows, num_queries, num_heads, value_head_dim)`.

    Raises:
        RuntimeError: if another pass has begun meanwhile.
        ValueError: if the layer did not write this pass, or a token is to be seen that was dropped.
    """
    storage = metadata.sequences.pool.storage(layer)
    table = metadata.step.rows_of(storage, key)
    assert storage is not None  # or the layer did not write
    latents, rotary = storage.tensors
    ranges = metadata.ranges_of(table)
    seen = metadata.seen_tokens if ranges is None else ranges
    way = way_of(module, query, value, latents, rotary, queries_of_a_row(seen))
    sizes = Sizes(query.shape[1], way.numbers_per_token, query.device)
    made = (table, table.version, query.shape, sizes)
    if made not in metadata.asking:
        metadata.asking[made] = asking_queries(table, seen, sizes)
    return attend_to_latents(way, metadata.asking[made], query, latents, rotary, value.shape[3], scale)
