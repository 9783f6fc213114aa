"""Decoding steps of one row on a CPU that are repeated give the same tokens, whatever changes between two of them."""

import threading
import weakref

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from hf_paged import OutOfPagesError, PagedCache
from hf_paged.batch.sequences import Sequences
from hf_paged.compile.api import compiled
from hf_paged.compile.cpu_replay import StepReplay
from tests.models import generate, plain_tokens, random_ids, tiny_llama, tiny_model

NUM_LAYERS = 3


@pytest.fixture
def repeated(monkeypatch):
    """Names of the threads that repeated a step, one for each time."""
    threads = []
    repeat = StepReplay._replay

    def counted(wrapper, inputs):
        threads.append(threading.current_thread().name)
        return repeat(wrapper, inputs)

    monkeypatch.setattr(StepReplay, "_replay", staticmethod(counted))
    return threads


@pytest.fixture(scope="module")
def llama():
    """A model whose step for one row is compiled and recorded."""
    model = tiny_llama(num_layers=NUM_LAYERS)
    model.set_attn_implementation("paged_flex")
    with compiled(model):
        paged_tokens(model, random_ids(1, 5))
        yield model


def paged_tokens(model, ids, **arguments):
    cache = PagedCache.from_model(model, page_size=16)
    tokens = generate(model, "paged_flex", cache, ids, **arguments)
    cache.pool.check_integrity()
    return tokens


@pytest.fixture(scope="module")
def reference():
    return tiny_llama(num_layers=NUM_LAYERS)


@pytest.mark.parametrize("length", [1, 30])
def test_every_step_is_repeated(length, llama, reference, repeated):
    ids = random_ids(1, length)
    tokens = paged_tokens(llama, ids, max_new_tokens=300)  # over the ends of pages, and while the pool grows
    assert torch.equal(tokens, plain_tokens(reference, ids, max_new_tokens=300))
    assert len(repeated) == 299


def test_another_mode_finds_the_buffers_writable(llama, reference):
    ids = random_ids(1, 20)
    expected = plain_tokens(reference, ids)
    torch._dynamo.reset()  # the next step is recorded
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(paged_tokens(llama, ids), expected)


def test_nothing_of_a_cache_is_held(llama, repeated):
    cache = PagedCache.from_model(llama, page_size=16)
    logits = generate(
        llama, "paged_flex", cache, random_ids(1, 20), output_logits=True, return_dict_in_generate=True
    ).logits
    ends = weakref.ref(cache.pool), weakref.ref(cache.pool.storage(0).keys), weakref.ref(logits[-1])
    assert repeated
    del cache, logits
    assert [end() for end in ends] == [None] * 3


def test_weights_may_change(llama, reference, repeated):
    ids = random_ids(1, 20)
    before = plain_tokens(reference, ids)
    kept = {name: weight.clone() for name, weight in llama.state_dict().items()}
    with torch.no_grad():
        for model in (llama, reference):
            model.model.layers[1].mlp.down_proj.weight.mul_(-1)  # where it is
            model.model.layers[0].self_attn.q_proj.weight = torch.nn.Parameter(  # and somewhere else
                -model.model.layers[0].self_attn.q_proj.weight
            )
    expected = plain_tokens(reference, ids)
    assert not torch.equal(expected, before)
    assert torch.equal(paged_tokens(llama, ids), expected)
    assert repeated
    for model in (llama, reference):
        model.load_state_dict(kept)
    assert torch.equal(paged_tokens(llama, ids), before)


def test_a_full_pool_raises_and_the_next_cache_works(llama, reference, repeated):
    ids = random_ids(1, 20)
    cache = PagedCache.from_model(llama, page_size=16, num_pages=3)
    with pytest.raises(OutOfPagesError):
        generate(llama, "paged_flex", cache, ids, max_new_tokens=60)
    assert cache.lengths == [48]
    del repeated[:]
    assert torch.equal(paged_tokens(llama, ids), plain_tokens(reference, ids))
    assert len(repeated) == 23


def test_a_step_that_fails_between_layers_leaves_nothing_behind(llama, reference, repeated, monkeypatch):
    ids = random_ids(1, 20)
    expected = plain_tokens(reference, ids)
    cache = PagedCache.from_model(llama, page_size=16)
    generate(llama, "paged_flex", cache, ids, max_new_tokens=8)
    write = Sequences.write

    def fail(sequences, layer, *states):
        if layer == 1:
            raise KeyboardInterrupt
        return write(sequences, layer, *states)

    with monkeypatch.context() as context:
        context.setattr(Sequences, "write", fail)
        with pytest.raises(KeyboardInterrupt):
            generate(llama, "paged_flex", cache, expected[:, :28], max_new_tokens=2)
    cache.roll_back()
    rest = generate(llama, "paged_flex", cache, expected[:, :28], max_new_tokens=16)
    assert torch.equal(rest, expected)


def test_a_thread_that_comes_while_another_one_repeats_does_not_share_its_buffers(
    llama, reference, repeated, monkeypatch
):
    prompts, results = [random_ids(1, 20), random_ids(1, 25, seed=1)], []
    expected = [plain_tokens(reference, ids) for ids in prompts]
    is_between_layers, may_go_on = threading.Event(), threading.Event()
    write = Sequences.write

    def wait_once(sequences, layer, *states):
        written = write(sequences, layer, *states)
        if layer == 1 and repeated and not is_between_layers.is_set():
            is_between_layers.set()
            assert may_go_on.wait(timeout=60)
        return written

    monkeypatch.setattr(Sequences, "write", wait_once)
    other = threading.Thread(target=lambda: results.append(paged_tokens(llama, prompts[1])), name="other")
    other.start()
    assert is_between_layers.wait(timeout=60)
    assert torch.equal(paged_tokens(llama, prompts[0]), expected[0])
    assert repeated == ["other"]
    may_go_on.set()
    other.join()
    assert torch.equal(results[0], expected[1])
    assert repeated == ["other"] * 23


def test_a_hook_stops_a_step_from_being_repeated(llama, reference, repeated):
    ids = random_ids(1, 20)
    before = plain_tokens(reference, ids)
    hooks = [
        model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: -output)
        for model in (llama, reference)
    ]
    expected = plain_tokens(reference, ids)
    assert not torch.equal(expected, before)
    assert torch.equal(paged_tokens(llama, ids), expected)
    for hook in hooks:
        hook.remove()
    del repeated[:]
    assert torch.equal(paged_tokens(llama, ids), before)
    assert len(repeated) == 23


@pytest.mark.parametrize(
    ("family", "is_repeated"),
    [
        ((Gemma2ForCausalLM, Gemma2Config, {"sliding_window": 20, "query_pre_attn_scalar": 16}), True),
        (
            (GPT2LMHeadModel, GPT2Config, {"num_attention_heads": 3}),
            False,
        ),  # products by MKL
    ],
)
def test_families(family, is_repeated, repeated):
    *kind, changes = family
    model, ids = tiny_model(*kind, **changes), random_ids(1, 30)
    model.set_attn_implementation("paged_flex")
    with compiled(model):
        tokens = paged_tokens(model, ids)
    assert torch.equal(tokens, plain_tokens(tiny_model(*kind, **changes), ids))
    assert bool(repeated) == is_repeated
