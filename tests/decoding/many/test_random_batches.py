"""Random sequences of rows that join a batch, take steps, leave and wait, beside a plain list of them."""

import copy
import random
from contextlib import ExitStack
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hf_paged import OutOfPagesError, PagedCache, PagePool, assisted
from hf_paged.decoding.many import batch
from hf_paged.decoding.many.batch import Batch
from hf_paged.decoding.many.drafts.decoded import Decoded
from hf_paged.decoding.many.filling import Filling
from hf_paged.decoding.many.prompt import Prompt
from hf_paged.decoding.many.row import prepare
from hf_paged.decoding.speculate.budget import Budget
from tests.models import tiny_gemma, tiny_llama
from tests.reference import table_of

pytestmark = pytest.mark.usefixtures("quick_collection")

NUM_NEW = 40
MAX_TOKENS = st.sampled_from([8, 99])  # of a piece
LENGTHS = (1, 2, 15, 16, 17, 33, 33)


class Answered:
    """A model, prompts of which two are equal, and how DynamicCache goes on from each."""

    def __init__(self, model):
        self.model = model
        chance = random.Random(0)
        self.prompts = [[chance.randint(3, 199) for _ in range(length)] for length in LENGTHS]
        self.prompts[-1] = self.prompts[-2][:]
        model.set_attn_implementation("sdpa")
        self.rows = [self.alone(prompt) for prompt in self.prompts]
        model.set_attn_implementation("paged_flex")

    def alone(self, prompt):
        ids = torch.tensor([prompt])
        settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": NUM_NEW}
        return self.model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0].tolist()


def noisy(model):
    """A copy whose greedy tokens are sometimes the same."""
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    for weight in other.parameters():
        weight.data += 0.02 * torch.randn_like(weight)
    return other


LLAMA, GEMMA = Answered(tiny_llama()), Answered(tiny_gemma(window=7))
DRAFT = noisy(GEMMA.model)


class BatchMachine(RuleBasedStateMachine):
    """A batch, and the rows that are in it, or wait."""

    answered = LLAMA
    rounds_up = False  # as for steps that are captured
    drafter = None

    def num_rows(self, num_running):
        return num_running if not self.rounds_up else -(-num_running // 4) * 4

    @initialize(
        num_pages=st.sampled_from([None, 6, 14]),
        prefix_cache=st.booleans(),
        host_bytes=st.sampled_from([0, 2**15, 2**24]),
    )
    def build(self, num_pages, prefix_cache, host_bytes):
        self.model = self.answered.model
        self.patches = ExitStack()
        count = mock.patch.object(batch, "captured_count", lambda num_rows, device_type: self.num_rows(num_rows))
        # Asked by the batch, not by what makes its passes, which would compile them.
        criteria = mock.patch.object(
            self.model, "_valid_auto_compile_criteria", lambda inputs, config: len(inputs) == 1 and self.rounds_up
        )
        for patch in (count, criteria):
            self.patches.enter_context(patch)
        self.pool = PagePool.from_model(
            self.model, num_pages, page_size=16, prefix_cache=prefix_cache, host_bytes=host_bytes
        )
        self.start_drafting()
        self.batch = Batch(self.model, self.pool, self.drafter)
        self.rows = []  # those of the batch
        self.waiting = []
        self.count = 0
        self.answers = {}  # what each row becomes

    def start_drafting(self):
        pass

    @rule(
        which=st.lists(st.integers(0, len(LENGTHS) - 1), min_size=1, max_size=3), max_tokens=st.sampled_from([8, 99])
    )
    def join(self, which, max_tokens):
        rows = []
        for place in which if max_tokens > 8 else which[:1]:
            settings = {"max_new_tokens": NUM_NEW, "do_sample": False, "eos_token_id": None}
            prompt = Prompt(self.count, None, self.answered.prompts[place])
            rows.append(prepare(self.model, self.pool, prompt, None, settings))
            self.answers[self.count] = self.answered.rows[place]
            self.count += 1
        self.fill(rows, max_tokens)

    def fill(self, rows, max_tokens=99):
        filling = Filling(self.model, PagedCache(pool=self.pool), rows, max_tokens)
        try:
            while not filling.advance():
                pass
        except OutOfPagesError:
            filling.cache.reset()
            return False
        self.batch.join(rows, filling.cache)
        self.rows += rows
        return True

    @precondition(lambda self: self.rows)
    @rule(times=st.sampled_from([1, 3, 9]))
    def step(self, times):
        for _ in range(times):
            if any(len(row.tokens) == NUM_NEW for row in self.rows):
                return
            self.batch.draft()
            try:
                scores = self.batch.step()
            except OutOfPagesError:
                assert self.pool.max_pages is not None
                return
            counts = []
            for row, draft, own in zip(self.rows, self.batch.drafts, scores.argmax(dim=-1).tolist(), strict=True):
                is_wrong = [token != guess for token, guess in zip(own, draft, strict=False)]
                counts.append(1 + [*is_wrong, True].index(True))
                for token in own[: counts[-1]]:
                    assert token == self.answers[row.prompt.index][len(row.ids)]
                    row.ids.append(token)
            self.batch.go_on(counts)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def leave(self, data):
        kept = data.draw(st.lists(st.sampled_from(range(len(self.rows))), unique=True).map(sorted))
        self.batch.keep(kept)
        self.rows = [self.rows[index] for index in kept]

    @precondition(lambda self: len(self.rows) > 1)
    @rule()
    def wait(self):
        row = self.batch.take_newest()
        assert row.prompt.index == max(other.prompt.index for other in self.rows)
        self.rows.remove(row)
        self.waiting.append(row)

    @precondition(lambda self: self.waiting)
    @rule()
    def come_back(self):
        row = self.waiting.pop()
        if row.parked is None:
            if not self.fill([row]):
                self.waiting.append(row)
            return
        try:
            self.batch.join([row], row.parked)
        except OutOfPagesError:
            self.waiting.append(row)
        else:
            row.parked = None
            self.rows.append(row)

    @invariant()
    def is_whole(self):
        self.pool.check_integrity()
        assert self.batch.rows == self.rows
        lengths = self.batch.cache.lengths
        assert lengths[: len(self.rows)] == [len(row.ids) - 1 for row in self.rows]
        assert len(lengths) == self.num_rows(len(self.rows))
        assert not any(lengths[len(self.rows) :])
        if self.rows:
            longest = max(len(row.ids) - 1 for row in self.rows)
            width = self.batch.cache.get_seq_length()
            # Rows without a token have a column, and those that get fewer tokens than others end before the last one.
            assert width in (longest, longest + 1) or (self.drafter is not None and width > longest)
        held = sum(len(table_of(self.batch.cache).row_pages(row)) > 0 for row in range(len(self.rows)))
        assert held == sum(len(row.ids) > 1 for row in self.rows)

    def teardown(self):
        if hasattr(self, "batch"):
            self.patches.close()
            self.batch.close()
            for row in self.waiting:
                if row.parked is not None:
                    row.parked.reset()
            assert self.pool.stats().num_active_pages == 0
            assert self.pool.stats().swapped_bytes == 0


class WindowMachine(BatchMachine):
    """The same, with layers that drop pages."""

    answered = GEMMA


class CapturedMachine(BatchMachine):
    """The same, with rows without a token behind the others."""

    rounds_up = True


class DraftedMachine(WindowMachine):
    """The same, with rows that a model drafts for, now these and now those, which is sometimes right."""

    rounds_up = True

    def start_drafting(self):
        turns = []

        def choose(budget, available, is_going):
            turns.append(1)
            return np.minimum(available, (np.arange(len(available)) + len(turns) // 3) % 4 * 2)

        self.patches.enter_context(mock.patch.object(Budget, "choose", choose))
        self.drafter = Decoded(assisted(DRAFT), self.model, 16)

    @invariant()
    def drafts_are_of_rows_that_are_there(self):
        own, pool = self.drafter._batch, self.drafter._pool
        pool.check_integrity()
        assert not self.drafter._has_failed
        assert not self.drafter._failed
        assert set(own.rows) <= set(self.rows)
        held = [length for length in own.cache.lengths if length]
        assert len(held) <= len(own.rows)
        num_pages = [sum(-(-length // pool.page_size) for length in held)] * len(pool.groups)
        assert [group.allocator.num_active for group in pool.groups] <= num_pages  # fewer of a window, or shared

    def teardown(self):
        super().teardown()
        if self.drafter is not None:
            assert self.drafter._pool.num_pages == 0


TestBatch = BatchMachine.TestCase
TestBatchOfFewNumbers = CapturedMachine.TestCase
TestBatchWithWindows = WindowMachine.TestCase
TestBatchWithDrafts = DraftedMachine.TestCase
TestBatch.settings = TestBatchWithWindows.settings = TestBatchOfFewNumbers.settings = settings(
    max_examples=20, stateful_step_count=20, deadline=None, derandomize=True
)
TestBatchWithDrafts.settings = settings(TestBatch.settings, max_examples=10)
