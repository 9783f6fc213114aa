"""Sampling with drafts draws from the distribution that it draws from without them."""

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_paged
from hf_paged import assisted
from hf_paged.decoding.speculate.verdict import choose
from tests.decoding.speculate.drafting import decode, draft_whatever_there_is, oracle
from tests.models import random_ids, tiny_llama, tiny_model

NUM_DRAWS = 40_000


def distance(counts, probabilities):
    """Total variation between what was drawn and what should be."""
    return float((counts / counts.sum() - probabilities).abs().sum() / 2)


def drawn(scores, drafted, given):
    torch.manual_seed(0)
    rows = scores.expand(NUM_DRAWS, -1)
    tokens = choose(rows, drafted, None if given is None else given.expand(NUM_DRAWS, -1), True)
    return torch.bincount(tokens, minlength=scores.shape[0]).double(), tokens


def test_a_token_that_was_looked_up_is_right_as_often_as_it_would_be_drawn():
    scores = torch.tensor([0.3, 2.0, -1.0, 1.1, 0.0])
    wanted = scores.softmax(-1)
    counts, tokens = drawn(scores, torch.full((NUM_DRAWS,), 3), None)
    assert distance(counts, wanted) < 0.01
    assert abs(float((tokens == 3).double().mean()) - float(wanted[3])) < 0.01


@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
def test_tokens_that_were_drawn_are_corrected_to_the_wanted_distribution(temperature):
    scores = torch.tensor([0.3, 2.0, -1.0, 1.1, 0.0, -torch.inf])
    wanted = scores.softmax(-1)
    given = torch.tensor([1.5, 0.0, 1.0, 0.5, -torch.inf, 1.0]).div(temperature).softmax(-1)
    drafted = torch.multinomial(given, NUM_DRAWS, replacement=True, generator=torch.Generator().manual_seed(1))
    counts, tokens = drawn(scores, drafted, given)
    assert distance(counts, wanted) < 0.01
    accepted = float(torch.minimum(wanted, given).sum())
    assert abs(float((tokens == drafted).double().mean()) - accepted) < 0.01


def test_a_draft_from_the_same_distribution_is_always_right():
    scores = torch.randn(9, generator=torch.Generator().manual_seed(0))
    given = scores.softmax(-1)
    drafted = torch.multinomial(given, NUM_DRAWS, replacement=True, generator=torch.Generator().manual_seed(1))
    assert torch.equal(drawn(scores, drafted, given)[1], drafted)


def tiny_vocabulary(seed):
    torch.manual_seed(seed)
    model = tiny_model(LlamaForCausalLM, LlamaConfig, vocab_size=5, num_hidden_layers=1, initializer_range=0.12)
    for weight in model.parameters():
        if seed and weight.ndim > 1:
            weight.data = torch.randn_like(weight) * 0.12
    model.set_attn_implementation("paged_flex")
    return model


@pytest.mark.parametrize("kind", ["looked_up", "drawn"])
def test_three_tokens_in_a_row_are_drawn_as_without_drafts(kind, monkeypatch):
    draft_whatever_there_is(monkeypatch)
    model, num_rows = tiny_vocabulary(0), 6000
    ids = torch.tensor([[1, 2, 3, 1, 2, 3]]).expand(num_rows, -1)
    settings = {"do_sample": True, "max_new_tokens": 3, "top_k": 4, "temperature": 0.8}
    loop = hf_paged.prompt_lookup() if kind == "looked_up" else assisted(tiny_vocabulary(1))
    counts = []
    for used in (hf_paged.sample, loop):
        torch.manual_seed(0)
        said, _, num_passes = decode(model, used, ids, **settings)
        counts.append(Counter(map(tuple, said[:, 6:].tolist())))
    shares = [np.array([count[answer] / num_rows for answer in counts[0] | counts[1]]) for count in counts]
    assert num_passes <= 3
    # Two samples of this size differ by less than that in 125 answers.
    assert np.abs(shares[0] - shares[1]).sum() / 2 < 0.07


def test_a_draft_model_in_sampling_is_right_where_it_is_the_model_itself(monkeypatch):
    draft_whatever_there_is(monkeypatch)
    model = tiny_llama()
    model.set_attn_implementation("paged_flex")
    torch.manual_seed(0)
    _, _, num_passes = decode(model, assisted(copy.deepcopy(model)), random_ids(3, 20), do_sample=True, top_k=20)
    assert num_passes < 12  # for 40 tokens, up to six at a time


def test_the_same_seed_gives_the_same_tokens():
    model, ids, said = tiny_llama(), random_ids(4, 20), []
    for _ in range(2):
        torch.manual_seed(3)
        said.append(decode(model, oracle(random_ids(4, 60)), ids, do_sample=True)[0])
    assert torch.equal(*said)
