"""Greedy decoding with drafts gives what it gives without them, and leaves the same in the cache."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_paged import assisted, prompt_lookup
from hf_paged.decoding.speculate.budget import Budget
from tests.decoding.speculate.drafting import assert_as_without_drafts, decode, draft_whatever_there_is, oracle
from tests.models import left_padded, random_ids, tiny_gemma, tiny_llama

MODELS = {"causal": tiny_llama, "windows": lambda: tiny_gemma(window=20)}
ENDS = {"no_end": None, "rows_that_end": list(range(3, 12))}


def ragged(num_rows, num_columns=37):
    ids = random_ids(num_rows, num_columns)
    ids[:, 20:34] = ids[:, 6:20]
    return ids, left_padded(num_columns, [num_columns - 4 * row for row in range(num_rows)])


@pytest.mark.parametrize("eos_token_id", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("num_rows", [1, 2, 8])
@pytest.mark.parametrize("family", MODELS)
def test_drafts_that_are_sometimes_right_change_nothing(family, num_rows, eos_token_id):
    ids, mask = ragged(num_rows)
    without, with_drafts = assert_as_without_drafts(
        MODELS[family](), oracle, ids, mask, eos_token_id=eos_token_id, max_new_tokens=60
    )
    assert with_drafts < without


@pytest.mark.parametrize("padding", ["left", "right", "none"])
@pytest.mark.parametrize("family", MODELS)
def test_prompt_lookup_changes_nothing_where_a_row_repeats_itself(family, padding, monkeypatch):
    draft_whatever_there_is(monkeypatch)
    ids, mask = ragged(4)
    mask = {"left": mask, "right": mask.flip(1), "none": None}[padding]
    model = MODELS[family]()
    assert_as_without_drafts(model, lambda answers: prompt_lookup(), ids, mask, max_new_tokens=80)


@pytest.mark.parametrize("is_right", [True, False], ids=["always_right", "never_right"])
@pytest.mark.parametrize("family", MODELS)
def test_a_draft_model_changes_nothing(family, is_right, monkeypatch):
    draft_whatever_there_is(monkeypatch)
    ids, mask = ragged(4)
    model = MODELS[family]()
    model.set_attn_implementation("paged_flex")
    draft = copy.deepcopy(model)
    if not is_right:
        draft.lm_head.register_forward_hook(lambda module, args, scores: scores.roll(1, -1))
    without, with_drafts = assert_as_without_drafts(
        model, lambda answers: assisted(draft), ids, mask, eos_token_id=ENDS["rows_that_end"]
    )
    assert with_drafts < 0.4 * without if is_right else with_drafts <= without


@pytest.mark.parametrize("family", MODELS)
def test_guesses_that_were_wrong_are_forgotten_though_nothing_is_drafted_for_a_while(family, monkeypatch):
    model, turns = MODELS[family](), []
    model.set_attn_implementation("paged_flex")
    draft = copy.deepcopy(model)

    def choose(self, available, is_going):
        turns.append(1)
        return np.minimum(available, 5 if len(turns) == 1 or len(turns) > 8 else 0)

    monkeypatch.setattr(Budget, "choose", choose)
    draft.lm_head.register_forward_hook(lambda module, args, scores: scores.roll(1, -1) if len(turns) == 1 else None)
    _, with_drafts = assert_as_without_drafts(model, lambda answers: assisted(draft), random_ids(2, 20))
    assert with_drafts == 1 + 8 + 6  # the prompt, 8 more tokens, and 31 by 6 at a time


@pytest.mark.parametrize("page_size", [16, 256])
@pytest.mark.parametrize("num_columns", [15, 16, 17, 255, 256, 257])
def test_drafts_go_over_the_edges_of_pages(num_columns, page_size):
    ids = random_ids(2, num_columns)
    assert_as_without_drafts(tiny_llama(), oracle, ids, page_size=page_size, max_new_tokens=12)


def test_a_prompt_of_one_token_is_drafted_for(monkeypatch):
    draft_whatever_there_is(monkeypatch)
    model = tiny_llama()
    model.set_attn_implementation("paged_flex")
    draft = copy.deepcopy(model)
    for loop in (prompt_lookup(), assisted(draft)):
        assert_as_without_drafts(model, lambda answers, loop=loop: loop, random_ids(3, 1))


def test_a_conversation_goes_on_in_the_same_cache():
    model, ids = tiny_llama(), random_ids(2, 20)
    said, kv_cache, _ = decode(model, prompt_lookup(), ids, max_new_tokens=9)
    longer = torch.cat([said, random_ids(2, 5, seed=1)], dim=1)
    settings_ = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 9}
    actual = model.generate(longer, past_key_values=kv_cache, custom_generate=prompt_lookup(), **settings_)
    expected, _, _ = decode(model, prompt_lookup(), longer, max_new_tokens=9)
    assert torch.equal(actual, expected)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    seed=st.integers(0, 2**20),
    share_wrong=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    family=st.sampled_from(sorted(MODELS)),
    right=st.booleans(),
    ends=st.booleans(),
)
def test_any_drafts_change_nothing(lengths, seed, share_wrong, family, right, ends):
    num_columns = max(lengths)
    ids, mask = random_ids(len(lengths), num_columns, seed), left_padded(num_columns, lengths)
    assert_as_without_drafts(
        _model(family),
        lambda answers: oracle(answers, seed, share_wrong),
        ids,
        mask.flip(1) if right else mask,
        eos_token_id=ENDS["rows_that_end"] if ends else None,
        max_new_tokens=30,
    )


def _model(family, made={}):  # noqa: B006 (made once)
    if family not in made:
        made[family] = MODELS[family]()
    return made[family]
