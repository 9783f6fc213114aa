"""Random requests to one small pool with a prefix cache, beside what a model makes of the same tokens alone."""

import contextlib
import gc
from functools import lru_cache

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers import DynamicCache

from hf_paged import OutOfPagesError, PagedCache, PagePool
from hf_paged._transformers import CACHE
from tests.models import random_ids, tiny_gemma, tiny_llama

pytestmark = pytest.mark.usefixtures("quick_collection")

NUM_PAGES = 14
PHRASES = random_ids(3, 24)  # of which prompts are made, so that many begin alike


@lru_cache(maxsize=1)
def llama():
    return prepared(tiny_llama(num_layers=2))


@lru_cache(maxsize=1)
def gemma():
    return prepared(tiny_gemma(20))


def prepared(model):
    model.set_attn_implementation("paged_flex")
    return model


@lru_cache(maxsize=1000)
def alone(get_model, tokens):
    """Keys and values of each layer, of a row computed by itself at once."""
    model = get_model()
    cache = DynamicCache()  # without windows
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        model(torch.tensor([tokens]), **{CACHE: cache})
    model.set_attn_implementation("paged_flex")
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


class PrefixMachine(RuleBasedStateMachine):
    """Caches on one pool, and the tokens of their rows."""

    get_model = staticmethod(llama)

    @initialize()
    def build(self):
        self.model = self.get_model()
        self.pool = PagePool.from_model(self.model, NUM_PAGES, 16, prefix_cache=True)
        self.caches = []

    def pick(self, which):
        return self.caches[which % len(self.caches)]

    @precondition(lambda self: len(self.caches) < 4)
    @rule(
        rows=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), min_size=1, max_size=3),
        cut=st.integers(0, 20),
        salt=st.sampled_from([None, None, "tenant"]),
        padding_side=st.sampled_from(["left", "right"]),
        max_tokens=st.sampled_from([8, 30, 1000]),
    )
    def prefill(self, rows, cut, salt, padding_side, max_tokens):
        prompts = [torch.cat([PHRASES[phrase] for phrase in row])[cut:].tolist() for row in rows]
        width = max(map(len, prompts))
        ids, mask = torch.zeros(2, len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            columns = slice(width - len(prompt), width) if padding_side == "left" else slice(len(prompt))
            ids[row, columns], mask[row, columns] = torch.tensor(prompt), 1
        cache = PagedCache(pool=self.pool, salt=salt)
        try:
            cache.prefill(self.model, ids, mask, max_tokens=max_tokens)
        except OutOfPagesError:
            assert cache.lengths == []
            return
        held = [row_ids[row_mask.bool()].tolist() for row_ids, row_mask in zip(ids[:, :-1], mask[:, :-1], strict=True)]
        self.caches.append([cache, held, ids, mask, True])

    @precondition(lambda self: self.caches)
    @rule(which=st.integers(0, 3), num_new=st.sampled_from([1, 3, 17]), commits=st.booleans())
    def generate(self, which, num_new, commits):
        entry = self.pick(which)
        cache, held, ids, mask, _ = entry
        ends_in_a_token = bool(mask[:, -1].all())
        try:
            tokens = self.model.generate(
                ids, attention_mask=mask, **{CACHE: cache}, do_sample=False, max_new_tokens=num_new, eos_token_id=None
            )
        except OutOfPagesError:
            self.caches.remove(entry)
            return
        mask = torch.cat([mask, torch.ones(len(mask), num_new, dtype=torch.long)], dim=1)
        for row in range(len(held)):
            held[row] = tokens[row, :-1][mask[row, :-1].bool()].tolist()
        entry[2:4] = tokens, mask
        if commits and ends_in_a_token and entry[4]:
            cache.commit(tokens)
        entry[4] = entry[4] and ends_in_a_token

    @precondition(lambda self: self.caches and len(self.caches) < 4)
    @rule(which=st.integers(0, 3))
    def fork(self, which):
        cache, held, *others = self.pick(which)
        self.caches.append([cache.fork(), [list(row) for row in held], *others])

    @precondition(lambda self: self.caches)
    @rule(which=st.integers(0, 3), count=st.integers(1, 20))
    def crop(self, which, count):
        entry = self.pick(which)
        cache, _, ids, mask, _ = entry
        count = min(count, ids.shape[1] - 2)
        with contextlib.suppress(ValueError):  # of what has left a window
            cache.crop(-count)
        count = ids.shape[1] - 1 - cache.get_seq_length()
        if count == 0:
            return
        ids, mask = ids[:, :-count], mask[:, :-count]
        entry[1:4] = [[row[m].tolist() for row, m in zip(ids[:, :-1], mask[:, :-1].bool(), strict=True)], ids, mask]

    @precondition(lambda self: self.caches)
    @rule(which=st.integers(0, 3))
    def edit(self, which):
        """Steer a cache, which is dropped afterwards: nobody may find what was done to it."""
        entry = self.pick(which)
        cache, held, *_ = entry
        if any(held):
            try:
                cache.layers[1].values[:] += 1
                cache.crop(0)
            except OutOfPagesError:
                pass
        self.caches.remove(entry)

    @precondition(lambda self: self.caches)
    @rule(which=st.integers(0, 3))
    def drop(self, which):
        self.caches.remove(self.pick(which))
        gc.collect()

    @rule()
    def forget(self):
        self.pool.forget_prefixes()

    @invariant()
    def caches_hold_what_their_tokens_make(self):
        for cache, held, _, mask, has_places in self.caches:
            if not has_places:
                continue
            assert cache.lengths == [len(row) for row in held]
            for layer in range(len(cache.layers)):
                keys, values = cache.gather(layer)
                for row, tokens in enumerate(held):
                    if not tokens:
                        continue
                    for found, whole in zip((keys, values), alone(self.get_model, tuple(tokens))[layer], strict=True):
                        real = found[row][:, mask[row, -1 - found.shape[2] : -1].bool()]
                        torch.testing.assert_close(
                            real, whole[:, whole.shape[1] - real.shape[1] :], atol=1e-4, rtol=1e-4
                        )

    @invariant()
    def books_balance(self):
        self.pool.check_integrity()
        stats = self.pool.stats()
        assert stats.num_free_pages + stats.num_cached_pages + stats.num_active_pages == stats.num_pages


class WindowedPrefixMachine(PrefixMachine):
    """The same for a model with windows of 20 tokens beside a layer without."""

    get_model = staticmethod(gemma)


RANDOM = settings(max_examples=20, stateful_step_count=15, deadline=None, derandomize=True, database=None)
TestPrefixes = PrefixMachine.TestCase
TestPrefixes.settings = RANDOM
TestWindowedPrefixes = WindowedPrefixMachine.TestCase
TestWindowedPrefixes.settings = RANDOM
