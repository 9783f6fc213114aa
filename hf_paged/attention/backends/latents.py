"""Attention over cached latents, some tokens of each row at a time.

Multi-head latent attention keeps two things of a token: a latent, of which one projection makes the keys and values of
all heads, and a rotary part of the keys, which all heads share. A few queries take the projection into themselves,
`q · (K c) = (K^T q) · c`, and attend to the latents, as queries of one key/value head whose keys are wider than its
values. Many queries have keys and values made of them, which then cost less than wide queries do.
"""

import functools
import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hf_paged._torch.dynamo import has_hooks
from hf_paged.batch.padding import BoolMatrix, Counts
from hf_paged.batch.steps.step import KVRanges
from hf_paged.pages.block_table import BlockTable

logger = logging.getLogger(__name__)

_MAX_SCORES = 2**22  # at once
_MAX_NUMBERS = 2**24  # of tokens at once: 64 MiB
_MAX_TOKENS = {"cpu": 2048}  # of one row: 5 MB of DeepSeek-V3, which the last cache still has when they are read
_MAX_TOKENS_ELSEWHERE = 8192
_MIN_TOKENS = 16

_PLAIN = torch.nn.Linear, torch.nn.Parameter


@dataclass(frozen=True)
class Piece:
    """Tokens of some rows, equally many of each.

    Attributes:
        rows: `(num_rows,)` int64 which of the rows that ask; None: all.
        slots: `(num_rows * num_tokens,)` int64, where the tokens are.
        empty: `(num_rows, 1, num_tokens, 1)` True where a row has no such token; None: nowhere.
        hidden: `(num_rows, 1, num_queries, num_tokens)` True where a query does not see a token; None: nowhere.
    """

    rows: Tensor | None
    slots: Tensor
    empty: Tensor | None
    hidden: Tensor | None

    def of(self, tensor: Tensor) -> Tensor:
        """Take its rows out of a tensor that begins with all rows."""
        return tensor if self.rows is None else tensor.index_select(0, self.rows)

    def read(self, held: Tensor, num_rows: int) -> Tensor:
        """Copy its tokens, `(num_rows, 1, num_tokens, size)`, out of a storage `(1, 1, num_slots, size)`."""
        num_own = num_rows if self.rows is None else len(self.rows)
        tokens = held.index_select(2, self.slots).view(num_own, 1, -1, held.shape[3])
        # What is left in a slot has no weight, but may be NaN.
        return tokens if self.empty is None else tokens.masked_fill_(self.empty, 0)


@dataclass(frozen=True)
class Asking:
    """Queries that see the same rows, and these in pieces.

    Attributes:
        queries: which of the pass.
        pieces: what they see.
    """

    queries: slice
    pieces: Sequence[Piece]


@dataclass(frozen=True)
class Sizes:
    """What pieces are cut for.

    Attributes:
        num_heads: query heads.
        numbers_per_token: that attention reads.
        device: of the storage.
    """

    num_heads: int
    numbers_per_token: int
    device: torch.device

    def tokens(self, num_rows: int, num_queries: int) -> int:
        """Tokens of each row at a time. For a query of 128 heads that reads 576 numbers of a token, 2048 on a CPU."""
        most = _MAX_TOKENS.get(self.device.type, _MAX_TOKENS_ELSEWHERE)
        by_scores = _MAX_SCORES // (num_rows * num_queries * self.num_heads)
        by_numbers = _MAX_NUMBERS // (num_rows * self.numbers_per_token)
        return max(_MIN_TOKENS, min(most, by_scores, by_numbers))


def asking_queries(table: BlockTable, seen: KVRanges | BoolMatrix, sizes: Sizes) -> list[Asking]:
    """Cut the rows of a pass into pieces.

    Args:
        table: the rows whose pages are read.
        seen: what each query sees, as ranges; or `(num_rows, num_queries, max_tokens)` token by token.
        sizes: what for.
    """
    if not isinstance(seen, KVRanges):
        every = np.broadcast_to(np.arange(1, seen.shape[2] + 1), seen.shape)
        kv_stop = np.where(seen, every, 0).max(axis=2)
        rows = np.arange(len(seen))
        return [Asking(slice(None), _pieces(table, rows, kv_stop, np.zeros_like(kv_stop), seen, sizes))]
    kv_stop = seen.kv_stop
    kv_start = np.zeros_like(kv_stop) if seen.kv_start is None else seen.kv_start
    if seen.rows is None:
        every_row = np.arange(len(kv_stop))
        return [Asking(slice(None), _pieces(table, every_row, kv_stop, kv_start, None, sizes))]
    begins = np.unique(seen.rows, return_index=True)[1].tolist()
    return [
        Asking(
            part,
            _pieces(table, seen.rows[part][:1], kv_stop[None, part], kv_start[None, part], None, sizes),
        )
        for part in map(slice, begins, [*begins[1:], len(seen.rows)])
    ]


def queries_of_a_row(seen: KVRanges | BoolMatrix) -> int:
    """The most queries that a row has."""
    if isinstance(seen, KVRanges) and seen.rows is not None:
        return int(np.bincount(seen.rows).max(initial=0))
    return int((seen.kv_stop if isinstance(seen, KVRanges) else seen).shape[1])


def _pieces(
    table: BlockTable,
    rows: Counts,
    kv_stop: Counts,
    kv_start: Counts,
    visible: BoolMatrix | None,
    sizes: Sizes,
) -> list[Piece]:
    page_size, block_table = table.group.page_size, table.block_table
    sees_any = kv_start < kv_stop
    first = np.where(sees_any, kv_start, np.iinfo(np.int64).max).min(axis=1)
    stop = np.where(sees_any, kv_stop, 0).max(axis=1)
    size = sizes.tokens(*kv_stop.shape)

    def on_device(array: Any) -> Tensor:
        return torch.from_numpy(array).to(sizes.device, non_blocking=True)

    pieces = []
    for begin in range(int(min(first.min(), stop.max())), int(stop.max()), size):
        tokens = np.arange(begin, min(begin + size, int(stop.max())))
        chosen = np.flatnonzero((stop > begin) & (first <= tokens[-1]))
        if not len(chosen):
            continue
        is_empty = (tokens >= stop[chosen, None]) | (tokens < first[chosen, None])
        places = np.minimum(tokens // page_size, block_table.shape[1] - 1)
        pages = block_table[rows[chosen, None], places].astype(np.int64)
        slots = np.where(is_empty, 0, pages * page_size + tokens % page_size)
        if visible is None:
            is_hidden = (tokens >= kv_stop[chosen, :, None]) | (tokens < kv_start[chosen, :, None])
        else:
            is_hidden = ~visible[chosen][:, :, tokens]
        pieces.append(
            Piece(
                on_device(chosen) if len(chosen) < len(rows) else None,
                on_device(slots.ravel()),
                on_device(is_empty[:, None, :, None]) if is_empty.any() else None,
                on_device(is_hidden[:, None]) if is_hidden.any() else None,
            )
        )
    return pieces


class Way(Protocol):
    """How queries attend to latents."""

    sum_dim: int
    """Size of the values that `tokens` returns."""
    numbers_per_token: int
    """Keys and values that it returns for each token."""

    def queries(self, query: Tensor) -> tuple[Tensor, ...]:
        """Split queries `(num_rows, num_heads, num_queries, head_dim)` into what is multiplied with `tokens`."""

    def tokens(self, latents: Tensor, rotary: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return the parts of keys, and values, each `(num_rows, num_kv_heads, num_tokens, size)`."""

    def attended(self, output: Tensor, shape: torch.Size) -> Tensor:
        """Turn sums of values into `(num_rows, num_queries, num_heads, value_head_dim)`; `shape` is the queries'."""


class Absorbed:
    """Queries that have the projection of the keys in themselves, and that of the values behind them.

    Args:
        weight: `(num_heads, nope_dim + value_dim, rank)`, the projection of a latent.
        nope_dim: size of the keys without their rotary part.
        rotary_dim: size of that.
    """

    def __init__(self, weight: Tensor, nope_dim: int, rotary_dim: int) -> None:
        self.sum_dim = weight.shape[2]
        self.numbers_per_token = weight.shape[2] + rotary_dim
        self._nope_dim = nope_dim
        self._to_keys, self._to_values = weight[:, :nope_dim], weight[:, nope_dim:]

    def queries(self, query: Tensor) -> tuple[Tensor, ...]:
        """As `Way.queries`: `(num_rows, 1, num_heads * num_queries, size)` for latents and for rotary parts."""
        num_rows, num_heads, num_queries, _ = query.shape
        by_head = query[..., : self._nope_dim].transpose(0, 1).flatten(1, 2)
        absorbed = (by_head @ self._to_keys).view(num_heads, num_rows, num_queries, -1).transpose(0, 1)
        return absorbed.flatten(1, 2)[:, None], query[..., self._nope_dim :].flatten(1, 2)[:, None]

    def tokens(self, latents: Tensor, rotary: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """As `Way.tokens`: those of one head."""
        return (latents, rotary), latents

    def attended(self, output: Tensor, shape: torch.Size) -> Tensor:
        """As `Way.attended`."""
        num_rows, num_heads, num_queries, _ = shape
        by_head = output.view(num_rows, num_heads, num_queries, -1).transpose(0, 1).flatten(1, 2)
        values = by_head @ self._to_values.mT
        return values.view(num_heads, num_rows, num_queries, -1).permute(1, 2, 0, 3)


class Expanded:
    """Keys and values made of the latents by the model's own code.

    Args:
        module: the attention layer.
        num_heads: of it.
        head_dims: size of its keys and of its values.
    """

    def __init__(self, module: Any, num_heads: int, head_dims: tuple[int, int]) -> None:
        self.sum_dim = head_dims[1]
        self.numbers_per_token = num_heads * sum(head_dims)
        self._module = module

    def queries(self, query: Tensor) -> tuple[Tensor, ...]:
        """As `Way.queries`: as they are."""
        return (query,)

    def tokens(self, latents: Tensor, rotary: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """As `Way.tokens`: those of all heads."""
        keys, values = self._module.expand_kv(latents, rotary)
        return (keys,), values

    def attended(self, output: Tensor, shape: torch.Size) -> Tensor:
        """As `Way.attended`."""
        return output.transpose(1, 2)


def way_of(module: Any, query: Tensor, value: Tensor, latents: Tensor, rotary: Tensor, num_queries: int) -> Way:
    """Choose how a layer attends to latents: in the way that takes fewer multiplications for each of them.

    Args:
        module: the attention layer.
        query: `(num_rows, num_heads, num_queries, head_dim)`.
        value: `(num_rows, num_heads, num_queries, value_head_dim)`, made by the layer of latents that are new.
        latents: `(1, 1, num_slots, rank)`, the storage.
        rotary: `(1, 1, num_slots, rotary_dim)`, the storage.
        num_queries: that a row has, of those in `query`, which may be packed.
    """
    num_heads, _, key_dim = query.shape[1:]
    value_dim, rank, rotary_dim = value.shape[3], latents.shape[3], rotary.shape[3]
    nope_dim = key_dim - rotary_dim
    absorbed = num_queries * (2 * rank + rotary_dim)
    expanded = num_queries * (key_dim + value_dim) + rank * (nope_dim + value_dim)
    if absorbed < expanded:
        weight = _projection(module, query)
        if weight is not None and weight.shape == (num_heads * (nope_dim + value_dim), rank):
            by_head = weight.view(num_heads, -1, rank)
            if _is_all_there_is(module, by_head, nope_dim, rotary_dim):
                return Absorbed(by_head, nope_dim, rotary_dim)
        _tell_once(type(module).__name__)
    return Expanded(module, num_heads, (key_dim, value_dim))


def _projection(module: Any, query: Tensor) -> Tensor | None:
    """The weight by which a layer makes keys and values of latents; None if it can't be multiplied with as it is."""
    linear: Any = getattr(module, "kv_b_proj", None)
    if type(linear) not in _PLAIN or linear.bias is not None or ("forward" in vars(linear) and not _is_moved(linear)):
        return None  # quantized, adapted, offloaded
    if has_hooks(linear) or type(linear.weight) not in _PLAIN:
        return None
    weight: Tensor = linear.weight.detach()
    # Their dtypes differ under `torch.autocast`.
    return weight.to(query.dtype) if weight.device == query.device and weight.is_floating_point() else None


def _is_moved(linear: Any) -> bool:
    """Whether accelerate has replaced the forward of a layer by one that moves inputs, and leaves the weights."""
    hook = getattr(linear, "_hf_hook", None)
    is_known = (type(hook).__module__, type(hook).__name__) == ("accelerate.hooks", "AlignDevicesHook")
    return is_known and not hook.offload  # type: ignore[union-attr]


_MODULES: "weakref.WeakKeyDictionary[torch.nn.Module, tuple[Any, bool]]" = weakref.WeakKeyDictionary()


def _is_all_there_is(module: Any, weight: Tensor, nope_dim: int, rotary_dim: int) -> bool:
    """Whether a layer makes keys and values by this projection alone, as two latents show once for a method."""
    method = getattr(module.expand_kv, "__func__", module.expand_kv)
    if module not in _MODULES or _MODULES[module][0] is not method:
        rank = weight.shape[2]
        latents = torch.linspace(-1, 1, 2 * rank, device=weight.device).to(weight.dtype).view(1, 1, 2, rank)
        rotary = torch.linspace(-1, 1, 2 * rotary_dim, device=weight.device).to(weight.dtype).view(1, 1, 2, rotary_dim)
        keys, values = module.expand_kv(latents, rotary)
        both = latents @ weight.mT
        made = torch.cat([both[..., :nope_dim], rotary.expand(-1, len(weight), -1, -1)], -1), both[..., nope_dim:]
        bound = 1e-2 * float(both.abs().amax())
        is_all = all(
            found.shape == expected.shape and torch.allclose(found, expected, rtol=0.0, atol=bound)
            for found, expected in zip((keys, values), made, strict=True)
        )
        _MODULES[module] = method, is_all
    return _MODULES[module][1]


@functools.cache
def _tell_once(name: str) -> None:
    logger.warning(
        "%s makes keys and values of all cached latents in each step, which takes as long as with DynamicCache: "
        "its kv_b_proj is no plain linear layer, but quantized, adapted, offloaded or with hooks.",
        name,
    )


def attend_to_latents(
    way: Way, asking: Sequence[Asking], query: Tensor, latents: Tensor, rotary: Tensor, value_dim: int, scale: float
) -> Tensor:
    """Attend in one of the ways.

    Args:
        way: as `way_of` says.
        asking: what the queries see. Queries that it leaves out give 0.
        query: `(num_rows, num_heads, num_queries, head_dim)`.
        latents: `(1, 1, num_slots, rank)`, the storage of a layer.
        rotary: `(1, 1, num_slots, rotary_dim)`, like it.
        value_dim: size of the values that the layer makes.
        scale: factor on the scores.

    Returns:
        `(num_rows, num_queries, num_heads, value_head_dim)`. Queries that see nothing give 0.

    Source:
        DeepSeek-AI, 2024 (DeepSeek-V2), appendix C. The sums over pieces: Rabe and Staats, 2021.
    """
    output = query.new_zeros(len(query), query.shape[2], query.shape[1], value_dim)
    for one in asking:
        own = query[:, :, one.queries]
        attended = _sum_of_pieces(way, one.pieces, own, latents, rotary, scale).to(query.dtype)
        output[:, one.queries] = way.attended(attended, own.shape)
    return output


def _sum_of_pieces(
    way: Way, pieces: Sequence[Piece], query: Tensor, latents: Tensor, rotary: Tensor, scale: float
) -> Tensor:
    exact = torch.promote_types(query.dtype, torch.float32)
    num_rows, _, num_queries, _ = query.shape
    asked = [part.to(exact) * scale for part in way.queries(query)]
    shape = asked[0].shape[:3]
    top = query.new_full((*shape, 1), torch.finfo(exact).min, dtype=exact)
    total = torch.zeros_like(top)
    output = query.new_zeros((*shape, way.sum_dim), dtype=exact)
    for piece in pieces:
        keys, values = way.tokens(piece.read(latents, num_rows), piece.read(rotary, num_rows))
        with torch.autocast(query.device.type, enabled=False):
            products = (piece.of(part) @ key.to(exact).mT for part, key in zip(asked, keys, strict=True))
            scores = functools.reduce(Tensor.add_, products)
            if piece.hidden is not None:
                scores.view(len(scores), -1, num_queries, scores.shape[3]).masked_fill_(piece.hidden, -torch.inf)
            old = piece.of(top)
            new = torch.maximum(old, scores.amax(-1, keepdim=True))
            weights, decay = scores.sub_(new).exp_(), (old - new).exp_()
            added = weights @ values.to(exact)
            if piece.rows is None:
                top = new
                total.mul_(decay).add_(weights.sum(-1, keepdim=True))
                output.mul_(decay).add_(added)
            else:
                top[piece.rows] = new
                total[piece.rows] = piece.of(total) * decay + weights.sum(-1, keepdim=True)
                output[piece.rows] = piece.of(output) * decay + added
    return output.div_(total.clamp_(min=torch.finfo(exact).tiny))
