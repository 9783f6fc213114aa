"""In a loop dynamo looks at a compiled model in the first steps; what changes where nobody could see it, doesn't."""

import pytest
import torch
from transformers import LogitsProcessor, TextStreamer

import hf_paged
from hf_paged import PagedCache
from hf_paged._transformers import CACHE
from hf_paged.compile.api import compiled
from hf_paged.compile.steady import SteadySteps
from tests.models import generate, left_padded, letter_tokenizer, plain_tokens, random_ids, tiny_llama

NUM_STEPS = 24
GUARDED = 3  # the first, of inputs that Transformers has made, and two that are like all others

pytestmark = pytest.mark.usefixtures("graphs")


@pytest.fixture
def unguarded(monkeypatch):
    """Where a step was made without guards, one item each."""
    made = []
    call = SteadySteps.__call__

    def counted(self, **inputs):
        if self._repeated is not None:
            made.append(self)
        return call(self, **inputs)

    monkeypatch.setattr(SteadySteps, "__call__", counted)
    return made


def loop_tokens(model, ids, **arguments):
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    with compiled(model):
        return generate(model, "paged_flex", cache, ids, custom_generate=hf_paged.sample, **arguments)


@pytest.mark.parametrize("lengths", [[20], [20, 7, 13]])
def test_all_but_the_first_steps_are_made_without_guards(lengths, unguarded, graphs):
    model, ids, mask = tiny_llama(num_layers=1), random_ids(len(lengths), 20), left_padded(20, lengths)
    expected = plain_tokens(model, ids, attention_mask=mask, repetition_penalty=1.2)
    streamer = TextStreamer(letter_tokenizer()) if len(lengths) == 1 else None
    settings = {"attention_mask": mask, "repetition_penalty": 1.2, "streamer": streamer}
    assert torch.equal(loop_tokens(model, ids, **settings), expected)
    assert len(unguarded) == NUM_STEPS - 1 - GUARDED
    assert len(graphs) == 1


class Turning(LogitsProcessor):
    """Switches what a model computes in the middle of a call."""

    def __init__(self, model, num_columns):
        self.mlp, self.num_columns = model.model.layers[0].mlp, num_columns

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == self.num_columns:
            self.mlp.down_proj.weight.data = -self.mlp.down_proj.weight.data
        return scores


def test_what_a_processor_of_ones_own_changes_counts_from_the_next_step_on(unguarded):
    ids, tokens = random_ids(1, 20), []
    for way in (plain_tokens, loop_tokens):
        model = tiny_llama(num_layers=1)
        tokens.append(way(model, ids, logits_processor=[Turning(model, 32)]))
    assert torch.equal(*tokens)
    assert not torch.equal(tokens[0], plain_tokens(tiny_llama(num_layers=1), ids))
    assert not unguarded


def negate_logits(module, inputs, outputs):
    outputs.logits = -outputs.logits


def test_hooks_of_the_whole_model_are_called_in_each_step(unguarded):
    model, ids = tiny_llama(num_layers=1), random_ids(1, 20)
    before = plain_tokens(model, ids)
    model.register_forward_hook(negate_logits)
    expected = plain_tokens(model, ids)
    assert not torch.equal(expected, before)
    assert torch.equal(loop_tokens(model, ids), expected)
    assert not unguarded


class Later(type(tiny_llama())):
    """Computes something else once its cache is long."""

    def forward(self, input_ids, **inputs):
        if inputs[CACHE].get_seq_length() >= 32:
            input_ids = 199 - input_ids
        return super().forward(input_ids, **inputs)


def test_a_length_that_a_model_looks_at_is_looked_at_in_each_step(unguarded):
    model, ids = tiny_llama(num_layers=1), random_ids(1, 20)
    before = plain_tokens(model, ids)
    model.__class__ = Later
    expected = plain_tokens(model, ids)
    assert not torch.equal(expected, before)
    assert torch.equal(loop_tokens(model, ids), expected)
    assert not unguarded
