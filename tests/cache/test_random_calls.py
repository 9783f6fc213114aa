"""Random sequences of cache calls, on several caches of one pool, beside plain references."""

import contextlib
import gc
import random
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers import AutoModelForCausalLM, Qwen2Config

from hf_paged import OutOfPagesError, PagedCache, PagePool
from tests.reference import (
    HEAD_DIM,
    NUM_KV_HEADS,
    ReferenceCache,
    assert_same,
    count_holders,
    forward,
    random_layers,
    table_of,
    tiny_config,
)

pytestmark = pytest.mark.usefixtures("quick_collection")


class CacheMachine(RuleBasedStateMachine):
    """Several caches on one pool beside plain references."""

    config = tiny_config()
    windows = (None, None)

    @initialize(num_pages=st.sampled_from([None, 8, 16]))
    def build(self, num_pages):
        self.pool = PagePool(self.config, num_pages, page_size=16)
        self.caches = [(PagedCache(pool=self.pool), ReferenceCache(self.windows))]
        self.generator = torch.Generator().manual_seed(0)
        self.model = AutoModelForCausalLM.from_config(self.config)
        self.folder = tempfile.TemporaryDirectory()

    def teardown(self):
        self.folder.cleanup()

    def pick(self, which):
        return self.caches[which % len(self.caches)]

    def fits(self, cache, reference, new_lengths):
        """Whether a step needs no more pages than are free, counted from the block tables alone."""
        table = table_of(cache)
        others = count_holders(*(table_of(other) for other, _ in self.caches if other is not cache))
        lengths, num_rows = reference.lengths, len(new_lengths)
        # Pages of a step that failed are given back before new ones are taken.
        own = [table.row_pages(row)[: -(-length // 16)] if length else [] for row, length in enumerate(lengths)]
        if len(lengths) < num_rows:
            lengths, own = (lengths or [0]) * num_rows, (own or [[]]) * num_rows
        holders = dict(others)
        for page in (page for pages in own for page in pages):
            holders[page] = holders.get(page, 0) + 1
        needed, writers = 0, {}
        for row, (length, more) in enumerate(zip(lengths, new_lengths, strict=True)):
            needed += -(-(length + more) // 16) - -(-length // 16)
            if more and length % 16:
                writers.setdefault(own[row][-1], []).append(row)
        # All who write into a page need one of their own, but the last holder has it already.
        needed += sum(min(len(rows), holders[page] - 1) for page, rows in writers.items())
        return self.pool.max_pages is None or needed <= self.pool.num_pages - len(holders)

    def step(self, reference, num_rows, num_new, new):
        """Fit a step to what is cached: its new columns, whole mask, and the tokens it stores in each row."""
        copies = num_rows // max(1, len(reference.rows))
        released = reference.released * copies or [False] * num_rows
        for row, is_released in zip(new, released, strict=True):
            if is_released and num_new > 1:
                row[:] = [0] * num_new
        past = reference.mask * copies or [[] for _ in new]
        mask = [old + added for old, added in zip(past, new, strict=True)]
        stored = [0 if is_released else sum(row) for row, is_released in zip(new, released, strict=True)]
        return (mask if any(0 in row for row in mask) else None), stored

    @rule(
        which=st.integers(0, 3),
        num_rows=st.integers(1, 3),
        num_new=st.sampled_from([1, 1, 2, 15, 16, 17, 33]),
        padding=st.sampled_from(["none", "none", "left", "anywhere"]),
        duplicates=st.sampled_from(["none", "none", "all", "two", "in the first layer"]),
        seed=st.integers(0, 1000),
    )
    def update(self, which, num_rows, num_new, padding, duplicates, seed):
        """A forward pass; one row that is cached makes as many of itself as the batch has."""
        cache, reference = self.pick(which)
        num_rows = len(reference.rows) if len(reference.rows) > 1 else num_rows
        new = [[1] * num_new for _ in range(num_rows)]
        random_ = random.Random(seed)
        for row in new if padding != "none" else []:
            if padding == "left":
                count = random_.randrange(num_new + 1)
                row[:count] = [0] * count
            else:
                row[:] = [random_.randrange(2) for _ in row]
        mask, stored = self.step(reference, num_rows, num_new, new)
        layers = random_layers(num_rows, num_new, self.generator)
        equal = {"none": 1, "two": 2}.get(duplicates, num_rows)
        for layer, (keys, values) in enumerate(layers):
            if layer == 0 or duplicates != "in the first layer":
                keys[:equal], values[:equal] = keys[:1].clone(), values[:1].clone()
        fits = self.fits(cache, reference, stored)
        try:
            forward(cache, layers, mask)
        except OutOfPagesError:
            assert not fits
            return
        assert fits or duplicates != "none"
        reference.append(layers, new)

    @rule(which=st.integers(0, 3), num_rows=st.integers(1, 3), num_new=st.sampled_from([1, 16, 17]))
    def fail_after_the_first_layer(self, which, num_rows, num_new):
        cache, reference = self.pick(which)
        num_rows = len(reference.rows) if len(reference.rows) > 1 else num_rows
        rubbish = torch.full((num_rows, NUM_KV_HEADS, num_new, HEAD_DIM), 1e6)
        mask, _ = self.step(reference, num_rows, num_new, [[1] * num_new for _ in range(num_rows)])
        kv_length, _ = cache.get_mask_sizes(num_new, 0)
        with contextlib.suppress(OutOfPagesError):
            kv_length.sequences.reserve(num_rows, num_new, None if mask is None else torch.tensor(mask))
            cache.update(rubbish, rubbish, 0)
        cache.roll_back()

    @rule(which=st.integers(0, 3), data=st.data())
    def release(self, which, data):
        cache, reference = self.pick(which)
        if reference.num_columns:
            rows = data.draw(st.lists(st.integers(0, len(reference.rows) - 1), max_size=2))
            cache.release(rows)
            reference.release(rows)

    @rule(which=st.integers(0, 3), data=st.data())
    def crop(self, which, data):
        cache, reference = self.pick(which)
        count = data.draw(st.integers(0, min(reference.num_columns, 40)))
        if reference.may_crop(count):
            cache.crop(-count)
            reference.crop(count)
        else:
            with pytest.raises(ValueError, match="tokens that have left the window of 20"):
                cache.crop(-count)

    @rule(which=st.integers(0, 3), data=st.data())
    def reorder(self, which, data):
        cache, reference = self.pick(which)
        if reference.num_columns:
            num_rows = len(reference.rows)
            beams = data.draw(st.lists(st.integers(0, num_rows - 1), min_size=num_rows, max_size=num_rows))
            cache.reorder_cache(torch.tensor(beams))
            reference.select(beams)

    @rule(which=st.integers(0, 3), data=st.data())
    def select(self, which, data):
        cache, reference = self.pick(which)
        if reference.num_columns:
            indices = data.draw(st.lists(st.integers(0, len(reference.rows) - 1), min_size=1, max_size=4))
            cache.batch_select_indices(torch.tensor(indices))
            reference.select(indices)

    @rule(which=st.integers(0, 3), repeats=st.integers(1, 3))
    def repeat(self, which, repeats):
        cache, reference = self.pick(which)
        if len(reference.rows) * repeats <= 6:
            cache.batch_repeat_interleave(repeats)
            reference.repeat(repeats)

    @precondition(lambda self: len(self.caches) < 4)
    @rule(which=st.integers(0, 3))
    def fork(self, which):
        cache, reference = self.pick(which)
        self.caches.append((cache.fork(), reference.fork()))

    @rule(which=st.integers(0, 3), page_size=st.sampled_from([None, 32]))
    def save_and_load(self, which, page_size):
        """Through a file, or two, with pages of another size on the way."""
        cache, reference = self.pick(which)
        path = Path(self.folder.name, "cache")
        cache.save(path, self.model)
        if page_size is not None:
            PagedCache.load(path, self.model, page_size=page_size).save(path)
        try:
            loaded = PagedCache.load(path, self.model, pool=self.pool)
        except OutOfPagesError:
            assert self.pool.max_pages is not None
            return
        self.caches[which % len(self.caches)] = loaded, reference

    @precondition(lambda self: len(self.caches) > 1)
    @rule(which=st.integers(0, 3))
    def drop(self, which):
        self.caches.pop(which % len(self.caches))
        gc.collect()

    @rule(which=st.integers(0, 3))
    def reset(self, which):
        cache, reference = self.pick(which)
        cache.reset()
        reference.reset()

    @rule()
    def trim(self):
        self.pool.trim()

    @invariant()
    def caches_hold_what_the_references_hold(self):
        for cache, reference in self.caches:
            assert_same(cache, reference)

    @invariant()
    def books_balance(self):
        self.pool.check_integrity()
        for group in range(len(self.pool.groups)):
            holders = count_holders(*(table_of(cache, group) for cache, _ in self.caches))
            allocator = self.pool.groups[group].allocator
            assert allocator.num_active == len(holders)
            assert allocator.num_shared == sum(count > 1 for count in holders.values())


class WindowedCacheMachine(CacheMachine):
    """The same for a model whose second layer has a sliding window, so that it has pages of its own."""

    config = Qwen2Config(
        **tiny_config().to_dict() | {"layer_types": ["full_attention", "sliding_attention"]},
        sliding_window=20,
        use_sliding_window=True,
    )
    windows = (None, 20)

    @initialize()
    def build(self):
        super().build(None)

    @rule(which=st.integers(0, 3))
    def record_past(self, which):
        cache, reference = self.pick(which)
        cache.activate_past_recording()
        reference.records_past = True

    @rule(which=st.integers(0, 3))
    def stop_recording(self, which):
        cache, reference = self.pick(which)
        for layer in cache.layers:
            layer.record_past = False
        reference.records_past = False


RANDOM = settings(max_examples=80, stateful_step_count=30, deadline=None, derandomize=True, database=None)
TestCachesAgainstReferences = CacheMachine.TestCase
TestCachesAgainstReferences.settings = RANDOM
TestWindowedCachesAgainstReferences = WindowedCacheMachine.TestCase
TestWindowedCachesAgainstReferences.settings = RANDOM
