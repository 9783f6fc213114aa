"""Queries attend to cached latents as they would to the keys and values that a layer makes of them."""

import numpy as np
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

from hf_paged.attention.backends import latents as backend
from hf_paged.attention.backends.latents import (
    Absorbed,
    Expanded,
    Sizes,
    asking_queries,
    attend_to_latents,
    queries_of_a_row,
    way_of,
)
from hf_paged.batch.steps.step import KVRanges
from tests.attention.test_varlen_sdpa import packed, slots_of, storage, table_of

HEADS, RANK, NOPE, ROTARY, VALUE, SCALE = 3, 24, 12, 8, 16, 0.3
LENGTHS = [200, 1, 64, 65, 130]
CPU = torch.device("cpu")


class Layer(torch.nn.Module):
    """What a layer has that makes keys and values of latents.

    Args:
        power: 1 for a projection, as it is taken for.
    """

    def __init__(self, power: int = 1) -> None:
        super().__init__()
        self.kv_b_proj = torch.nn.Linear(RANK, HEADS * (NOPE + VALUE), bias=False)
        self.power = power

    def expand_kv(self, latents: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        both = self.kv_b_proj(latents**self.power)
        both = both.view(len(latents), -1, HEADS, NOPE + VALUE).transpose(1, 2)
        return torch.cat([both[..., :NOPE], rotary.expand(-1, HEADS, -1, -1)], -1), both[..., NOPE:]


def seen_by(kind: str, table) -> tuple[KVRanges | np.ndarray, list[tuple[int, int, np.ndarray]]]:
    """What queries see, and of each of them its row, its place among those of the row, and the tokens it sees."""
    generator = np.random.default_rng(0)
    num_rows, longest = table.num_rows, 208
    tokens = np.arange(longest)
    match kind:
        case "packed":
            new = [7, 1, 3, 1, 40]
            ranges = packed(table, new, num_more=2)
            every = zip(ranges.rows, range(len(ranges.rows)), ranges.kv_stop, strict=True)
            return ranges, [(0, query, (row, np.arange(stop))) for row, query, stop in every]
        case "by token":
            visible = (generator.random((num_rows, 2, longest)) < 0.5) & (tokens < table.lengths[:, None, None])
            return visible, [
                (row, q, (row, np.flatnonzero(visible[row, q]))) for row in range(num_rows) for q in (0, 1)
            ]
    stop = np.maximum(table.lengths[:, None] - np.array([2, 1, 0]), 0)
    start = np.maximum(stop - 90, 0) if kind == "window" else None
    ranges = KVRanges(stop, start, 90 if kind == "window" else None)
    first = np.zeros_like(stop) if start is None else start
    return ranges, [
        (row, q, (row, np.arange(first[row, q], stop[row, q]))) for row in range(num_rows) for q in range(3)
    ]


@pytest.mark.parametrize("way", [Absorbed, Expanded])
@pytest.mark.parametrize("kind", ["ranges", "window", "packed", "by token"])
@torch.no_grad()
def test_pieces_put_together_are_the_attention_of_whole_rows(kind, way, monkeypatch):
    monkeypatch.setitem(backend._MAX_TOKENS, "cpu", 64)
    torch.manual_seed(0)
    table, layer = table_of(LENGTHS), Layer()
    held, rotary = storage(table, 1, RANK, torch.float32), storage(table, 1, ROTARY, torch.float32)
    seen, queries = seen_by(kind, table)
    num_rows, num_queries = 1 + max(row for row, _, _ in queries), 1 + max(query for _, query, _ in queries)
    query = torch.randn(num_rows, HEADS, num_queries + (2 if kind == "packed" else 0), NOPE + ROTARY)
    weight = layer.kv_b_proj.weight.view(HEADS, NOPE + VALUE, RANK)
    chosen = Absorbed(weight, NOPE, ROTARY) if way is Absorbed else Expanded(layer, HEADS, (NOPE + ROTARY, VALUE))
    found = attend_to_latents(
        chosen,
        asking_queries(table, seen, Sizes(HEADS, chosen.numbers_per_token, CPU)),
        query,
        held,
        rotary,
        VALUE,
        SCALE,
    )
    expected = torch.zeros_like(found)
    for row, place, (table_row, tokens) in queries:
        slots = np.array(slots_of(table, table_row))[tokens]
        keys, values = layer.expand_kv(held[:, :, slots], rotary[:, :, slots])
        if len(slots):
            scores = (query[row, :, place, None] * keys[0]).sum(-1) * SCALE
            expected[row, place] = (scores.softmax(-1)[..., None] * values[0]).sum(1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_only_a_projection_alone_is_absorbed_and_by_few_queries():
    query, value = torch.randn(1, HEADS, 500, NOPE + ROTARY), torch.randn(1, HEADS, 500, VALUE)
    held = torch.zeros(1, 1, 16, RANK), torch.zeros(1, 1, 16, ROTARY)
    plain, hooked, adapted, moved = (Layer() for _ in range(4))
    hooked.kv_b_proj.register_forward_hook(lambda module, args, output: 2 * output)
    adapted.kv_b_proj = torch.nn.Sequential(adapted.kv_b_proj)
    add_hook_to_module(moved.kv_b_proj, AlignDevicesHook("cpu"))

    def chosen(layer: Layer, num_queries: int = 1) -> type:
        return type(way_of(layer, query, value, *held, num_queries))

    assert [chosen(layer) for layer in (plain, moved)] == [Absorbed] * 2
    assert [chosen(layer) for layer in (Layer(power=2), hooked, adapted)] == [Expanded] * 3
    assert chosen(plain, num_queries=500) is Expanded
    with register_module_forward_hook(lambda module, args, output: None):
        assert chosen(plain) is Expanded
    plain.expand_kv = lambda latents, rotary: (Layer.expand_kv(plain, latents, rotary)[0], 2 * latents)
    assert chosen(plain) is Expanded


def test_queries_are_counted_by_row():
    packed_ranges = KVRanges(np.array([5, 6, 7, 3]), rows=np.array([0, 0, 0, 1]), num_queries=6)
    assert queries_of_a_row(packed_ranges) == 3
    assert queries_of_a_row(KVRanges(np.array([[5, 6], [3, 4]]))) == 2
    assert queries_of_a_row(np.ones((2, 4, 16), dtype=bool)) == 4


def test_pieces_are_small_whatever_they_are_cut_for():
    """128 heads of DeepSeek-V3, absorbed and expanded, on a CPU and elsewhere."""
    absorbed, expanded = 512 + 64, 128 * (192 + 128)
    assert Sizes(128, absorbed, CPU).tokens(1, 1) == 2048
    assert Sizes(128, absorbed, torch.device("cuda")).tokens(1, 1) == 8192
    assert Sizes(128, absorbed, torch.device("cuda")).tokens(64, 1) == 455
    assert Sizes(128, expanded, CPU).tokens(4, 1) == 102
    assert Sizes(128, expanded, CPU).tokens(1, 512) == 64
