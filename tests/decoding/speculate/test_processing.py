"""Processors, criteria and streamers are given what `generate()` gives them."""

from functools import partial

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer

import hf_paged
from hf_paged import ReleaseFinished
from hf_paged.decoding.speculate.loop import speculate
from tests.decoding.speculate.drafting import (
    Oracle,
    assert_as_without_drafts,
    decode,
    draft_whatever_there_is,
    oracle,
)
from tests.models import left_padded, paged_cache, random_ids, tiny_llama, tiny_model

SETTINGS = {
    "repetition": {"repetition_penalty": 1.3},
    "ngrams": {"no_repeat_ngram_size": 2},
    "least": {"min_new_tokens": 9, "eos_token_id": list(range(3, 60))},
    "bad_words": {"bad_words_ids": [[7], [8, 9]]},
    "bias": {"sequence_bias": [[[17], 4.0], [[18, 19], 3.0]]},
    "forced": {"forced_eos_token_id": 5, "eos_token_id": 5},
    "suppressed": {"suppress_tokens": [3, 4], "begin_suppress_tokens": list(range(100))},
    "decaying": {"exponential_decay_length_penalty": (5, 1.5), "eos_token_id": [5, 6, 7]},
    "several": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "renormalize_logits": True},
}


def batch():
    return random_ids(4, 20), left_padded(20, [20, 11, 15, 3])


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_processors_of_transformers_see_each_row_up_to_its_position(settings):
    ids, mask = batch()
    without, with_drafts = assert_as_without_drafts(tiny_llama(), oracle, ids, mask, **settings)
    assert with_drafts < without


class Counting(LogitsProcessor):
    """Has a state, and looks at all rows: what a token gets depends on the calls before and on the other rows."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.clone())
        scores[:, len(self.seen) % 50] += 2.0
        scores[:, 50 + int(input_ids.sum()) % 50] += 2.0
        return scores


class Ending(StoppingCriteria):
    def __init__(self, steps):
        self.steps, self.seen = steps, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.clone())
        return torch.tensor([len(self.seen) >= self.steps + 3 * row for row in range(len(input_ids))])


@pytest.mark.parametrize("eos_token_id", [None, list(range(3, 12))])
def test_a_processor_and_a_criterion_of_ones_own_are_called_as_ever(eos_token_id, caplog):
    ids, mask = batch()
    calls = []

    def run(loop):
        processor, criterion = Counting(), Ending(20)
        lists = {
            "logits_processor": LogitsProcessorList([processor]),
            "stopping_criteria": StoppingCriteriaList([criterion]),
        }
        result = decode(tiny_llama(), loop, ids, mask, eos_token_id=eos_token_id, **lists)
        calls.append((processor.seen, criterion.seen))
        return result

    expected, held, num_expected = run(hf_paged.sample)
    actual, left, num_passes = run(oracle(expected, share_wrong=0.05))
    assert torch.equal(actual, expected)
    assert left.lengths == held.lengths
    assert num_passes < num_expected
    for one, other in zip(*calls, strict=True):
        assert len(one) == len(other)
        assert all(map(torch.equal, one, other))
    assert "as the slowest one" in caplog.text


def test_rows_that_are_released_stay_so():
    model, (ids, mask) = tiny_llama(), batch()
    ends = list(range(3, 30))

    def run(loop):
        kv_cache = paged_cache(model)
        criteria = StoppingCriteriaList([ReleaseFinished(kv_cache, ends)])
        settings = {"do_sample": False, "eos_token_id": ends, "pad_token_id": 0, "max_new_tokens": 30}
        inputs = {"attention_mask": mask, "past_key_values": kv_cache}
        said = model.generate(ids, **inputs, custom_generate=loop, stopping_criteria=criteria, **settings)
        kv_cache.pool.check_integrity()
        return said, kv_cache

    expected, held = run(hf_paged.sample)
    actual, left = run(oracle(expected, share_wrong=0.05))
    assert torch.equal(actual, expected)
    assert left.lengths == held.lengths
    assert 0 in left.lengths


def stops(strings):
    """Criteria that end rows by characters, which are tokens 0 to 92, from "!" on."""
    tokenizer = Tokenizer(BPE({chr(33 + index): index for index in range(93)}, []))
    tokenizer.decoder = Fuse()
    letters = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    return StoppingCriteriaList([StopStringCriteria(letters, strings)])


def test_stop_strings_end_rows_in_the_middle_of_a_draft():
    model, (ids, mask) = tiny_llama(), batch()
    criteria = stops(["a", "b", "c", "d", "ef", "<", "=", ">"])
    assert_as_without_drafts(
        model, lambda answers: oracle(answers, share_wrong=0.1), ids, mask, stopping_criteria=criteria
    )


class OfFirstRow(Oracle):
    """Drafts for the first row alone, and is always right."""

    def available(self):
        return np.array([7, 0])


def test_a_row_that_has_ended_runs_no_further_ahead_than_a_window_lets_it_come_back(monkeypatch):
    draft_whatever_there_is(monkeypatch)
    model = tiny_model(MistralForCausalLM, MistralConfig, sliding_window=16)
    ids, settings = random_ids(2, 20), {"suppress_tokens": list(range(93, 200)), "max_new_tokens": 80}
    answers, _, _ = decode(model, hf_paged.sample, ids, **settings)
    fast, slow = answers[:, 20:].tolist()
    first = next(token for token in fast if token not in slow[:40])
    second = next(token for place, token in enumerate(slow) if place >= 20 and token not in [*slow[:place], first])
    criteria = stops([chr(33 + first), chr(33 + second)])

    def loop_of(expected):
        assert expected.shape[1] < 80
        return partial(speculate, lambda model, text, *rest: OfFirstRow(text, answers, 0, 0.0), 7)

    assert_as_without_drafts(model, loop_of, ids, stopping_criteria=criteria, **settings)


class Columns(BaseStreamer):
    def __init__(self):
        self.columns, self.has_ended = [], False

    def put(self, value):
        self.columns.append(value.tolist())

    def end(self):
        self.has_ended = True


@pytest.mark.parametrize("num_rows", [1, 4])
def test_a_streamer_is_given_each_column_once_all_rows_have_it(num_rows):
    ids = random_ids(num_rows, 20)
    streamers = Columns(), Columns()
    expected, _, _ = decode(tiny_llama(), hf_paged.sample, ids, streamer=streamers[0])
    decode(tiny_llama(), oracle(expected), ids, streamer=streamers[1])
    assert streamers[0].columns == streamers[1].columns
    assert streamers[1].has_ended


def test_what_is_returned_has_the_sequences_and_the_cache():
    ids = random_ids(2, 20)
    expected, _, _ = decode(tiny_llama(), hf_paged.sample, ids)
    result, kv_cache, _ = decode(tiny_llama(), oracle(expected), ids, return_dict_in_generate=True)
    assert torch.equal(result.sequences, expected)
    assert result.past_key_values is kv_cache
