"""What drafts in tests: an oracle that is right as often as is wanted."""

from functools import partial

import numpy as np
import torch

import hf_paged
from hf_paged.decoding.speculate.budget import Budget
from hf_paged.decoding.speculate.drafts import Drafts
from hf_paged.decoding.speculate.loop import speculate
from tests.models import paged_cache


class Oracle:
    """Drafts the answers that it is given, some of them wrong, and a random number of tokens each time.

    Args:
        text: of the rows.
        answers: `(num_rows, num_columns)`, those that are right.
        seed: of what is random.
        share_wrong: of the tokens.
    """

    cost = 0.0

    def __init__(self, text, answers, seed, share_wrong):
        self._text = text
        self._answers = np.pad(answers.numpy(), ((0, 0), (0, 64)), constant_values=5)
        self._random = np.random.default_rng(seed)
        self._share_wrong = share_wrong

    def available(self):
        return self._random.integers(0, 8, len(self._answers))

    def foreseen(self):
        return np.full(len(self._answers), -1)

    def draft(self, counts):
        tokens = np.zeros((len(counts), counts.max()), dtype=np.int64)
        for row, count in enumerate(counts):
            known = self._text.known[row]
            right = self._answers[row, known : known + count]
            is_wrong = self._random.random(count) < self._share_wrong
            tokens[row, :count] = np.where(is_wrong, (right + 1) % 200, right)
        return Drafts(tokens, counts)

    def close(self):
        pass


def oracle(answers, seed=0, share_wrong=0.3, num_tokens=7):
    return partial(speculate, lambda model, text, *rest: Oracle(text, answers, seed, share_wrong), num_tokens)


def draft_whatever_there_is(monkeypatch):
    """Draft all that is available, whatever came of it."""

    def choose(self, available, is_going):
        return np.where(is_going, np.minimum(available, self.max_drafted), 0)

    monkeypatch.setattr(Budget, "choose", choose)


def decode(model, loop, ids, mask=None, page_size=16, num_pages=None, **arguments):
    """What `generate()` returns, the cache, and how many passes the model made."""
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 40}
    kv_cache = paged_cache(model, page_size=page_size, num_pages=num_pages)
    passes = []
    hook = model.register_forward_pre_hook(lambda *inputs: passes.append(1))
    try:
        result = model.generate(
            ids, attention_mask=mask, past_key_values=kv_cache, custom_generate=loop, **(settings | arguments)
        )
    finally:
        hook.remove()
    kv_cache.pool.check_integrity()
    return result, kv_cache, len(passes)


def assert_as_without_drafts(model, loop_of, ids, mask=None, **arguments):
    """Compare tokens and cache with those of `hf_paged.sample`; return the passes of both.

    Args:
        model: that generates.
        loop_of: takes the answers, and returns what drafts.
        ids: `(num_rows, num_columns)`.
        mask: like `ids`.
        **arguments: for `decode`.
    """
    expected, held, num_expected = decode(model, hf_paged.sample, ids, mask, **arguments)
    actual, left, num_passes = decode(model, loop_of(expected), ids, mask, **arguments)
    assert torch.equal(actual, expected)
    assert left.lengths == held.lengths
    assert left.get_seq_length() == held.get_seq_length()
    for one, other in zip(held, left, strict=True):
        for mine, theirs in zip(one[:2], other[:2], strict=True):
            torch.testing.assert_close(theirs, mine, rtol=1e-3, atol=1e-3)
    known, count = left._sequences.rows.known_ids.known, left.get_seq_length()
    assert torch.equal(known[0], actual[:, :count])
    return num_expected, num_passes
