"""Repeating decoding steps gives the same tokens, whatever changes between two steps.

On a CPU it is all of it but CUDA: a step is repeated by running it again on what was sent.
"""

import copy

import pytest
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from hf_paged import PagedCache, ReleaseFinished, sample
from hf_paged.attention import dispatch
from hf_paged.attention.backends import flex as kernel
from hf_paged.compile import api
from hf_paged.compile import cuda_graph as cuda_graphs
from hf_paged.compile.api import compiled
from tests.cache.test_recurrent import model_of, tokens_of
from tests.cache.test_recurrent import plain_tokens as recurrent_tokens
from tests.families import FAMILIES
from tests.models import generate, left_padded, plain_tokens, random_ids, tiny_llama, tiny_model
from tests.sweep.subjects import words

ON_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=ON_CUDA)])
def way(request):
    """On a CPU, with pages listed as on a GPU; and on a GPU."""
    return request.param


@pytest.fixture
def device(way):
    return torch.device(way)


@pytest.fixture(autouse=True)
def steps(way, monkeypatch):
    """How often a step was recorded and repeated."""
    torch._dynamo.reset()
    counts = {"recorded": 0, "repeated": 0}
    recording = cuda_graphs._Recording
    send, record, repeat = recording.send, recording.record, recording.replay

    def send_and_remember(self, inputs, all_metadata):
        send(self, inputs, all_metadata)
        self._inputs = [self._moving.get(index, value) for index, value in enumerate(inputs)]
        self._sequences = all_metadata[0].sequences

    def keep(self, run, inputs, pool):
        self._graph = run

    def run_again(self):
        with self._sequences.capturing() as self.layers:
            return self._graph(*self._inputs)

    if way != "cuda":
        record, repeat = keep, run_again
        monkeypatch.setattr(recording, "send", send_and_remember)
        monkeypatch.setattr(dispatch, "choose_backend", lambda *_: dispatch.Backend.FLEX)
        monkeypatch.setattr(kernel, "lists_full_pages", lambda device: False)
        monkeypatch.setattr(api, "compile_graph", lambda graph, *arguments: cuda_graphs.StepGraphs(graph))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        monkeypatch.setattr(cuda_graphs, "_stream", lambda: 0)

    def counted_record(*arguments):
        counts["recorded"] += 1
        record(*arguments)

    def counted_repeat(self):
        counts["repeated"] += 1
        return repeat(self)

    monkeypatch.setattr(recording, "record", counted_record)
    monkeypatch.setattr(recording, "replay", counted_repeat)
    return counts


def tiny_mistral():
    return tiny_model(MistralForCausalLM, MistralConfig, sliding_window=20)


def repeated_tokens(model, ids, **arguments):
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    with compiled(model):
        tokens = generate(model, "paged_flex", cache, ids, **arguments)
    cache.pool.check_integrity()
    return tokens


@pytest.mark.parametrize("make", [tiny_llama, tiny_mistral])
@pytest.mark.parametrize("lengths", [[20], [20, 7, 13]])
def test_steps_are_repeated_until_the_pool_grows(steps, device, make, lengths):
    model, ids = make().to(device), random_ids(len(lengths), 20).to(device)
    settings = {"attention_mask": left_padded(20, lengths).to(device), "max_new_tokens": 120}
    expected = plain_tokens(model, ids, **settings)
    assert torch.equal(repeated_tokens(model, ids, **settings), expected)
    assert 1 <= steps["recorded"] <= 8
    assert steps["repeated"] >= 118 - 2 * steps["recorded"]


def test_a_loop_that_looks_at_weights_once_repeats_steps_until_the_pool_grows(steps, device):
    model, ids = tiny_llama(num_layers=1).to(device), random_ids(3, 20).to(device)
    settings = {"attention_mask": left_padded(20, [20, 7, 13]).to(device), "max_new_tokens": 120}
    expected = plain_tokens(model, ids, **settings)
    assert torch.equal(repeated_tokens(model, ids, **settings, custom_generate=sample), expected)
    assert 2 <= steps["recorded"] <= 8
    assert steps["repeated"] >= 118 - 2 * steps["recorded"]


@pytest.mark.parametrize("name", ["Gemma 2", "GPT-OSS"])
def test_windows_softcap_and_sinks(steps, device, name):
    (family,) = (family for family in FAMILIES if family.name == name)
    model, ids = family.load(family.oracle).to(device), random_ids(3, 40).to(device)
    settings = {"attention_mask": left_padded(40, [40, 13, 31]).to(device), "max_new_tokens": 60}
    expected = plain_tokens(model, ids, **settings)
    assert torch.equal(repeated_tokens(model, ids, **settings), expected)
    assert steps["repeated"] > 30


def test_states_are_in_two_places_that_stay(steps, device):
    name, mask = "Qwen3NextForCausalLM", left_padded(20, [20, 7, 13])
    ids, model = words(3, 20) * mask, copy.deepcopy(model_of(name)).to(device)
    cache = PagedCache.from_model(model, page_size=16)
    with compiled(model):
        found = tokens_of(model, cache, ids.to(device), mask.to(device), new=60)
    assert torch.equal(found.cpu(), recurrent_tokens(name, ids, mask, new=60))
    assert 2 <= steps["recorded"] <= 6, "one for each place, again when the pool has grown"
    assert steps["repeated"] >= 58 - 2 * steps["recorded"]


def test_batches_of_several_sizes(steps, device):
    model = tiny_llama().to(device)
    for num_rows in (1, 3, 4, 1):
        ids = random_ids(num_rows, 30).to(device)
        mask = left_padded(30, [30, 2, 17, 16, 5][:num_rows]).to(device)
        expected = plain_tokens(model, ids, attention_mask=mask)
        steps["repeated"] = 0
        assert torch.equal(repeated_tokens(model, ids, attention_mask=mask), expected)
        assert steps["repeated"] > 15


def logits_of_steps(model, cache, ids, compute):
    """Logits of columns that are computed one by one after the first ten, rows changing places in between."""
    order = torch.tensor([1, 0, 0], device=ids.device)  # the second row becomes a copy of the first, and so on
    with torch.no_grad():
        model(ids[:, :10], past_key_values=cache)
        logits = []
        for column in range(10, ids.shape[1]):
            cache.reorder_cache(order)
            inputs = model.prepare_inputs_for_generation(
                ids[:, column : column + 1],
                past_key_values=cache,
                attention_mask=torch.ones_like(ids[:, : column + 1]),
                position_ids=torch.full_like(ids[:, :1], column),
                use_cache=True,
            )
            logits.append(compute(**inputs).logits)
    return torch.cat(logits, dim=1)


def test_rows_change_places_and_share_pages_between_repeated_steps(steps, device):
    model, ids = tiny_llama().to(device), random_ids(3, 60).to(device)
    expected = logits_of_steps(model, DynamicCache(config=model.config), ids, model)
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    with compiled(model):
        compute = model.get_compiled_call(model.generation_config.compile_config)
        actual = logits_of_steps(model, cache, ids, compute)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert steps["repeated"] > 40


def test_released_rows_are_another_step(steps, device):
    model, ids = tiny_llama().to(device), random_ids(3, 40).to(device)
    end = int(plain_tokens(model, ids)[0, 50])
    expected = plain_tokens(model, ids, eos_token_id=end)
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    with compiled(model):
        finished = [ReleaseFinished(cache, end)]
        actual = generate(model, "paged_flex", cache, ids, eos_token_id=end, stopping_criteria=finished)
    assert torch.equal(actual, expected)
    assert steps["recorded"] >= 2


def test_rows_that_share_the_pages_of_their_prompt(steps, device):
    model = tiny_llama().to(device)
    ids = random_ids(1, 20).repeat(3, 1).to(device)
    assert torch.equal(repeated_tokens(model, ids), plain_tokens(model, ids))
    assert steps["repeated"]


def test_caches_that_take_turns_keep_apart(steps, device):
    model = tiny_llama().to(device)
    prompts = [random_ids(1, length, seed=length).to(device) for length in (20, 33)]
    expected = [plain_tokens(model, ids, max_new_tokens=64) for ids in prompts]
    model.set_attn_implementation("paged_flex")
    caches = [PagedCache.from_model(model, page_size=16) for _ in prompts]
    actual = list(prompts)
    with compiled(model):
        for _ in range(8):
            for turn, cache in enumerate(caches):
                actual[turn] = generate(model, "paged_flex", cache, actual[turn], max_new_tokens=8)
    assert all(map(torch.equal, actual, expected))
    assert steps["repeated"] > 80


def test_what_is_used_least_recently_is_forgotten(steps, device, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "_MAX_RECORDINGS", 1)
    test_caches_that_take_turns_keep_apart(steps, device)


def test_weights_that_change_in_place_are_read(steps, device):
    model, ids = tiny_llama().to(device), random_ids(1, 20).to(device)
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    with compiled(model):
        first = generate(model, "paged_flex", cache, ids)
        with torch.no_grad():
            for weight in model.parameters():
                noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
                weight.add_(noise.to(device), alpha=0.1)
        cache.reset()
        second = generate(model, "paged_flex", cache, ids)
    assert not torch.equal(first, second)
    assert torch.equal(second, plain_tokens(model, ids))
    assert steps["repeated"] > 40


class Counting(torch.nn.Module):
    """Counts the passes that go through a module."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.register_buffer("num_passes", torch.zeros(1, dtype=torch.int64))

    def forward(self, hidden_states):
        self.num_passes.add_(1)
        return self.module(hidden_states)


def test_buffers_that_a_step_writes_to_are_written(steps, device):
    model, ids = tiny_llama().to(device), random_ids(1, 20).to(device)
    expected = plain_tokens(model, ids)
    model.model.norm = Counting(model.model.norm).to(device)
    assert torch.equal(repeated_tokens(model, ids), expected)
    assert model.model.norm.num_passes == 24
    assert steps["repeated"] >= 18


def test_a_step_that_cannot_be_recorded_runs_without(steps, device, monkeypatch, caplog):
    def fail(*arguments):
        raise RuntimeError("no graphs today")

    monkeypatch.setattr(cuda_graphs._Recording, "record", fail)
    model, ids = tiny_llama().to(device), random_ids(2, 20).to(device)
    expected = plain_tokens(model, ids)
    with caplog.at_level("WARNING"):
        assert torch.equal(repeated_tokens(model, ids), expected)
    assert caplog.text.count("no graphs today") == 1
    assert steps["repeated"] == 0


def test_inputs_that_never_look_the_same_are_warned_of(steps, device, caplog):
    model = tiny_llama().to(device)
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    ids = random_ids(2, 60).to(device)
    mask = torch.ones_like(ids)
    with compiled(model), torch.no_grad(), caplog.at_level("WARNING"):
        model(ids[:, :10], attention_mask=mask[:, :10], past_key_values=cache)
        compute = model.get_compiled_call(model.generation_config.compile_config)
        for column in range(10, 60):
            arguments = {"attention_mask": mask[:, : column + 1], "use_cache": True}
            positions = torch.arange(column + 1, device=device).repeat(2, 1)[:, -1:]
            new = ids[:, column : column + 1]
            inputs = model.prepare_inputs_for_generation(
                new, past_key_values=cache, position_ids=positions, **arguments
            )
            compute(**inputs)
    assert steps["repeated"] == 0
    assert caplog.text.count("make position_ids contiguous") == 1
