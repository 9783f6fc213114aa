"""A prompt that is prefilled packed leaves what a padded prefill leaves, and `generate()` goes on from there."""

import copy
import functools
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from hf_paged import OutOfPagesError, PagedCache, PagedEncoderDecoderCache, PagePool
from hf_paged.attention.dispatch import Backend
from hf_paged.attention.interface import paged_flex_attention
from hf_paged.batch.prompt.packed_prompt import PackedPrompt
from hf_paged.cache.layer import layers_over
from hf_paged.cache.prompt.prefill import _say
from hf_paged.errors import NotPackable
from tests.families import FAMILIES, Family, Outcome, new_cache
from tests.models import generate, left_padded, random_ids, run, tiny_llama, tiny_model

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
NUM_COLUMNS = 50
LENGTHS = [50, 3, 20, 41]
WINDOW = 24

PADDED = {
    "Llama 4": "asks for another mask than a causal one",
    "Qwen3-Next": "layer 0 is a 'linear_attention' layer, which keeps a state",
    "Falcon-H1": "layer 0 is a 'hybrid' layer, which keeps a state",
    "LFM2": "layer 0 is a 'conv' layer, which keeps a state",
}
"""Families whose prompts are computed padded, and what the log says; all others are packed."""

REFUSED = {
    "BLOOM": "computes attention by itself",
    "GPT-NeoX Japanese": "computes attention by itself",
    "BART": "has an encoder",
    "Whisper": "has an encoder",
    "T5": "has an encoder",
    "UMT5": "has an encoder",
}
"""Families that `PagedCache` takes and `paged_flex` or `prefill` doesn't, and what the error says."""


@functools.cache
def llama() -> PreTrainedModel:
    return tiny_llama()


@functools.cache
def mistral() -> PreTrainedModel:
    return tiny_model(MistralForCausalLM, MistralConfig, sliding_window=WINDOW)


MODELS = pytest.mark.parametrize("load", [llama, mistral])


@pytest.fixture(params=[Backend.VARLEN_SDPA, Backend.FLEX], ids=["varlen", "block_lists"])
def way(request, monkeypatch):
    """How packed queries attend: as on a CPU, and as on a GPU."""
    if request.param is Backend.FLEX:
        monkeypatch.setattr("hf_paged.attention.dispatch.choose_backend", lambda *_: Backend.FLEX)


def paged(model: PreTrainedModel, **arguments) -> PagedCache:
    model.set_attn_implementation("paged_flex")
    return PagedCache.from_model(model, **{"page_size": 16, **arguments})


def padding(side: str, lengths=tuple(LENGTHS), num_columns: int = NUM_COLUMNS) -> Tensor:
    mask = left_padded(num_columns, list(lengths))
    if side == "right":
        return mask.flip(1)
    if side == "scattered":
        generator = torch.Generator().manual_seed(0)
        mask = torch.stack([row[torch.randperm(num_columns, generator=generator)] for row in mask])
    return mask


def pages(cache: PagedCache) -> list[list[list[int]]]:
    return [[table.row_pages(row) for row in range(table.num_rows)] for table in cache._sequences.rows.tables]


def num_held(cache: PagedCache) -> list[int]:
    """Distinct pages in each group."""
    return [len({page for row in rows for page in row}) for rows in pages(cache)]


def assert_same_content(cache: PagedCache, other: PagedCache, **tolerance: float) -> None:
    assert cache.get_seq_length() == other.get_seq_length()
    assert cache.lengths == other.lengths
    for record, expected in zip(
        vars(cache._sequences.rows.columns).values(), vars(other._sequences.rows.columns).values(), strict=True
    ):
        assert np.array_equal(record, expected)
    other.stats()  # releases what has left a window
    for table, expected in zip(cache._sequences.rows.tables, other._sequences.rows.tables, strict=True):
        assert np.array_equal(table.starts, expected.starts)
    assert num_held(cache) == num_held(other)
    if not any(cache.lengths):
        return  # without a token there is no storage yet
    for layer in cache.pool.group_of_layer:
        torch.testing.assert_close(cache.gather(layer), other.gather(layer), **(tolerance or CLOSE))


def continued(model, cache, ids: Tensor, mask: Tensor, begin: int) -> Tensor:
    """Logits of the columns from `begin` on, one at a time."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = []
    with torch.no_grad():
        for column in range(begin, ids.shape[1]):
            here = slice(column, column + 1)
            output = model(
                ids[:, here],
                past_key_values=cache,
                attention_mask=mask[:, : column + 1],
                position_ids=positions[:, here],
            )
            logits.append(output.logits)
    return torch.cat(logits, dim=1)


@functools.cache
def padded_prefill(load, side: str) -> tuple[PagedCache, Tensor]:
    """The cache of a padded prefill, and logits of the columns after it with `DynamicCache`."""
    model, mask = load(), padding(side)
    ids = random_ids(len(mask), NUM_COLUMNS + 3)
    longer = torch.cat([mask, torch.ones(len(mask), 3, dtype=torch.long)], dim=1)
    model.set_attn_implementation("sdpa")
    plain = DynamicCache(config=model.config)
    run(model, plain, ids[:, : NUM_COLUMNS - 1], [NUM_COLUMNS - 1], mask[:, :-1])
    logits = continued(model, plain, ids, longer, NUM_COLUMNS - 1)
    cache = paged(model)
    run(model, cache, ids[:, : NUM_COLUMNS - 1], [NUM_COLUMNS - 1], mask[:, :-1])
    return cache, logits


@pytest.mark.parametrize("max_tokens", [7, 512])
@pytest.mark.parametrize("side", ["left", "right", "scattered"])
@MODELS
def test_pages_and_logits_are_those_of_a_padded_prefill(load, side, max_tokens, way):
    model, mask = load(), padding(side)
    ids = random_ids(len(mask), NUM_COLUMNS + 3)
    expected, logits = padded_prefill(load, side)
    cache = paged(model)
    cache.prefill(model, ids[:, :NUM_COLUMNS], mask, max_tokens=max_tokens)
    cache.pool.check_integrity()
    assert_same_content(cache, expected)
    longer = torch.cat([mask, torch.ones(len(mask), 3, dtype=torch.long)], dim=1)
    actual = continued(model, cache, ids, longer, NUM_COLUMNS - 1)
    real = longer[:, NUM_COLUMNS - 1 :].bool()
    torch.testing.assert_close(actual[real], logits[real], **CLOSE)


@MODELS
def test_chunks_of_one_token_give_the_tokens_of_dynamic_cache(load):
    model, ids, mask = load(), random_ids(4, NUM_COLUMNS), padding("left")
    expected = generate(model, "sdpa", DynamicCache(config=model.config), ids, attention_mask=mask)
    cache = paged(model)
    assert cache.prefill(model, ids, mask, max_tokens=1) is None
    assert cache.lengths == [49, 2, 19, 40]
    assert torch.equal(generate(model, "paged_flex", cache, ids, attention_mask=mask), expected)
    cache.pool.check_integrity()


@pytest.mark.parametrize(
    "family",
    [f for f in FAMILIES if f.paged_flex == Outcome.SAME and f.name not in REFUSED],
    ids=lambda family: family.name,
)
def test_every_family_is_packed_or_padded_and_generates_the_tokens_of_dynamic_cache(family: Family, caplog):
    _say.cache_clear()
    ids, mask = random_ids(4, 60), left_padded(60, [60, 41, 52, 60])
    ids[3] = ids[0]
    oracle, model = family.load(family.oracle), family.load("paged_flex")
    expected = generate(oracle, family.oracle, new_cache(oracle), ids, attention_mask=mask, max_new_tokens=10)
    cache, padded = paged(model), paged(model)
    cache.prefill(model, ids, mask, max_tokens=50)
    said = [record.message for record in caplog.records if record.name == "hf_paged.cache.prompt.prefill"]
    assert len(said) == (family.name in PADDED)
    assert all(PADDED[family.name] in line for line in said)
    run(model, padded, ids[:, :59], [59], mask[:, :59])
    assert_same_content(cache, padded)
    actual = generate(model, "paged_flex", cache, ids, attention_mask=mask, max_new_tokens=10)
    assert torch.equal(actual, expected)
    cache.pool.check_integrity()


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name in REFUSED], ids=lambda family: family.name)
def test_every_other_family_raises_and_nothing_has_changed(family: Family):
    model = family.load("paged_flex")
    # Not from_model, which looks whether the model can be set to it, and raises for some.
    kind = PagedEncoderDecoderCache if model.config.is_encoder_decoder else PagedCache
    cache = kind(model.config, page_size=16)
    with pytest.raises(ValueError, match=REFUSED[family.name]):
        cache.prefill(model, random_ids(2, 18))
    assert cache.pool.stats().num_active_pages == 0
    assert cache.get_seq_length() == 0
    cache.pool.check_integrity()


@pytest.mark.parametrize("records_past", [False, True])
@MODELS
def test_a_chat_goes_on_turn_by_turn(load, records_past):
    model = load()

    def talk(cache, attention):
        ids, mask = random_ids(3, 20), left_padded(20, [20, 1, 11])
        for turn in range(3):
            if attention == "paged_flex":
                cache.prefill(model, ids, mask, max_tokens=5)
                cache.pool.check_integrity()
            ids = generate(model, attention, cache, ids, attention_mask=mask, max_new_tokens=6)
            said = left_padded(15, [9, 15, 0 if turn == 1 else 4])
            new = torch.ones(3, ids.shape[1] - mask.shape[1], dtype=torch.long)
            mask = torch.cat([mask, new, said], dim=1)
            ids = torch.cat([ids, random_ids(3, 15, seed=turn + 1)], dim=1)
            mask[:, -1] = 1
        return ids

    expected = talk(DynamicCache(config=model.config), "sdpa")
    cache = paged(model)
    if records_past:
        cache.activate_past_recording()
    assert torch.equal(talk(cache, "paged_flex"), expected)
    assert not records_past or not any(table.starts.any() for table in cache._sequences.rows.tables)


@contextmanager
def watched(module: torch.nn.Module, before=None, after=None):
    """Call `before(kwargs)` and `after(kwargs)` with each pass of a module. A hook would keep prompts from packing."""
    kind = type(module)

    @functools.wraps(kind.forward)
    def forward(self, *args, **kwargs):
        if self is module and before is not None:
            before(kwargs)
        output = original(self, *args, **kwargs)
        if self is module and after is not None:
            after(kwargs)
        return output

    with pytest.MonkeyPatch.context() as patch:
        original = kind.forward
        patch.setattr(kind, "forward", forward)
        yield


@contextmanager
def shapes_of_passes(model: PreTrainedModel):
    """Note the shape of what the decoder is given in each pass."""
    shapes: list[tuple[int, ...]] = []
    with watched(model.get_decoder(), before=lambda given: shapes.append(tuple(given["input_ids"].shape))):
        yield shapes


def test_equal_rows_are_computed_once_and_held_once():
    model, mask = llama(), left_padded(40, [40, 20, 20, 40, 20])
    ids = random_ids(5, 40)
    ids[2], ids[3] = ids[1], ids[0]
    ids[2, :20] = 7  # padding may be anything
    cache, padded = paged(model), paged(model)
    with shapes_of_passes(model) as shapes:
        cache.prefill(model, ids, mask, max_tokens=30)
    assert sum(num_tokens for _, num_tokens in shapes) == 39 + 19 + 19
    clean = torch.where(mask.bool(), ids, 0)
    run(model, padded, clean[:, :39], [39], mask[:, :39])
    assert_same_content(cache, padded)
    assert pages(cache)[0][2] == pages(cache)[0][1]
    assert pages(cache)[0][3] == pages(cache)[0][0]
    expected = generate(model, "sdpa", DynamicCache(config=model.config), ids, attention_mask=mask)
    assert torch.equal(generate(model, "paged_flex", cache, ids, attention_mask=mask), expected)
    cache.pool.check_integrity()


@pytest.mark.parametrize("repeated", ["before", "after"])
@pytest.mark.parametrize("lengths", [[20, 20], [20, 9]])
def test_beams_go_on_from_a_prompt_that_is_repeated_for_them(lengths, repeated):
    model, ids, mask = llama(), random_ids(2, 20), left_padded(20, lengths)
    arguments = {"num_beams": 3, "num_return_sequences": 3, "attention_mask": mask}
    expected = generate(model, "sdpa", DynamicCache(config=model.config), ids, **arguments)
    cache = paged(model)
    if repeated == "before":
        cache.prefill(model, ids.repeat_interleave(3, dim=0), mask.repeat_interleave(3, dim=0))
    else:
        cache.prefill(model, ids, mask)
        cache.batch_repeat_interleave(3)
    assert num_held(cache) == [sum(-(-(length - 1) // 16) for length in lengths)]
    assert torch.equal(generate(model, "paged_flex", cache, ids, **arguments), expected)
    cache.pool.check_integrity()


@MODELS
def test_one_cached_row_becomes_as_many_as_the_prompts_are(load):
    model = load()
    ids = torch.cat([random_ids(1, 20).repeat(3, 1), random_ids(3, 15, seed=1)], dim=1)
    ids[2] = ids[0]
    expected = generate(model, "sdpa", DynamicCache(config=model.config), ids)
    cache = paged(model)
    run(model, cache, ids[:1, :20], [20])
    cache.prefill(model, ids, max_tokens=8)
    assert cache.lengths == [34] * 3
    cache.pool.check_integrity()
    assert torch.equal(generate(model, "paged_flex", cache, ids), expected)


@pytest.mark.parametrize("max_tokens", [7, 64])
@pytest.mark.parametrize(
    "lengths", [[1, 1], [2, 1, 50], [50, 0, 1], [16, 17, 33], [0, 0], [50]], ids=lambda lengths: str(lengths)
)
def test_rows_of_padding_alone_of_one_token_and_of_whole_pages_are_right(lengths, max_tokens):
    model, ids = mistral(), random_ids(len(lengths), 51)
    mask = left_padded(51, lengths)
    mask[:, -1] = 1
    cache, padded = paged(model), paged(model)
    cache.prefill(model, ids, mask, max_tokens=max_tokens)
    run(model, padded, ids[:, :50], [50], mask[:, :50])
    assert_same_content(cache, padded)
    cache.pool.check_integrity()


EDGES = [1, 127, 128, 129, 255, 256, 257, 600]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@MODELS
def test_two_turns_of_rows_that_end_at_the_edges_of_pages_leave_what_padded_ones_leave(load, dtype):
    model = copy.deepcopy(load()).to(dtype)
    turns = random_ids(len(EDGES), 1101)
    mask = torch.cat([left_padded(600, EDGES), left_padded(500, [*EDGES[::-1][1:], 500])], dim=1)
    mask = torch.cat([mask, torch.ones(len(EDGES), 1, dtype=torch.long)], dim=1)
    cache, padded = paged(model, page_size=128), paged(model, page_size=128)
    for stop in (601, 1101):
        cache.prefill(model, turns[:, :stop], mask[:, :stop], max_tokens=512)
        cache.pool.check_integrity()
    run(model, padded, turns[:, :1100], [600, 500], mask[:, :1100])
    assert_same_content(cache, padded, **(CLOSE if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.1}))


@settings(max_examples=25, deadline=None)
@given(
    data=st.data(),
    num_rows=st.integers(1, 5),
    num_columns=st.lists(st.integers(2, 40), min_size=1, max_size=3),
    max_tokens=st.integers(1, 70),
    load=st.sampled_from([llama, mistral]),
    is_by_row=st.booleans(),
)
def test_any_ragged_turns_leave_what_padded_ones_leave(data, num_rows, num_columns, max_tokens, load, is_by_row):
    model, total = load(), sum(num_columns)
    seed = data.draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 5, (num_rows, total), generator=generator)
    density = data.draw(st.sampled_from([0.1, 0.6, 1.0]))
    mask = (torch.rand(num_rows, total, generator=generator) <= density).long()
    if data.draw(st.booleans()):
        source = torch.randint(0, num_rows, (num_rows,), generator=generator)
        ids, mask = ids[source], mask[source]
    cache, plain = paged(model), DynamicCache(config=model.config)
    done = 0
    for count in num_columns:
        stop = done + count
        with pytest.MonkeyPatch.context() as patch:
            if not is_by_row:
                patch.setattr("hf_paged.attention.dispatch.choose_backend", lambda *_: Backend.FLEX)
            cache.prefill(model, ids[:, :stop], mask[:, :stop], max_tokens=max_tokens)
        assert cache.get_seq_length() == stop - 1
        assert cache.lengths == mask[:, : stop - 1].sum(1).tolist()
        cache.pool.check_integrity()
        actual = continued(model, cache, ids[:, :stop], mask, stop - 1)
        cache.pool.check_integrity()
        done = stop
    model.set_attn_implementation("sdpa")
    if done > 1:
        run(model, plain, ids[:, : done - 1], [done - 1], mask[:, : done - 1])
    expected = continued(model, plain, ids, mask, done - 1)
    real = mask[:, -1].bool()
    torch.testing.assert_close(actual[real], expected[real], **CLOSE)


# Chunks


@pytest.fixture
def wants(monkeypatch):
    """Let prefill take models as they are for compiled ones, which want some tokens at least."""

    def set_to(min_tokens):
        monkeypatch.setattr("hf_paged.cache.prompt.prefill.compiled_filling", lambda decoder: decoder)
        monkeypatch.setattr("hf_paged.cache.prompt.prefill.MIN_TOKENS", min_tokens)

    return set_to


@pytest.mark.parametrize(
    ("min_tokens", "max_tokens", "expected_sizes"),
    [(36, 40, [40, 40, 36]), (32, 32, [32, 32, 32, 14]), (33, 32, [32, 32, 32, 14])],
    ids=["filled-up", "nearly-empty-is-not-worth-it", "none-larger-than-asked-for"],
)
def test_tokens_of_no_row_fill_up_chunks_and_change_nothing(wants, way, min_tokens, max_tokens, expected_sizes):
    model, mask = mistral(), padding("left")
    expected, _ = padded_prefill(mistral, "left")
    ids = random_ids(len(mask), NUM_COLUMNS + 3)[:, :NUM_COLUMNS]
    cache = paged(model)
    with shapes_of_passes(model) as shapes:
        wants(min_tokens)
        cache.prefill(model, ids, mask, max_tokens=max_tokens)
    assert shapes == [(1, size) for size in expected_sizes]
    assert_same_content(cache, expected)
    cache.pool.check_integrity()


def test_chunks_hold_max_tokens_whatever_the_padding():
    model, ids, mask = llama(), random_ids(4, NUM_COLUMNS), padding("left")
    cache = paged(model)
    with shapes_of_passes(model) as shapes:
        cache.prefill(model, ids, mask, max_tokens=40)
    assert shapes == [(1, 40), (1, 40), (1, 30)]


@MODELS
def test_some_of_the_packed_queries_may_be_asked_alone(load, wants, way):
    model, ids = load(), random_ids(2, 21)
    cache, compared = paged(model), []

    def ask_again(kwargs):
        keys, values = cache.pool.storage(1).tensors
        module = model.model.layers[1].self_attn
        query = torch.randn(1, 6, 45, 16, generator=torch.Generator().manual_seed(0))
        mask = kwargs["attention_mask"]
        whole, _ = paged_flex_attention(module, query, keys, values, mask)
        for queries in (slice(30, 36), slice(-9, None), slice(-2, None)):  # of rows, of a row and none, of none
            some, _ = paged_flex_attention(module, query[:, :, queries], keys, values, mask[:, :, queries])
            assert some.shape == whole[:, queries].shape
            compared.append((some, whole[:, queries]))

    wants(45)
    with watched(model.model.layers[1].self_attn, after=ask_again):
        cache.prefill(model, ids, max_tokens=45)
    (some, whole), (tail, whole_tail), _ = compared
    torch.testing.assert_close(some, whole, **CLOSE)
    torch.testing.assert_close(tail[:, :4], whole_tail[:, :4], **CLOSE)  # 40 of the 45 tokens are of a row


@pytest.mark.parametrize("max_tokens", [16, 40])
def test_pages_that_have_left_the_window_are_dropped_between_chunks(max_tokens):
    model, num_rows = mistral(), 3
    ids = random_ids(num_rows, 200)
    cache = paged(model)
    peaks = []
    allocator = cache.pool.groups[0].allocator
    with watched(model.model.layers[-1], after=lambda _: peaks.append(allocator.num_active)):
        cache.prefill(model, ids, max_tokens=max_tokens)
    per_row = -(-WINDOW // 16) + 1
    assert max(peaks) <= num_rows * per_row + -(-max_tokens // 16) + 1
    padded = paged(model)
    run(model, padded, ids[:, :199], [199])
    assert_same_content(cache, padded)


@MODELS
def test_what_another_prompt_left_in_a_page_is_not_seen(load, way):
    model, ids = load(), random_ids(2, 50)
    padded = paged(model)
    run(model, padded, ids[:, :49], [49])
    pool = PagePool(model.config, num_pages=10, page_size=16)
    PagedCache(pool=pool).prefill(model, ids)
    for layer in range(2):
        for tensor in pool.storage(layer).tensors:
            tensor.fill_(float("nan"))
    cache = PagedCache(pool=pool)
    cache.prefill(model, ids, max_tokens=3)
    assert_same_content(cache, padded)


# Failures


@pytest.mark.parametrize("cached", [0, 20])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("failing", [0, 2])
def test_a_failure_in_any_chunk_leaves_the_cache_as_it_was(failing, layer, cached):
    model, ids = mistral(), random_ids(3, 60)
    mask = left_padded(60, [60, 45, 50])
    cache = paged(model)
    if cached:
        run(model, cache, ids[:, :cached], [cached], mask[:, :cached])
    cache.stats()
    before = pages(cache), cache.lengths, cache.pool.groups[0].allocator.num_active
    content = [cache.gather(index) for index in range(2)]
    num_calls = 0

    def fail(*_):
        nonlocal num_calls
        num_calls += 1
        if num_calls > failing:
            raise RuntimeError("injected")

    with watched(model.model.layers[layer], before=fail), pytest.raises(RuntimeError, match="injected"):
        cache.prefill(model, ids, mask, max_tokens=25)
    assert cache.get_seq_length() == cached
    assert (pages(cache), cache.lengths, cache.pool.groups[0].allocator.num_active) == before
    for index, (keys, values) in enumerate(content):
        if cached:
            assert torch.equal(cache.gather(index)[0], keys)
            assert torch.equal(cache.gather(index)[1], values)
    cache.pool.check_integrity()
    cache.prefill(model, ids, mask, max_tokens=25)
    expected = generate(model, "sdpa", DynamicCache(config=model.config), ids, attention_mask=mask)
    assert torch.equal(generate(model, "paged_flex", cache, ids, attention_mask=mask), expected)


@pytest.mark.parametrize("num_missing", [0, 1])
def test_a_pool_that_is_too_small_raises_before_anything_is_computed(num_missing):
    model, ids, mask = llama(), random_ids(4, NUM_COLUMNS), padding("left")
    needed = sum(-(-(length - 1) // 16) for length in LENGTHS)
    cache = paged(model, num_pages=needed - num_missing)
    if num_missing == 0:
        cache.prefill(model, ids, mask, max_tokens=8)
        assert cache.pool.stats().num_free_pages == 0
        return
    with (
        shapes_of_passes(model) as shapes,
        pytest.raises(OutOfPagesError, match=f"needs {needed} more pages, but {needed - 1} of {needed - 1} are free"),
    ):
        cache.prefill(model, ids, mask, max_tokens=8)
    assert shapes == []
    assert cache.pool.stats().num_free_pages == needed - 1
    cache.pool.check_integrity()


def test_a_window_asks_for_what_it_holds_at_once():
    model, ids = mistral(), random_ids(2, 200)
    cache = paged(model, num_pages=8)  # 26 would hold the whole prompt
    cache.prefill(model, ids, max_tokens=16)
    expected = generate(model, "sdpa", DynamicCache(config=model.config), ids)
    assert torch.equal(generate(model, "paged_flex", cache, ids), expected)
    small = paged(model, num_pages=4)
    with shapes_of_passes(model) as shapes, pytest.raises(OutOfPagesError, match="more pages, but 4 of 4 are free"):
        small.prefill(model, ids, max_tokens=16)
    assert shapes == []


def test_a_turn_takes_no_page_to_copy_what_the_cache_alone_holds():
    model, ids = llama(), random_ids(2, 31)
    cache = paged(model, num_pages=4)
    run(model, cache, ids[:, :20], [20])
    assert cache.pool.stats().num_free_pages == 0
    cache.prefill(model, ids)
    assert cache.pool.stats().num_copied_pages == 0
    padded = paged(model)
    run(model, padded, ids[:, :30], [20, 10])
    assert_same_content(cache, padded)


def test_a_turn_copies_what_a_fork_holds_too():
    model, ids = llama(), random_ids(2, 31)
    cache = paged(model)
    run(model, cache, ids[:, :20], [20])
    fork = cache.fork()
    held = [fork.gather(layer) for layer in range(2)]
    cache.prefill(model, ids)
    assert cache.pool.stats().num_copied_pages == 2
    fork.prefill(model, ids.flip(1)[:, :25].index_copy(1, torch.arange(20), ids[:, :20]))
    for layer in range(2):
        assert torch.equal(fork.gather(layer)[0][:, :, :20], held[layer][0])
    padded = paged(model)
    run(model, padded, ids[:, :30], [20, 10])
    assert_same_content(cache, padded)
    later = cache.fork()  # and the copies are nobody else's afterwards, until forked
    run(model, cache, ids[:, 30:], [1])
    torch.testing.assert_close(later.gather(0), padded.gather(0), **CLOSE)
    cache.pool.check_integrity()


def test_threads_prefill_over_one_pool():
    model = llama()
    pool = paged(model).pool
    batches = [random_ids(3, 30 + 5 * index, seed=index) for index in range(4)]
    expected = [generate(model, "sdpa", DynamicCache(config=model.config), ids) for ids in batches]
    model.set_attn_implementation("paged_flex")
    results = [None] * 4

    def work(index):
        for _ in range(3):
            cache = PagedCache(pool=pool)
            cache.prefill(model, batches[index], max_tokens=20)
            results[index] = generate(model, "paged_flex", cache, batches[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, tokens) for result, tokens in zip(results, expected, strict=True))
    pool.check_integrity()


def test_new_prompts_leave_the_watermark_to_running_rows():
    model = llama()
    paged(model)
    pool = PagePool(model.config, num_pages=4, page_size=16, watermark=2)
    cache = PagedCache(pool=pool)
    with pytest.raises(OutOfPagesError, match="2 of them held back for running rows"):
        cache.prefill(model, random_ids(1, 40))
    cache.prefill(model, random_ids(1, 33))
    cache.prefill(model, random_ids(1, 60))
    assert cache.lengths == [59]


# Arguments


def test_a_prompt_with_nothing_before_its_last_token_changes_nothing():
    model, ids = llama(), random_ids(2, 30)
    cache = paged(model)
    cache.prefill(model, ids[:, :1])
    assert cache.get_seq_length() == 0
    cache.prefill(model, ids)
    held = pages(cache)
    cache.prefill(model, ids)
    assert cache.get_seq_length() == 29
    assert pages(cache) == held


def test_arguments_that_don_t_fit_raise_and_change_nothing():
    model, ids, mask = llama(), random_ids(2, 30), left_padded(30, [30, 20])
    cache = paged(model)
    run(model, cache, ids[:, :20], [20], mask[:, :20])  # so that nobody knows of another prompt
    held, whole = pages(cache), torch.ones_like(mask)
    wanted = mask.clone()
    wanted[1, 9] = 1
    for arguments, message in (
        ({"max_tokens": 0}, "max_tokens=0 was asked for; a chunk needs at least one token"),
        ({"input_ids": ids[0]}, r"input_ids has shape \(30,\), but prefill\(\) needs \(num_rows, num_columns\)"),
        ({"input_ids": ids[:, :20], "attention_mask": mask[:, :20]}, "holds 20 tokens, but input_ids has 20"),
        ({"attention_mask": mask[:, :29]}, r"attention_mask has shape \(2, 29\), but input_ids \(2, 30\)"),
        ({"attention_mask": None}, "holds a batch with padding, so attention_mask is needed"),
        ({"attention_mask": whole}, "holds a batch with padding, so attention_mask is needed"),
        ({"attention_mask": wanted}, "wants a token in row 1, column 9"),
        ({"num_beams": 2, "past_key_values": cache}, "given num_beams, past_key_values, but it only takes"),
        ({"colour": 3}, "colour"),
        ({"input_ids": ids.repeat(2, 1), "attention_mask": mask.repeat(2, 1)}, "holds 2 rows, but a batch of 4"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.prefill(model, **({"input_ids": ids, "attention_mask": mask} | arguments))
        assert pages(cache) == held
        assert cache.get_seq_length() == 20
    cache.pool.check_integrity()


def test_padding_without_a_mask_is_what_generate_takes_for_it():
    model, ids = llama(), random_ids(2, 30)
    ids[1, :5] = model.generation_config.pad_token_id
    cache = paged(model)
    expected = generate(model, "sdpa", DynamicCache(config=model.config), ids)
    model.set_attn_implementation("paged_flex")
    cache.prefill(model, ids)
    assert cache.lengths == [29, 24]
    assert torch.equal(generate(model, "paged_flex", cache, ids), expected)


def test_released_rows_take_nothing_and_can_t_be_given_a_prompt():
    model, ids, mask = llama(), random_ids(3, 40), left_padded(40, [40, 40, 40])
    expected = generate(model, "sdpa", DynamicCache(config=model.config), ids)
    cache = paged(model)
    run(model, cache, ids[:, :20], [20])
    cache.release([1])
    with pytest.raises(ValueError, match=r"Rows \[1\] of this cache were released"):
        cache.prefill(model, ids)
    mask[1, 20:] = 0
    cache.prefill(model, ids, mask)
    assert cache.lengths == [39, 0, 39]
    actual = generate(model, "paged_flex", cache, ids, attention_mask=mask)
    assert torch.equal(actual[[0, 2]], expected[[0, 2]])
    cache.pool.check_integrity()


def test_another_model_than_that_of_the_pool_raises():
    cache, other = paged(llama()), tiny_llama(num_layers=3)
    other.set_attn_implementation("paged_flex")
    with pytest.raises(ValueError, match="has other layers than the model that this cache was made for"):
        cache.prefill(other, random_ids(2, 20))
    cache.prefill(llama(), random_ids(2, 20))
    wider = tiny_llama(head_dim=32)
    wider.set_attn_implementation("paged_flex")
    with pytest.raises(ValueError, match=r"\(2, 32\), but this cache holds \(2, 16\)"):
        cache.prefill(wider, torch.cat([random_ids(2, 20), random_ids(2, 10)], dim=1))
    assert cache.get_seq_length() == 19


def test_layers_that_are_left_out_keep_a_prompt_from_packing():
    packed = PackedPrompt(paged(llama())._sequences, random_ids(2, 19), None, 8)
    packed.next_wave()
    packed.begin(0, 8)
    packed.sequences.reserve(1, 8, None)
    layers_over(packed.sequences)[0].update(torch.zeros(1, 2, 8, 16), torch.zeros(1, 2, 8, 16))
    with pytest.raises(NotPackable, match=r"passed over layers \[1\]"):
        packed.end()


def test_writing_without_asking_for_a_mask_keeps_a_prompt_from_packing():
    packed = PackedPrompt(paged(llama())._sequences, random_ids(2, 19), None, 8)
    with pytest.raises(NotPackable, match="makes a pass of its own"):
        layers_over(packed.sequences)[0].update(torch.zeros(1, 2, 8, 16), torch.zeros(1, 2, 8, 16))


def test_the_mask_of_other_tokens_keeps_a_prompt_from_packing():
    packed = PackedPrompt(paged(llama())._sequences, random_ids(2, 19), None, 8)
    packed.next_wave()
    packed.begin(0, 8)
    assert packed.sequences.reserve(1, 8, torch.ones(1, 8)).num_new == 8
    for num_rows, num_new, mask in ((1, 9, None), (2, 8, None), (1, 8, torch.zeros(1, 8))):
        with pytest.raises(NotPackable, match="makes a pass of its own"):
            packed.sequences.reserve(num_rows, num_new, mask)


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        ("dynamic", {"factor": 2.0}),
        (
            "longrope",
            {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 32},
        ),
    ],
)
def test_rotary_embedding_that_depends_on_the_longest_row_is_padded_where_it_does(kind, parameters, caplog):
    _say.cache_clear()
    model = tiny_model(
        LlamaForCausalLM,
        LlamaConfig,
        rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **parameters},
        max_position_embeddings=64 if kind == "longrope" else 32,
    )
    cache, ids, mask = paged(model), random_ids(2, 60), left_padded(60, [60, 50])
    cache.prefill(model, ids[:, :33], mask[:, :33], max_tokens=8)
    assert not [record for record in caplog.records if "at once and padded" in record.message]
    for columns in (34, 60):
        given = {"ids": ids[:, :columns], "attention_mask": mask[:, :columns]}
        plain, model = copy.deepcopy(model), copy.deepcopy(model)  # the embedding remembers what was longest
        expected = generate(plain, "sdpa", DynamicCache(config=model.config), **given)
        cache = paged(model)
        cache.prefill(model, *given.values(), max_tokens=8)
        assert torch.equal(generate(model, "paged_flex", cache, **given), expected)
    assert f"longer than the 32 tokens from which on the rotary embedding ({kind!r})" in caplog.text
