"""Layers that are written after another one like them, one token in each row, on a CPU."""

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from hf_paged import PagedCache
from hf_paged.attention.mask import paged_flex_mask
from hf_paged.batch.steps import decode_writer
from hf_paged.batch.steps.decode_writer import DecodeWriter
from tests.models import plain, random_ids, run, tiny_llama, tiny_model

FP32 = {"atol": 2e-4, "rtol": 1e-4}


def states(num_rows, num_new=1, dtype=torch.float32, seed=0):
    """Keys and values, in the memory layout that models give them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, num_rows, num_new, 2, 16)
    return tuple(torch.randn(shape, generator=generator).to(dtype).transpose(2, 3))


@pytest.fixture
def begin_step():
    """Reserve a step, as a model does; it holds the mask until its pass is over."""
    masks = []

    def begin(cache, num_rows):
        length, _ = cache.get_mask_sizes(1, 0)
        masks.append(paged_flex_mask(num_rows, 1, length, config=cache.pool.config))

    return begin


def prefilled(num_rows, dtype=torch.float32, num_layers=4):
    cache = PagedCache(tiny_llama(num_layers=num_layers).config, page_size=16)
    for layer in range(num_layers):
        cache.update(*states(num_rows, 20, dtype), layer)
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_every_layer_holds_what_it_was_given(num_rows, dtype, begin_step):
    cache = prefilled(num_rows, dtype)
    expected = [cache.layers[layer].keys for layer in range(4)], [cache.layers[layer].values for layer in range(4)]
    for seed in range(14):  # over the end of a page
        begin_step(cache, num_rows)
        for layer in range(4):
            given = states(num_rows, 1, dtype, seed=100 * layer + seed)
            returned = cache.update(*given, layer)
            assert returned == cache.pool.storage(layer).tensors
            for kind in (0, 1):
                expected[kind][layer] = torch.cat([expected[kind][layer], given[kind]], dim=2)
    for layer in range(4):
        assert torch.equal(cache.layers[layer].keys, expected[0][layer])
        assert torch.equal(cache.layers[layer].values, expected[1][layer])
    assert cache.lengths == [34] * num_rows


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda keys: keys.double(), "values in torch.float32 on cpu, but keys in torch.float64"),
        (lambda keys: keys.to("meta"), "values in torch.float32 on cpu, but keys in torch.float32 on meta"),
        (lambda keys: keys[:, :1], "Layer 2 was given key heads and head size"),
        (lambda keys: keys.expand(-1, -1, 2, -1), "Layer 2 was given values of shape"),
    ],
)
def test_a_layer_that_does_not_fit_raises_and_the_step_is_rolled_back(changed, message, begin_step):
    cache = prefilled(3)
    begin_step(cache, 3)
    for layer in range(2):
        cache.update(*states(3, seed=layer), layer)
    keys, values = states(3, seed=2)
    before = [tensor.clone() for tensor in cache.pool.storage(2).tensors]
    with pytest.raises(ValueError, match=message):
        cache.update(changed(keys), values, 2)
    assert all(torch.equal(*pair) for pair in zip(cache.pool.storage(2).tensors, before, strict=True))
    assert cache.lengths == [20, 20, 20]
    begin_step(cache, 3)
    for layer in range(4):
        cache.update(*states(3, seed=layer), layer)
    assert cache.lengths == [21, 21, 21]
    assert torch.equal(cache.layers[2].keys[:, :, -1:], keys)


def test_a_layer_that_is_written_twice_raises(begin_step):
    cache = prefilled(1)
    begin_step(cache, 1)
    for layer in range(2):
        cache.update(*states(1), layer)
    with pytest.raises(
        ValueError, match=r"Layer 1 was updated twice in one forward pass, but layers \[2, 3\] not yet"
    ):
        cache.update(*states(1), 1)


def test_a_step_that_was_given_up_leaves_nothing_to_the_next():
    model = tiny_llama(num_layers=4)
    ids = random_ids(1, 40)
    expected = plain(model, ids, [20] + [1] * 20)
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    first = run(model, cache, ids[:, :30], [20] + [1] * 10)

    def fail(*args):
        raise KeyboardInterrupt

    hook = model.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        run(model, cache, ids[:, :1], [1])
    hook.remove()
    cache.roll_back()
    second = run(model, cache, ids[:, 30:], [1] * 10)
    torch.testing.assert_close(torch.cat([first, second], dim=1), expected, **FP32)


def test_groups_of_layers_that_take_turns_have_one_each(monkeypatch):
    made = []

    class Counted(DecodeWriter):
        def __init__(self, step, group, *others):
            made.append(group)
            super().__init__(step, group, *others)

    monkeypatch.setattr(decode_writer, "DecodeWriter", Counted)
    kinds = ["sliding_attention", "full_attention"] * 2
    sizes = {"num_hidden_layers": 4, "layer_types": kinds, "query_pre_attn_scalar": 16}
    model = tiny_model(Gemma3ForCausalLM, Gemma3TextConfig, sliding_window=24, **sizes)
    ids, splits = random_ids(2, 30), [20] + [1] * 10
    expected = plain(model, ids, splits)
    model.set_attn_implementation("paged_flex")
    actual = run(model, PagedCache.from_model(model, page_size=16), ids, splits)
    torch.testing.assert_close(actual, expected, **FP32)
    assert made == [0, 1] * 10


def test_tensors_that_require_gradients_are_written_without_them(begin_step):
    cache = prefilled(1)
    begin_step(cache, 1)
    with torch.no_grad():
        for layer in range(4):
            keys, values = (tensor.clone().requires_grad_() for tensor in states(1, seed=layer))
            cache.update(keys, values, layer)
    assert torch.equal(cache.layers[3].keys[:, :, -1:], states(1, seed=3)[0])
