"""Rows that were swapped out come back as they were."""

import copy
import gc
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from hf_paged import OutOfPagesError, PagedCache, PagedEncoderDecoderCache, PagePool, UnclearPassError
from hf_paged.pages.tiers.transport import read_pages
from tests.cache.test_encoder_decoder import SETTINGS, of_class
from tests.cache.test_random_calls import CacheMachine, WindowedCacheMachine
from tests.models import generate, left_padded, plain_tokens, random_ids, run, tiny_gemma, tiny_llama
from tests.reference import (
    NUM_LAYERS,
    ReferenceCache,
    assert_same,
    count_holders,
    filled,
    forward,
    random_layers,
    table_of,
    tiny_config,
)

pytestmark = pytest.mark.usefixtures("quick_collection")

PAGE_BYTES = NUM_LAYERS * 2 * 2 * 8 * 4 * 16  # keys and values of two heads of size 8 in float32
MIB = 2**20


def swapping_pool(num_pages=None, host_bytes=MIB):
    return PagePool(tiny_config(), num_pages, page_size=16, host_bytes=host_bytes)


@pytest.fixture
def cache():
    return PagedCache(pool=swapping_pool())


def is_out(cache):
    return cache.stats().swapped_bytes > 0


# As they were


@pytest.mark.parametrize("attention", ["paged_flex", "sdpa"])
@pytest.mark.parametrize("load", [tiny_llama, lambda: tiny_gemma(24)], ids=["Llama", "Gemma"])
def test_tokens_are_the_same_though_others_wrote_into_the_pages(load, attention):
    model, ids, mask = load(), random_ids(3, 40), left_padded(40, [40, 3, 17])
    expected = plain_tokens(model, ids, attention_mask=mask)
    pool = PagePool(model.config, num_pages=24, page_size=16, host_bytes=MIB)
    cache, other = PagedCache(pool=pool), PagedCache(pool=pool)
    held = ids
    for num_columns in (41, 50, 57, 64):
        mask = torch.cat([mask, mask.new_ones(3, held.shape[1] - mask.shape[1])], dim=1)
        held = generate(model, attention, cache, held, attention_mask=mask, max_new_tokens=num_columns - held.shape[1])
        cache.swap_out()
        pool.check_integrity()
        assert pool.stats().num_active_pages == 0
        generate(model, attention, other, random_ids(3, 60, seed=num_columns), max_new_tokens=2)
        other.reset()
    assert torch.equal(held, expected)


def test_another_prompt_is_still_noticed():
    model, ids = tiny_llama(), random_ids(1, 20)
    cache = PagedCache(pool=PagePool(model.config, page_size=16, host_bytes=MIB))
    generate(model, "sdpa", cache, ids, max_new_tokens=2)
    cache.swap_out()
    with pytest.raises(ValueError, match="The cache holds another prompt"):
        generate(model, "sdpa", cache, random_ids(1, 30, seed=1), max_new_tokens=2)


def test_a_prompt_goes_on_by_prefill():
    model, ids = tiny_llama(), random_ids(2, 60)
    expected = plain_tokens(model, ids)
    cache = PagedCache(pool=PagePool(model.config, page_size=16, host_bytes=MIB))
    model.set_attn_implementation("paged_flex")
    cache.prefill(model, ids[:, :30])
    cache.swap_out()
    cache.prefill(model, ids)
    cache.swap_out()
    assert torch.equal(generate(model, "paged_flex", cache, ids), expected)


def test_what_was_generated_is_found_by_the_next_prompt_and_makes_room_for_rows_that_come_back():
    model, ids = tiny_llama(), random_ids(1, 40)
    model.set_attn_implementation("paged_flex")
    pool = PagePool.from_model(model, 6, page_size=16, prefix_cache=True, host_bytes=MIB)
    cache, other = PagedCache(pool=pool), PagedCache(pool=pool)
    cache.prefill(model, ids)
    tokens = generate(model, "paged_flex", cache, ids)
    cache.swap_out()
    assert (pool.stats().num_active_pages, pool.stats().num_cached_pages) == (0, 2)
    other.prefill(model, random_ids(1, 40, seed=1))
    other.reset()
    assert pool.stats().num_cached_pages == 4
    cache.commit(tokens)
    assert (pool.stats().num_active_pages, pool.stats().num_evicted_pages) == (4, 4)
    pool.check_integrity()
    cache.reset()
    other.prefill(model, tokens)
    assert pool.stats().num_hit_tokens == 48
    assert torch.equal(generate(model, "paged_flex", other, tokens), plain_tokens(model, tokens))


def test_columns_that_were_recorded_can_be_taken_back():
    model, ids = tiny_gemma(24), random_ids(1, 70)
    expected = plain_tokens(model, ids[:, :40])
    cache = PagedCache(pool=PagePool(model.config, page_size=16, host_bytes=MIB))
    model.set_attn_implementation("sdpa")
    cache.activate_past_recording()
    run(model, cache, ids, [70])
    cache.swap_out()
    cache.crop(-31)
    assert torch.equal(generate(model, "sdpa", cache, ids[:, :40]), expected)


def test_released_rows_stay_released(cache, generator):
    reference = filled(cache, generator, 3, 33, padding=[0, 5, 0])
    cache.release([1])
    reference.release([1])
    cache.swap_out()
    assert cache.lengths == reference.lengths
    layers = random_layers(3, 1, generator)
    mask = [[*row, 1] for row in reference.mask]
    forward(cache, layers, mask)
    reference.append(layers)
    assert_same(cache, reference)


def test_a_pass_of_several_rows_goes_on_from_one_that_was_swapped_out(cache, generator):
    reference = filled(cache, generator, 1, 20)
    cache.swap_out()
    layers = random_layers(3, 1, generator)
    forward(cache, layers)
    reference.append(layers)
    assert_same(cache, reference)


@pytest.mark.parametrize("when", ["before", "after"])
def test_changes_of_a_copy_count_whether_they_were_made_before_or_after(cache, generator, when):
    reference = filled(cache, generator, 2, 20)
    keys = cache.layers[1].keys
    if when == "after":
        cache.swap_out()
    keys[1, :, 3] = 7.0
    if when == "before":
        cache.swap_out()
    assert is_out(cache)
    reference.rows[1][3][1] = (torch.full_like(keys[1, :, 3], 7.0), reference.rows[1][3][1][1])
    assert_same(cache, reference)


def test_a_cache_that_was_filled_in_inference_mode_comes_back_outside_of_it(cache, generator):
    with torch.inference_mode():
        reference = filled(cache, generator, 2, 20)
        cache.swap_out()
    assert_same(cache, reference)


def test_the_decoder_of_a_model_with_an_encoder_is_swapped():
    model, ids = of_class("BartForConditionalGeneration")().eval(), random_ids(2, 15)
    pool = PagePool(model.config, page_size=16, host_bytes=MIB)
    found = []
    for swaps in (False, True):
        cache = PagedEncoderDecoderCache(pool=pool)
        tokens = model.generate(ids, past_key_values=cache, **SETTINGS)
        if swaps:
            cache.swap_out()
            assert is_out(cache)
        tokens = model.generate(ids, decoder_input_ids=tokens, past_key_values=cache, **SETTINGS)
        found.append((tokens, *cache.gather(0)))
        cache.swap_out()
        cache.swap_in()
        assert not is_out(cache)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


# What goes, and what stays


def test_a_page_is_copied_once_however_many_rows_hold_it(cache, generator):
    filled(cache, generator, 1, 40)
    cache.batch_repeat_interleave(3)
    cache.swap_out()
    assert cache.stats().swapped_bytes == 3 * PAGE_BYTES
    cache.swap_in()
    assert (cache.stats().num_active_pages, cache.stats().num_shared_pages) == (3, 3)
    cache.pool.check_integrity()


def test_pages_that_a_fork_holds_stay_with_it(cache, generator):
    reference = filled(cache, generator, 2, 40)
    fork, other = cache.fork(), reference.fork()
    cache.swap_out()
    assert fork.stats().num_active_pages == cache.pool.stats().num_active_pages == 6
    layers = random_layers(2, 1, generator)
    forward(fork, layers)
    other.append(layers)
    assert_same(cache, reference)
    assert_same(fork, other)
    assert cache.pool.stats().num_active_pages == 12
    cache.pool.check_integrity()


def test_a_copy_of_a_cache_that_was_swapped_out_holds_the_same(cache, generator):
    reference = filled(cache, generator, 2, 40)
    cache.swap_out()
    fork = copy.copy(cache)
    assert not is_out(cache)
    assert_same(fork, reference)
    assert_same(cache, reference)


def test_nothing_is_swapped_of_an_empty_cache(cache):
    cache.swap_out()
    cache.swap_in()
    assert not is_out(cache)
    assert cache.get_seq_length() == 0


def test_swapping_twice_is_swapping_once(cache, generator):
    reference = filled(cache, generator, 1, 20)
    cache.swap_out()
    cache.swap_out()
    assert cache.pool.stats().swapped_bytes == 2 * PAGE_BYTES
    cache.swap_in()
    cache.swap_in()
    assert_same(cache, reference)


def test_looking_at_lengths_and_memory_brings_nothing_back(cache, generator):
    filled(cache, generator, 2, 20, padding=[0, 3])
    cache.swap_out()
    assert (cache.lengths, cache.batch_size, cache.get_seq_length()) == ([20, 17], 2, 20)
    assert "lengths=[20, 17]" in repr(cache)
    assert str(cache.memory_map()).splitlines()[1:] == ["     0 ................"]
    stats = cache.stats()
    assert (stats.swapped_bytes, stats.num_active_pages, stats.num_tokens) == (4 * PAGE_BYTES, 0, 0)
    assert cache.pool.stats().swapped_bytes == 4 * PAGE_BYTES


@pytest.mark.parametrize("resets", [True, False], ids=["reset", "dropped"])
def test_memory_of_the_host_is_free_when_a_cache_that_was_swapped_out_is_done(generator, resets):
    pool = swapping_pool()
    cache = PagedCache(pool=pool)
    filled(cache, generator, 2, 20)
    cache.swap_out()
    if resets:
        cache.reset()
        assert cache.get_seq_length() == 0
    else:
        del cache
        gc.collect()
    assert pool.stats().swapped_bytes == 0
    pool.check_integrity()


# Bounds


def test_a_pool_without_memory_of_the_host_says_how_to_get_some(generator):
    cache = PagedCache(pool=PagePool(tiny_config(), page_size=16))
    reference = filled(cache, generator, 1, 20)
    for leave in (cache.swap_out, cache.set_idle):
        with pytest.raises(ValueError, match="Make the pool with host_bytes"):
            leave()
    assert_same(cache, reference)


@pytest.mark.parametrize("host_bytes", [-1, 0.5, "1"])
def test_bytes_of_the_host_are_a_whole_number(host_bytes):
    with pytest.raises(ValueError, match=f"host_bytes={host_bytes!r} was asked for, but a whole number of at least 0"):
        swapping_pool(host_bytes=host_bytes)


def test_no_more_is_swapped_out_than_the_host_may_hold(generator):
    pool = swapping_pool(host_bytes=3 * PAGE_BYTES)
    caches = [PagedCache(pool=pool) for _ in range(2)]
    references = [filled(cache, generator, 1, 32) for cache in caches]
    caches[0].swap_out()
    with pytest.raises(OutOfPagesError, match=f"of host_bytes={3 * PAGE_BYTES:,} only {PAGE_BYTES:,} are not taken"):
        caches[1].swap_out()
    assert [is_out(cache) for cache in caches] == [True, False]
    assert_same(caches[0], references[0])
    caches[1].swap_out()
    assert_same(caches[1], references[1])


USES = {
    "swap_in": PagedCache.swap_in,
    "a pass": lambda cache: forward(cache, random_layers(2, 1, torch.Generator())),
    "crop": lambda cache: cache.crop(-1),
    "reorder_cache": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "release": lambda cache: cache.release([0]),
    "fork": PagedCache.fork,
    "gather": lambda cache: cache.gather(0),
    "set": lambda cache: cache.set(0, *(torch.zeros(2, 2, 20, 8) for _ in range(2))),
    "keys": lambda cache: cache.layers[0].keys,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_use_that_finds_too_few_pages_changes_nothing(generator, use):
    pool = swapping_pool(num_pages=5)
    cache, other = PagedCache(pool=pool), PagedCache(pool=pool)
    reference = filled(cache, generator, 2, 20)
    cache.swap_out()
    filled(other, generator, 1, 20)
    with pytest.raises(OutOfPagesError, match="needs 4 more pages, but 3 of 5 are free"):
        use(cache)
    assert cache.stats().swapped_bytes == 4 * PAGE_BYTES
    pool.check_integrity()
    other.reset()
    assert_same(cache, reference)


def test_rows_come_back_into_pages_that_the_watermark_holds_back_from_new_ones(generator):
    pool = PagePool(tiny_config(), 4, page_size=16, watermark=2, host_bytes=MIB)
    cache = PagedCache(pool=pool)
    reference = filled(cache, generator, 1, 32)
    layers = random_layers(1, 17, generator)
    forward(cache, layers)
    reference.append(layers)
    cache.swap_out()
    assert_same(cache, reference)


def test_groups_of_layers_take_all_of_their_pages_or_none(generator):
    config = WindowedCacheMachine.config
    pool = PagePool(config, num_pages=4, page_size=16, host_bytes=MIB)
    cache, other = PagedCache(pool=pool), PagedCache(pool=pool)
    windows = WindowedCacheMachine.windows
    reference = ReferenceCache(windows)
    layers = random_layers(1, 40, generator)
    forward(cache, layers)
    reference.append(layers)
    cache.swap_out()
    taken = pool.groups[1].take(3)
    with pytest.raises(OutOfPagesError, match="needs 2 more pages, but 1 of 4 are free"):
        cache.swap_in()
    assert pool.groups[0].allocator.num_active == 0
    pool.groups[1].allocator.release(taken)
    assert_same(cache, reference)
    assert other.get_seq_length() == 0


def test_a_failing_copy_leaves_the_rows_on_the_host(cache, generator, monkeypatch):
    reference = filled(cache, generator, 2, 20)
    cache.swap_out()

    def fail(storages, pages, contents):
        raise MemoryError("no room to gather")

    with monkeypatch.context() as patch:
        patch.setattr("hf_paged.batch.swapped.write_pages", fail)
        with pytest.raises(MemoryError, match="no room to gather"):
            cache.swap_in()
    assert is_out(cache)
    assert cache.pool.stats().num_active_pages == 0
    assert_same(cache, reference)


# Idle caches


def test_idle_caches_make_room_the_one_first_that_was_idle_first(generator):
    pool = swapping_pool(num_pages=8)
    caches = [PagedCache(pool=pool) for _ in range(4)]
    references = [filled(cache, generator, 1, 32) for cache in caches]
    for which in (2, 0, 1):
        caches[which].set_idle()
    assert [is_out(cache) for cache in caches] == [False] * 4
    layers = random_layers(1, 17, generator)
    forward(caches[3], layers)
    references[3].append(layers)
    assert [is_out(cache) for cache in caches] == [False, False, True, False]
    pool.check_integrity()
    for cache, reference in zip(caches[:2], references[:2], strict=True):
        assert_same(cache, reference)
    caches[3].set_idle()
    assert_same(caches[2], references[2])
    assert is_out(caches[3])
    caches[0].reset()
    assert_same(caches[3], references[3])


def test_an_idle_cache_that_is_used_is_idle_no_more(generator):
    pool = swapping_pool(num_pages=4)
    cache, other = PagedCache(pool=pool), PagedCache(pool=pool)
    reference = filled(cache, generator, 1, 32)
    cache.set_idle()
    cache.crop(0)
    with pytest.raises(OutOfPagesError, match="needs 3 more pages, but 2 of 4 are free"):
        filled(other, generator, 1, 33)
    cache.set_idle()
    cache.set_idle()
    filled(other, generator, 1, 33)
    assert is_out(cache)
    other.reset()
    assert_same(cache, reference)


def test_looking_at_an_idle_cache_leaves_it_idle(generator):
    pool = swapping_pool(num_pages=4)
    cache, other = PagedCache(pool=pool), PagedCache(pool=pool)
    filled(cache, generator, 1, 32)
    cache.set_idle()
    assert (cache.lengths, cache.get_seq_length(), cache.stats().num_active_pages) == ([32], 32, 2)
    assert "row 0: 32 tokens" in str(cache.memory_map())
    filled(other, generator, 1, 33)
    assert is_out(cache)
    assert cache.lengths == [32]


def test_an_idle_cache_that_the_host_has_no_room_for_stays_and_a_smaller_one_goes(generator):
    pool = swapping_pool(num_pages=8, host_bytes=2 * PAGE_BYTES)
    caches = [PagedCache(pool=pool) for _ in range(3)]
    references = [
        filled(cache, generator, 1, num_tokens) for cache, num_tokens in zip(caches, (48, 32, 33), strict=True)
    ]
    caches[0].set_idle()
    caches[1].set_idle()
    layers = random_layers(1, 16, generator)
    forward(caches[2], layers)
    references[2].append(layers)
    assert [is_out(cache) for cache in caches] == [False, True, False]
    with pytest.raises(OutOfPagesError, match="needs 2 more pages, but 1 of 8 are free"):
        caches[1].swap_in()
    caches[2].reset()
    assert_same(caches[0], references[0])
    assert_same(caches[1], references[1])


def test_prefixes_are_evicted_before_idle_caches_go():
    model = tiny_llama()
    model.set_attn_implementation("paged_flex")
    pool = PagePool.from_model(model, 8, page_size=16, prefix_cache=True, host_bytes=MIB)
    cache, other = PagedCache(pool=pool), PagedCache(pool=pool)
    other.prefill(model, random_ids(1, 40))
    other.reset()
    cache.prefill(model, random_ids(1, 40, seed=1))
    cache.set_idle()
    other.prefill(model, random_ids(1, 70, seed=2))
    assert pool.stats().num_evicted_pages == 2
    assert not is_out(cache)
    other.reset()
    other.prefill(model, random_ids(1, 120, seed=3))
    assert is_out(cache)


@pytest.mark.parametrize("is_moved", [True, False], ids=["swapped out", "not yet"])
@pytest.mark.parametrize("resets", [True, False], ids=["reset", "dropped"])
def test_an_idle_cache_that_is_done_leaves_nothing(generator, resets, is_moved):
    pool = swapping_pool(num_pages=4)
    cache, other = PagedCache(pool=pool), PagedCache(pool=pool)
    filled(cache, generator, 1, 32)
    cache.set_idle()
    if is_moved:
        filled(other, generator, 1, 33)
        assert is_out(cache)
    if resets:
        cache.reset()
    else:
        del cache
        gc.collect()
    other.reset()
    assert (pool.stats().num_active_pages, pool.stats().swapped_bytes) == (0, 0)
    assert not pool.host.move_one()
    pool.check_integrity()


@pytest.mark.parametrize("fails", [True, False], ids=["without room", "with room"])
def test_a_cache_may_be_dropped_while_it_is_being_swapped_out(generator, monkeypatch, fails):
    pool = swapping_pool(num_pages=4)
    caches, other = [PagedCache(pool=pool)], PagedCache(pool=pool)
    filled(caches[0], generator, 1, 32)
    caches[0].set_idle()

    def read(storages, pages):
        caches.clear()
        gc.collect()
        if fails:
            raise MemoryError("no room")
        return read_pages(storages, pages)

    monkeypatch.setattr("hf_paged.batch.swapped.read_pages", read)
    filled(other, generator, 1, 33)
    other.reset()
    assert (pool.stats().num_active_pages, pool.stats().swapped_bytes) == (0, 0)
    pool.check_integrity()


def test_whoever_uses_a_cache_that_is_being_swapped_out_waits(generator, monkeypatch):
    pool = swapping_pool(num_pages=8)
    cache, other = PagedCache(pool=pool), PagedCache(pool=pool)
    reference = filled(cache, generator, 1, 32)
    kept = filled(other, generator, 1, 17)
    cache.set_idle()
    has_begun, may_go_on = threading.Event(), threading.Event()

    def read(storages, pages):
        has_begun.set()
        assert may_go_on.wait(timeout=60)
        return read_pages(storages, pages)

    monkeypatch.setattr("hf_paged.batch.swapped.read_pages", read)
    with ThreadPoolExecutor(2) as executor:
        layers = random_layers(1, 16 * 3, generator)
        taking = executor.submit(forward, other, layers)
        kept.append(layers)
        taking.result()
        assert not has_begun.is_set()  # there were pages enough
        layers = random_layers(1, 16 * 2, generator)
        taking = executor.submit(forward, other, layers)
        kept.append(layers)
        assert has_begun.wait(timeout=60)
        using = executor.submit(cache.gather, 0)
        assert not using.done()
        may_go_on.set()
        taking.result()
        with pytest.raises(OutOfPagesError, match="needs 2 more pages"):
            using.result()
    assert_same(other, kept)
    other.reset()
    assert_same(cache, reference)


# In a pass


def test_a_cache_in_the_middle_of_a_pass_is_not_swapped_out(cache, generator):
    reference = filled(cache, generator, 2, 20)
    keys, values = random_layers(2, 1, generator)[0]
    cache.update(keys, values, 0)
    with pytest.raises(UnclearPassError, match="went through layer 0 and no further"):
        cache.swap_out()
    assert not is_out(cache)
    cache.roll_back()
    cache.swap_out()
    assert_same(cache, reference)


# Any calls


class SwappingMachine(CacheMachine):
    """Caches that are swapped out at any time, and come back by whatever is done to them next."""

    @initialize()
    def build(self):
        self.start(PagePool(self.config, page_size=16, host_bytes=MIB))

    def fits(self, cache, reference, new_lengths):
        return True

    @rule(which=st.integers(0, 3))
    def swap_out(self, which):
        cache, reference = self.pick(which)
        cache.swap_out()
        assert is_out(cache) == (reference.num_columns > 0 and any(reference.lengths))

    @rule(which=st.integers(0, 3))
    def swap_in(self, which):
        cache, _ = self.pick(which)
        cache.swap_in()
        assert not is_out(cache)

    @invariant()
    def caches_hold_what_the_references_hold(self):
        for cache, reference in self.caches:
            assert cache.lengths == reference.lengths
            if not is_out(cache):
                assert_same(cache, reference)

    @invariant()
    def books_balance(self):
        self.pool.check_integrity()
        for group in range(len(self.pool.groups)):
            inside = [table_of(cache, group) for cache, _ in self.caches if not is_out(cache)]
            assert self.pool.groups[group].allocator.num_active == len(count_holders(*inside))
        assert self.pool.stats().swapped_bytes == sum(cache.stats().swapped_bytes for cache, _ in self.caches)

    def teardown(self):
        for cache, reference in getattr(self, "caches", []):
            assert_same(cache, reference)
        super().teardown()


class WindowedSwappingMachine(SwappingMachine, WindowedCacheMachine):
    """The same with a window."""

    @initialize()
    def build(self):
        SwappingMachine.build(self)


class FullPoolMachine(SwappingMachine):
    """The same in a pool that has too few pages for all: a cache comes back once others have gone."""

    @initialize()
    def build(self):
        self.start(PagePool(self.config, 12, page_size=16, host_bytes=64 * PAGE_BYTES))

    def fits(self, cache, reference, new_lengths):
        return CacheMachine.fits(self, cache, reference, new_lengths)

    def pick(self, which):
        cache, reference = super().pick(which)
        needed = cache.stats().swapped_bytes // PAGE_BYTES
        if needed > self.pool.stats().num_free_pages:
            with pytest.raises(OutOfPagesError, match=f"needs {needed} more pages"):
                cache.swap_in()
            assert cache.stats().swapped_bytes == needed * PAGE_BYTES
            for other, _ in self.caches:
                other.swap_out()
        if needed:
            cache.swap_in()
        return cache, reference

    @precondition(lambda self: len(self.caches) < 3)
    @rule(which=st.integers(0, 3))
    def fork(self, which):
        super().fork(which)

    def teardown(self):
        for which in range(len(getattr(self, "caches", []))):
            assert_same(*self.pick(which))
        CacheMachine.teardown(self)


class IdleMachine(FullPoolMachine):
    """The same with caches that are swapped out when others need their pages."""

    def pick(self, which):
        cache, reference = SwappingMachine.pick(self, which)
        try:
            cache.swap_in()
        except OutOfPagesError:
            for other, _ in self.caches:
                other.swap_out()
            cache.swap_in()
        return cache, reference

    @rule(which=st.integers(0, 3), num_rows=st.integers(1, 3), num_new=st.sampled_from([1, 15, 16, 17, 33]))
    def update(self, which, num_rows, num_new):
        cache, reference = self.pick(which)
        num_rows = len(reference.rows) if len(reference.rows) > 1 else num_rows
        new = [[1] * num_new for _ in range(num_rows)]
        mask, _ = self.step(reference, num_rows, num_new, new)
        layers = random_layers(num_rows, num_new, self.generator)
        try:
            forward(cache, layers, mask)
        except OutOfPagesError:
            return
        reference.append(layers, new)

    @rule(which=st.integers(0, 3))
    def set_idle(self, which):
        self.pick(which)[0].set_idle()


RANDOM = settings(max_examples=20, stateful_step_count=30, deadline=None, derandomize=True, database=None)
TestSwappedCachesAgainstReferences = SwappingMachine.TestCase
TestSwappedCachesAgainstReferences.settings = RANDOM
TestWindowedSwappedCachesAgainstReferences = WindowedSwappingMachine.TestCase
TestWindowedSwappedCachesAgainstReferences.settings = RANDOM
TestSwappedCachesInAFullPoolAgainstReferences = FullPoolMachine.TestCase
TestSwappedCachesInAFullPoolAgainstReferences.settings = RANDOM

TestIdleCachesAgainstReferences = IdleMachine.TestCase
TestIdleCachesAgainstReferences.settings = RANDOM


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("restless_threads")
def test_threads_that_swap_on_one_full_pool_keep_their_own_tokens():
    pool = swapping_pool(num_pages=10, host_bytes=40 * PAGE_BYTES)
    start = threading.Barrier(4)

    def work(seed):
        random_, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        cache, reference = PagedCache(pool=pool), ReferenceCache()
        start.wait()
        num_refused = 0
        for _ in range(25):
            try:
                match random_.randrange(5):
                    case 0 | 1:
                        layers = random_layers(1, random_.choice([1, 16, 17]), generator)
                        forward(cache, layers)
                        reference.append(layers)
                    case 2:
                        cache.swap_out()
                    case 3:
                        cache.set_idle()
                    case 4 if reference.num_columns > 40:
                        cache.reset()
                        reference.reset()
            except OutOfPagesError:
                num_refused += 1
                cache.swap_out()
        cache.swap_out()
        return cache, reference, num_refused

    with ThreadPoolExecutor(4) as executor:
        done = [future.result() for future in [executor.submit(work, seed) for seed in range(4)]]
    assert sum(num_refused for *_, num_refused in done) > 0
    pool.check_integrity()
    for cache, reference, _ in done:
        assert_same(cache, reference)
        cache.reset()
    assert (pool.stats().num_active_pages, pool.stats().swapped_bytes) == (0, 0)
