"""Plain stand-ins for what the tests compare with: Python lists instead of pages."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig

from hf_paged import PagedCache, PagePool
from hf_paged.batch.steps.step import View
from hf_paged.pages.block_table import BlockTable

NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM = 2, 2, 8
EDGES = (1, 15, 16, 17, 33)
"""Lengths on both sides of the edges of a 16-token page."""

Layers = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, `(num_rows, num_kv_heads, num_tokens, head_dim)`."""


def tiny_config(**changes) -> LlamaConfig:
    """A Llama of two layers that holds `NUM_KV_HEADS` heads of size `HEAD_DIM`."""
    sizes = {
        "num_hidden_layers": NUM_LAYERS,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": NUM_KV_HEADS,
        "vocab_size": 64,
    }
    return LlamaConfig(**(sizes | changes))


class ReferenceCache:
    """Each row is a list of columns; a column is a list of (key, value) per layer, or None for padding.

    With `windows`, one for each layer or None, it keeps account of the columns that no query sees any more.
    """

    def __init__(self, windows: Sequence[int | None] = (None,) * NUM_LAYERS) -> None:
        self.rows: list[list[list[tuple[Tensor, Tensor]] | None]] = []
        self.windows = windows
        self.released: list[bool] = []
        self.records_past = False
        self.num_dropped = [0] * len(windows)

    @property
    def num_columns(self) -> int:
        return len(self.rows[0]) if self.rows else 0

    @property
    def lengths(self) -> list[int]:
        return [sum(column is not None for column in row) for row in self.rows]

    @property
    def mask(self) -> list[list[int]]:
        return [[int(column is not None) for column in row] for row in self.rows]

    def first_column(self, layer: int) -> int:
        window = self.windows[layer] if layer < len(self.windows) else None
        return 0 if window is None else max(0, self.num_columns + 1 - window)

    def tidy(self) -> None:
        self.num_dropped = [max(self.num_dropped[layer], self.first_column(layer)) for layer in range(NUM_LAYERS)]

    def may_crop(self, num_removed: int) -> bool:
        """Whether what is left has all that its next query sees."""
        if num_removed == self.num_columns:
            return True
        if not self.records_past:
            self.tidy()
        for layer, window in enumerate(self.windows):
            if window is not None:
                first = max(0, self.num_columns - num_removed + 1 - window)
                if any(column for row in self.rows for column in row[first : self.num_dropped[layer]]):
                    return False
        return True

    def release(self, rows: Sequence[int]) -> None:
        for row in rows:
            self.rows[row] = [None] * self.num_columns
            self.released[row] = True

    def append(self, layers: Layers, mask: Sequence[Sequence[int]] | None = None) -> None:
        num_rows, _, num_new, _ = layers[0][0].shape
        if self.num_columns == 0:
            self.rows = [[] for _ in range(num_rows)]
            self.released = [False] * num_rows
        elif len(self.rows) == 1:
            self.repeat(num_rows)
        if not self.records_past:
            self.tidy()
        for row in range(num_rows):
            for new in range(num_new):
                is_token = (mask is None or mask[row][new]) and not self.released[row]
                token = [(keys[row, :, new], values[row, :, new]) for keys, values in layers]
                self.rows[row].append(token if is_token else None)

    def crop(self, num_removed: int) -> None:
        self.rows = [row[: len(row) - num_removed] for row in self.rows]
        if self.num_columns == 0:
            self.reset()
        self.num_dropped = [min(count, self.num_columns) for count in self.num_dropped]
        self.tidy()

    def select(self, indices: Sequence[int]) -> None:
        self.rows = [list(self.rows[index]) for index in indices]
        self.released = [self.released[index] for index in indices]

    def repeat(self, repeats: int) -> None:
        self.select([row for row in range(len(self.rows)) for _ in range(repeats)])

    def reset(self) -> None:
        self.rows = []
        self.released = []
        self.num_dropped = [0] * len(self.windows)

    def fork(self) -> "ReferenceCache":
        fork = ReferenceCache(self.windows)
        fork.rows = [list(row) for row in self.rows]
        fork.released = list(self.released)
        fork.records_past = self.records_past
        fork.num_dropped = list(self.num_dropped)
        return fork

    def dense(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values `(num_rows, num_kv_heads, num_columns, head_dim)` in a window, 0 where there is padding."""
        first = self.first_column(layer)
        padding = torch.zeros(NUM_KV_HEADS, HEAD_DIM)
        keys, values = (
            torch.stack(
                [
                    torch.stack([padding if column is None else column[layer][which] for column in row[first:]], dim=1)
                    for row in self.rows
                ]
            )
            for which in (0, 1)
        )
        return keys, values


def random_layers(num_rows: int, num_new: int, generator: torch.Generator, num_layers: int = NUM_LAYERS) -> Layers:
    """Keys and values of every layer, all different."""
    shape = (num_rows, NUM_KV_HEADS, num_new, HEAD_DIM)
    return [
        (torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)) for _ in range(num_layers)
    ]


def forward(cache, layers: Layers, mask: Sequence[Sequence[int]] | None = None) -> list[tuple[Tensor, Tensor]]:
    """Do to the cache what a model's forward pass does, and return what each layer's attention is handed.

    `mask` is the 2-D attention mask over all columns, as `generate()` gives it.
    """
    num_rows, _, num_new, _ = layers[0][0].shape
    kv_length, _ = cache.get_mask_sizes(num_new, 0)
    if mask is not None:
        step = kv_length.sequences.reserve(num_rows, num_new, torch.tensor(mask))  # as the mask function does
        step.view = View.DENSE  # to be compared with
    return [cache.update(keys, values, layer) for layer, (keys, values) in enumerate(layers)]


def filled(
    cache: PagedCache, generator: torch.Generator, num_rows: int, num_tokens: int, padding: Sequence[int] | None = None
) -> ReferenceCache:
    """Put tokens into an empty cache, the first `padding[row]` columns of each row being padding."""
    reference = ReferenceCache()
    layers = random_layers(num_rows, num_tokens, generator, len(cache))
    mask = None if padding is None else [[int(column >= count) for column in range(num_tokens)] for count in padding]
    forward(cache, layers, mask)
    reference.append(layers, mask)
    return reference


def assert_same(cache: PagedCache, reference: ReferenceCache) -> None:
    """Compare everything that a cache says about its content, bit for bit."""
    assert cache.get_seq_length() == reference.num_columns
    if reference.num_columns == 0:
        assert all(cache.gather(layer) == (None, None) for layer in range(len(cache)))
        return
    assert cache.batch_size == len(reference.rows)
    assert cache.lengths == reference.lengths
    for layer in range(len(cache)):
        for found, expected in zip(cache.gather(layer), reference.dense(layer), strict=True):
            assert torch.equal(found, expected)


def table_of(cache: PagedCache, group: int = 0) -> BlockTable:
    """The block tables of a cache for one group of layers, which hold nothing while the cache is swapped out."""
    return cache._sequences.rows._tables[group]


def count_holders(*tables) -> dict[int, int]:
    """How many rows of these tables hold each page."""
    holders: dict[int, int] = {}
    for table in tables:
        for row in range(table.num_rows):
            for page in table.row_pages(row):
                holders[page] = holders.get(page, 0) + 1
    return holders


def open_pool(num_pages: int | None = None, watermark: int = 0) -> PagePool:
    """A pool of 16-token pages whose layers are ready for `append_ids`."""
    pool = PagePool(tiny_config(), num_pages, page_size=16, watermark=watermark)
    for layer in range(NUM_LAYERS):
        pool.open_storage(layer, torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
    return pool


def write_ids(table: BlockTable, row: int, first: int, ids: Sequence[int]) -> None:
    """Write numbers into the slots of a row from position `first` on, marked with their layer."""
    for layer in range(NUM_LAYERS):
        keys = torch.tensor([[[number, layer] for number in ids]], dtype=torch.float32)
        table.group.storage(layer).write(keys, -keys, _slots(table, row, first, len(ids)))


def append_ids(table: BlockTable, new: Sequence[Sequence[int]]) -> None:
    """Append numbers to each row as a forward pass appends tokens."""
    counts = np.array([len(ids) for ids in new], dtype=np.int64)
    starts = table.lengths.tolist()
    table.reserve(counts)
    for row, ids in enumerate(new):
        if ids:
            write_ids(table, row, starts[row], ids)
    table.commit(counts)


def read_ids(table: BlockTable) -> list[list[int]]:
    """Read back what `append_ids` wrote; every layer must say the same."""
    rows = []
    for row in range(table.num_rows):
        length = int(table.lengths[row])
        by_layer = []
        for layer in range(NUM_LAYERS):
            keys, values = table.group.storage(layer).gather(_slots(table, row, 0, length))
            assert torch.equal(values, -keys)
            assert (keys[0, :, 1] == layer).all()
            by_layer.append(keys[0, :, 0].int().tolist())
        assert all(ids == by_layer[0] for ids in by_layer)
        rows.append(by_layer[0])
    return rows


def _slots(table: BlockTable, row: int, first: int, count: int) -> Tensor:
    pages, page_size = table.row_pages(row), table.group.page_size
    positions = range(first, first + count)
    return torch.tensor([pages[at // page_size] * page_size + at % page_size for at in positions], dtype=torch.int64)


def numbered_table(pool, *lengths):
    """A table whose row `i` holds the numbers from `1000 * i` on."""
    table = BlockTable(pool.groups[0])
    table.open_rows(len(lengths))
    append_ids(table, rows_of(*lengths))
    return table


def rows_of(*lengths):
    return [list(range(1000 * row, 1000 * row + length)) for row, length in enumerate(lengths)]
