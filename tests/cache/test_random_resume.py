"""Random versions of conversations, resumed by caches of one pool, beside what a model makes of the tokens alone."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch.nn.functional import pad

from hf_paged import OutOfPagesError, PagedCache, PagePool
from hf_paged._transformers import CACHE
from tests.cache.test_random_prefixes import alone, gemma, llama
from tests.models import left_padded, random_ids

pytestmark = pytest.mark.usefixtures("quick_collection")

PHRASES = random_ids(3, 24).tolist()
VERSIONS = st.lists(
    st.tuples(st.integers(0, 60), st.lists(st.integers(0, 2), min_size=1, max_size=2), st.integers(0, 23)),
    min_size=4,
    max_size=4,
)


class ResumeMachine(RuleBasedStateMachine):
    """Caches on one pool, each with the lists of tokens that its rows hold."""

    get_model = staticmethod(llama)

    @initialize(has_index=st.booleans())
    def build(self, has_index):
        self.model = self.get_model()
        self.pool = PagePool.from_model(self.model, 30, 16, prefix_cache=has_index)
        self.caches = []

    def pick(self, which):
        return self.caches[which % len(self.caches)]

    @precondition(lambda self: len(self.caches) < 4)
    @rule(num_rows=st.integers(1, 3))
    def make(self, num_rows):
        self.caches.append([PagedCache(pool=self.pool), [[] for _ in range(num_rows)]])

    @precondition(lambda self: self.caches)
    @rule(
        which=st.integers(0, 3),
        versions=VERSIONS,
        num_new=st.integers(0, 9),
        max_tokens=st.sampled_from([8, 30, 1000]),
        padding_side=st.sampled_from(["left", "left", "right"]),
    )
    def resume(self, which, versions, num_new, max_tokens, padding_side):
        """Each row keeps some of its tokens, others follow, and an answer."""
        entry = self.pick(which)
        cache, held = entry
        if not held:
            return
        rows = [
            row[:cut] + [token for phrase in phrases for token in PHRASES[phrase]][start:]
            for row, (cut, phrases, start) in zip(held, versions, strict=False)
        ]
        width = max(map(len, rows))
        mask = left_padded(width, list(map(len, rows)))
        ids = torch.stack([pad(torch.tensor(row), (width - len(row), 0)) for row in rows])
        if padding_side == "right":
            ids, mask = (tensor.new_zeros(tensor.shape) for tensor in (ids, mask))
            for index, row in enumerate(rows):
                ids[index, : len(row)], mask[index, : len(row)] = torch.tensor(row), 1
            num_new = 0
        try:
            cache.resume(self.model, ids, mask, max_tokens=max_tokens)
        except OutOfPagesError:
            return
        entry[1] = held = [
            row_ids[real.bool()].tolist() for row_ids, real in zip(ids[:, :-1], mask[:, :-1], strict=True)
        ]
        if num_new:
            try:
                tokens = self.model.generate(
                    ids,
                    attention_mask=mask,
                    **{CACHE: cache},
                    max_new_tokens=num_new,
                    do_sample=False,
                    eos_token_id=None,
                )
            except OutOfPagesError:
                self.caches.remove(entry)
                return
            entry[1] = [
                row_tokens[-len(row) - num_new : -1].tolist() for row, row_tokens in zip(rows, tokens, strict=True)
            ]

    @precondition(lambda self: self.caches and len(self.caches) < 4)
    @rule(which=st.integers(0, 3))
    def fork(self, which):
        cache, held = self.pick(which)
        self.caches.append([cache.fork(), [list(row) for row in held]])

    @precondition(lambda self: self.caches)
    @rule(which=st.integers(0, 3), others=st.lists(st.integers(0, 3), max_size=2))
    def concatenate(self, which, others):
        chosen = [entry for entry in map(self.pick, [which, *others]) if entry[0].lengths]
        rows = [list(row) for _, held in chosen for row in held]
        if chosen and len(rows) <= 4:
            self.caches[which % len(self.caches)] = [PagedCache.concatenate([cache for cache, _ in chosen]), rows]

    @precondition(lambda self: self.caches)
    @rule(which=st.integers(0, 3), row=st.integers(0, 3))
    def split(self, which, row):
        cache, held = self.pick(which)
        parts = cache.split()
        if parts:
            row %= len(parts)
            self.caches[which % len(self.caches)] = [parts[row], [held[row]]]

    @precondition(lambda self: self.caches)
    @rule(which=st.integers(0, 3), row=st.integers(0, 3))
    def release(self, which, row):
        entry = self.pick(which)
        cache, held = entry
        if cache.lengths:
            cache.release([row % len(cache.lengths)])
            held[row % len(held)] = []

    @precondition(lambda self: self.caches)
    @rule(which=st.integers(0, 3))
    def drop(self, which):
        self.caches.remove(self.pick(which))

    @invariant()
    def rows_hold_what_their_tokens_alone_make(self):
        for cache, held in self.caches:
            if not cache.lengths:
                continue
            assert cache.lengths == [len(row) for row in held]
            for layer in range(len(cache.layers)):
                keys, values = cache.gather(layer)
                columns = cache._sequences.rows.columns
                first = cache._sequences.rows.first_column(layer)
                for row, tokens in enumerate(held):
                    real = torch.ones(columns.count, dtype=torch.bool)
                    if columns.real is not None:
                        real = torch.from_numpy(columns.real[row])
                    seen = real[first:]
                    num_seen = int(seen.sum())
                    if not num_seen:
                        continue
                    for found, expected in zip(
                        (keys, values), alone(self.get_model, tuple(tokens))[layer], strict=True
                    ):
                        torch.testing.assert_close(
                            found[row][:, seen], expected[:, len(tokens) - num_seen :], atol=1e-4, rtol=1e-4
                        )

    @invariant()
    def pages_are_accounted_for(self):
        self.pool.check_integrity()


class WindowedResumeMachine(ResumeMachine):
    """The same for a model with windows of 20 tokens beside a layer without."""

    get_model = staticmethod(gemma)


RANDOM = settings(max_examples=20, stateful_step_count=15, deadline=None, derandomize=True, database=None)
TestResume = ResumeMachine.TestCase
TestResume.settings = RANDOM
TestWindowedResume = WindowedResumeMachine.TestCase
TestWindowedResume.settings = RANDOM
