"""Edits of `layer.keys` and `layer.values` do what they do to a DynamicCache."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from transformers import DynamicCache, GptOssConfig, GptOssForCausalLM

from hf_paged import OutOfPagesError, PagedCache, PagePool
from tests.models import generate, left_padded, paged_cache, random_ids, run, tiny_gemma, tiny_llama, tiny_model
from tests.reference import HEAD_DIM, NUM_KV_HEADS, NUM_LAYERS, filled, forward, random_layers, tiny_config

FP32 = {"atol": 2e-4, "rtol": 1e-4}
LENGTHS = (1, 15, 16, 17, 33)


def tiny_sinks():
    return tiny_model(
        GptOssForCausalLM,
        GptOssConfig,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=12,
        layer_types=["sliding_attention", "full_attention"],
    )


MODELS = {"full": tiny_llama, "windows": lambda: tiny_gemma(12), "sinks": tiny_sinks}


# What code does to a cache. All of these leave the columns as they are.


def zeroed_by_layer(cache):
    for layer in cache.layers:
        layer.values[:, :, 3:6] = 0


def zeroed_by_iteration(cache):
    for _, values, *_ in cache:
        values[:, :, 3:6] = 0


def steered_through_views(cache):
    views = [layer.keys.transpose(1, 2)[:, -3:].flatten(2) for layer in cache.layers]
    views += [layer.values[0].unbind(0)[-1] for layer in cache.layers]
    for view in views:
        view.add_(torch.linspace(-1, 1, view.shape[-1]))


def steered_detached(cache):
    for layer in cache.layers:
        layer.values.detach().mul_(0.5)


def quantised_and_back(cache):
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            tensor.copy_(torch.round(tensor * 4) / 4)


def augmented(cache):
    for layer in cache.layers:
        layer.keys += 0.25
        layer.values *= 2


def assigned(cache):
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys * 0.5, layer.values.flip(-1)


def assigned_then_changed(cache):
    for layer in cache.layers:
        layer.values = tensor = layer.values.clone()
        tensor[:, :, :2] = 0


def only_one_layer(cache):
    cache.layers[-1].keys[:, 0, :4] = 1


def changed_twice(cache):
    layer = cache.layers[0]
    first, second = layer.values, layer.values
    first[:, :, 0] = 1
    second[:, :, -1] = 2


def under_inference_mode(cache):
    with torch.inference_mode():
        for layer in cache.layers:
            layer.keys[..., ::2].neg_()
            layer.values = layer.values + 1
            layer.values[:, :, 0] = 3


def after_other_questions(cache):
    values = [layer.values for layer in cache.layers]
    assert cache.get_seq_length() == cache.layers[0].get_seq_length() > 0
    for tensor in values:
        tensor[:, :, 1:5] = 0.5


SAME_COLUMNS = [
    zeroed_by_layer,
    zeroed_by_iteration,
    steered_through_views,
    steered_detached,
    quantised_and_back,
    augmented,
    assigned,
    assigned_then_changed,
    only_one_layer,
    changed_twice,
    under_inference_mode,
    after_other_questions,
]


def logits(model, cache, ids, first, edit, mask=None):
    """Logits of the columns behind `first`, in passes of 5 columns and of single ones, edited before each but one."""
    before = None if mask is None else mask[:, :first]
    run(model, cache, ids[:, :first], [first], before)
    found = []
    positions = torch.arange(ids.shape[1])[None] if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    start = first
    with torch.no_grad():
        for number, size in enumerate((5, 1, 1)):
            if number < 2:
                edit(cache)
            stop = start + size
            output = model(
                ids[:, start:stop],
                past_key_values=cache,
                attention_mask=None if mask is None else mask[:, :stop],
                position_ids=positions[:, start:stop],
            )
            found.append(output.logits)
            start = stop
    return torch.cat(found, dim=1)


def plain_attention(model):
    return "eager" if isinstance(model, GptOssForCausalLM) else "sdpa"


def both(model, ids, first, edit, mask=None, attention="paged_flex"):
    model.set_attn_implementation(plain_attention(model))
    expected = logits(model, DynamicCache(config=model.config), ids, first, edit, mask)
    untouched = logits(model, DynamicCache(config=model.config), ids, first, lambda cache: None, mask)
    model.set_attn_implementation(attention)
    cache = PagedCache.from_model(model, page_size=16)
    actual = logits(model, cache, ids, first, edit, mask)
    cache.pool.check_integrity()
    assert (expected - untouched).abs().max() > 1e-2  # the edit matters
    return actual, expected


@pytest.mark.parametrize(
    ("name", "edit"),
    [*(("windows", edit) for edit in SAME_COLUMNS), ("full", zeroed_by_layer), ("sinks", zeroed_by_layer)],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_an_edit_does_what_it_does_to_a_dynamic_cache(name, edit):
    actual, expected = both(MODELS[name](), random_ids(2, 30), 23, edit)
    torch.testing.assert_close(actual, expected, **FP32)


@pytest.mark.parametrize("edit", [augmented, assigned])
def test_padding_is_left_out_of_an_edit(edit):
    mask = left_padded(29, [29, 12, 20])
    actual, expected = both(tiny_gemma(12), random_ids(3, 29), 22, edit, mask)
    for row in range(3):
        torch.testing.assert_close(actual[row], expected[row], **FP32)


@pytest.mark.parametrize("length", LENGTHS)
def test_edits_at_the_edges_of_pages_are_found(length):
    def last_and_first(cache):
        for layer in cache.layers:
            layer.keys[:, :, -1] *= -1
            layer.values[:, :, 0] += 1

    actual, expected = both(tiny_llama(), random_ids(2, length + 7), length, last_and_first)
    torch.testing.assert_close(actual, expected, **FP32)


def test_edits_are_found_with_other_attention():
    actual, expected = both(tiny_gemma(12), random_ids(2, 30), 23, zeroed_by_layer, attention="sdpa")
    torch.testing.assert_close(actual, expected, **FP32)


def test_edits_in_half_precision_are_bit_for_bit_what_was_written():
    cache = PagedCache(tiny_config(), page_size=16)
    layers = [(keys.bfloat16(), values.bfloat16()) for keys, values in random_layers(2, 20, torch.Generator())]
    forward(cache, layers)
    for (keys, values), layer in zip(layers, cache.layers, strict=True):
        layer.keys = keys = keys.flip(2)
        layer.values.mul_(3)
        found = cache.gather(layer.index)
        assert torch.equal(found[0], keys)
        assert torch.equal(found[1], values * 3)


# Other rows or columns


def joined(cache):
    for layer in cache.layers:
        layer.keys = torch.cat([layer.keys, layer.keys], dim=-2)
        layer.values = torch.cat([layer.values, layer.values], dim=-2)


def evicted(cache):
    """Attention sinks and a few of the last tokens, of each head another one."""
    for layer in cache.layers:
        kept = torch.tensor([0, 1, *range(layer.keys.shape[2] - 4, layer.keys.shape[2])])
        layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]


def reversed_rows(cache):
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.flip(0), layer.values.flip(0)


def lengthened_with_a_look_at_lengths(cache):
    for layer in cache.layers:
        if layer.get_seq_length() > 2:
            layer.keys = torch.cat([layer.keys[:, :, :2], layer.keys], dim=2)
            layer.values = torch.cat([layer.values[:, :, :2], layer.values], dim=2)


@pytest.mark.parametrize("edit", [joined, evicted, reversed_rows, lengthened_with_a_look_at_lengths])
@pytest.mark.parametrize("length", [15, 16, 17])
def test_columns_come_and_go_as_in_a_dynamic_cache(edit, length):
    actual, expected = both(tiny_llama(), random_ids(2, length + 7), length, edit)
    torch.testing.assert_close(actual, expected, **FP32)


def test_rows_come_and_go_as_in_a_dynamic_cache():
    def chosen(cache):
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[[2, 0, 0, 1]], layer.values[[2, 0, 0, 1]]

    model, ids, results = tiny_llama(), random_ids(3, 19), []
    for attention, cache in (("sdpa", DynamicCache(config=model.config)), ("paged_flex", paged_cache(model))):
        model.set_attn_implementation(attention)
        run(model, cache, ids, [19])
        chosen(cache)
        assert cache.get_seq_length() == 19
        with torch.no_grad():
            results.append(model(random_ids(4, 3), past_key_values=cache).logits)
    torch.testing.assert_close(results[1], results[0], **FP32)
    assert cache.lengths == [22] * 4


def test_columns_are_evicted_from_a_padded_batch():
    """Where the mask says which of the columns that remain are padding."""
    model, ids, mask = tiny_llama(), random_ids(2, 20), left_padded(20, [20, 14])
    kept = torch.tensor([0, 5, 6, 7, 12, 13, 14, 15, 16, 17, 18, 19])
    after = torch.cat([mask[:, kept], torch.ones(2, 3, dtype=torch.long)], dim=1)
    positions = torch.tensor([[20, 21, 22], [14, 15, 16]])
    results = []
    for attention, cache in (("sdpa", DynamicCache(config=model.config)), ("paged_flex", paged_cache(model))):
        model.set_attn_implementation(attention)
        run(model, cache, ids, [20], mask)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
        with torch.no_grad():
            results.append(
                model(random_ids(2, 3), past_key_values=cache, attention_mask=after, position_ids=positions).logits
            )
    torch.testing.assert_close(results[1], results[0], **FP32)


@pytest.mark.parametrize(("name", "length"), [("full", 15), ("full", 16), ("windows", 9), ("windows", 33)])
def test_an_empty_cache_is_filled_from_another(name, length):
    model, ids = MODELS[name](), random_ids(2, length + 5)
    model.set_attn_implementation(plain_attention(model))
    other = DynamicCache(config=model.config)
    run(model, other, ids[:, :length], [length])
    expected = run(model, copy.deepcopy(other), ids[:, length:], [4, 1])
    cache = paged_cache(model)
    if name == "full":
        for layer, source in zip(cache.layers, other.layers, strict=True):
            layer.keys, layer.values = source.keys, source.values
    else:  # a window has lost its beginning
        whole = DynamicCache()
        run(model, whole, ids[:, :length], [length])
        for layer, source in zip(cache.layers, whole.layers, strict=True):
            layer.keys, layer.values = source.keys, source.values
    positions = torch.arange(length, length + 5)[None]
    with torch.no_grad():
        actual = model(ids[:, length:], past_key_values=cache, position_ids=positions).logits
    torch.testing.assert_close(actual, expected, **FP32)
    assert cache.lengths == [length + 5] * 2


def test_a_dynamic_cache_is_made_of_this_one():
    model, ids = tiny_gemma(12), random_ids(2, 14)
    cache, other = paged_cache(model), DynamicCache(config=model.config)
    run(model, cache, ids[:, :9], [9])
    made = DynamicCache(cache)
    model.set_attn_implementation(plain_attention(model))
    run(model, other, ids[:, :9], [9])
    torch.testing.assert_close(run(model, made, ids[:, 9:], [5]), run(model, other, ids[:, 9:], [5]), **FP32)
    assert made.is_sliding == other.is_sliding


def test_generate_goes_on_from_an_edited_cache():
    model, ids = tiny_llama(), random_ids(2, 20)
    results = []
    for attention, cache in (("sdpa", DynamicCache(config=model.config)), ("paged_flex", paged_cache(model))):
        model.set_attn_implementation(attention)
        run(model, cache, ids[:, :19], [19])
        augmented(cache)
        results.append(generate(model, attention, cache, ids))
    assert torch.equal(*results)


# Who else holds the pages


def contents(cache):
    return [cache.gather(layer) for layer in range(len(cache))]


def assert_equal(found, expected):
    for pair, other in zip(found, expected, strict=True):
        assert torch.equal(pair[0], other[0])
        assert torch.equal(pair[1], other[1])


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def cache():
    return PagedCache(tiny_config(), page_size=16)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("edits_fork", [True, False])
def test_a_fork_does_not_see_edits(cache, generator, length, edits_fork):
    filled(cache, generator, 2, length)
    fork = cache.fork()
    edited, other = (fork, cache) if edits_fork else (cache, fork)
    before = contents(other)
    edited.layers[1].values.add_(1)
    expected = [before[0], (before[1][0], before[1][1] + 1)]
    assert_equal(contents(edited), expected)
    assert_equal(contents(other), before)
    cache.pool.check_integrity()
    forward(edited, random_layers(2, 3, generator))
    assert_equal(contents(other), before)


def test_copies_handed_out_before_a_fork_are_those_of_the_original(cache, generator):
    filled(cache, generator, 2, 20)
    values, before = cache.layers[0].values, contents(cache)
    fork = cache.fork()
    values.zero_()
    assert cache.gather(0)[1].abs().max() == 0
    assert_equal(contents(fork), before)


def test_an_edit_goes_into_a_fork_that_is_made_afterwards(cache, generator):
    filled(cache, generator, 2, 20)
    cache.layers[0].values.zero_()
    for other in (cache.fork(), copy.deepcopy(cache)):
        assert other.gather(0)[1].abs().max() == 0
        assert other.gather(1)[1].abs().max() > 0


@pytest.mark.parametrize("length", [15, 16, 33])
def test_only_pages_that_differ_and_are_shared_are_copied(cache, generator, length):
    filled(cache, generator, 1, length)
    fork = cache.fork()
    fork.layers[0].values[:, :, -1] = 7
    fork.layers[1].keys[:, :, -1] = 7
    assert fork.stats().num_copied_pages == 1
    cache.layers[0].values[:, :, -1] = 8  # nobody else holds that page any more
    assert cache.stats().num_copied_pages == 1
    assert (fork.gather(0)[1][:, :, -1] == 7).all()
    assert (cache.gather(0)[1][:, :, -1] == 8).all()


def test_rows_that_share_pages_go_on_sharing_what_is_edited_alike(cache, generator):
    filled(cache, generator, 1, 33)
    cache.batch_repeat_interleave(4)
    before = cache.gather(0)[1]
    cache.layers[0].values[:, :, 3] = 0
    assert cache.stats().num_active_pages == 3
    cache.layers[0].values[:2, :, 20] = 1
    cache.layers[0].values[2, :, 20] = 2
    assert cache.stats().num_active_pages == 5
    found = cache.gather(0)[1]
    assert (found[:, :, 3] == 0).all()
    assert (found[:2, :, 20] == 1).all()
    assert (found[2, :, 20] == 2).all()
    assert torch.equal(found[3, :, 20:], before[3, :, 20:])
    cache.pool.check_integrity()


def test_equal_prompts_that_are_edited_apart_go_apart():
    model, ids = tiny_llama(), random_ids(1, 27).expand(3, -1)

    def apart(cache):
        for layer in cache.layers:
            layer.values[1, :, 2:4] = 0
            layer.keys[2] *= -1

    actual, expected = both(model, ids, 20, apart)
    torch.testing.assert_close(actual, expected, **FP32)


def test_beams_are_steered_as_in_a_dynamic_cache():
    model, ids = tiny_llama(), random_ids(2, 20)
    results = []
    for attention, cache in (("sdpa", DynamicCache(config=model.config)), ("paged_flex", paged_cache(model))):
        model.set_attn_implementation(attention)
        run(model, cache, ids[:, :19].repeat_interleave(3, dim=0), [19])
        zeroed_by_layer(cache)
        cache.reorder_cache(torch.tensor([1, 0, 0, 5, 4, 3]))
        cache.layers[1].keys[0, :, :3] = 0
        results.append(generate(model, attention, cache, ids, num_beams=3, max_new_tokens=8))
    assert torch.equal(*results)


@pytest.mark.parametrize("repeats", [2, 3])
def test_an_edit_goes_in_before_rows_move(cache, generator, repeats):
    filled(cache, generator, 2, 17)
    cache.layers[0].keys[1] = 4
    cache.batch_repeat_interleave(repeats)
    assert (cache.gather(0)[0][repeats:] == 4).all()
    cache.layers[0].keys[0] = 5
    cache.batch_select_indices(torch.tensor([1, 0]))
    assert (cache.gather(0)[0][1] == 5).all()
    cache.pool.check_integrity()


def test_an_edit_goes_in_before_a_crop_and_after_it(cache, generator):
    filled(cache, generator, 2, 20)
    values = cache.layers[0].values
    values[:, :, 2] = 1
    cache.crop(-3)
    values[:, :, 3] = 2  # as with DynamicCache, which goes on with a view
    found = cache.gather(0)[1]
    assert found.shape[2] == 17
    assert (found[:, :, 2] == 1).all()
    assert (found[:, :, 3] == 2).all()
    assert cache.layers[0].values.shape[2] == 17


def test_edits_after_the_cache_went_on_mean_nothing(cache, generator):
    filled(cache, generator, 2, 20)
    dynamic = DynamicCache(config=tiny_config())
    for layer, pair in enumerate(contents(cache)):
        dynamic.update(*pair, layer)
    old = [(layer.keys, other.keys) for layer, other in zip(cache.layers, dynamic.layers, strict=True)]
    new = random_layers(2, 1, generator)
    forward(cache, new)
    for layer, (keys, values) in enumerate(new):
        dynamic.update(keys, values, layer)
    for pair in old:
        for tensor in pair:
            tensor.zero_()
    for layer in range(NUM_LAYERS):
        assert torch.equal(cache.gather(layer)[0], dynamic.layers[layer].keys)


def test_edits_of_released_rows_are_left_out(cache, generator):
    filled(cache, generator, 3, 20)
    cache.release([1])
    before = cache.gather(0)[1]
    cache.layers[0].values.add_(1)
    found = cache.gather(0)[1]
    assert torch.equal(found[[0, 2]], before[[0, 2]] + 1)
    assert found[1].abs().max() == 0
    cache.pool.check_integrity()
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :5], layer.values[:, :, :5]
    assert cache.lengths == [5, 0, 5]
    layer.keys, layer.values = layer.keys[:1], layer.values[:1]
    cache.layers[0].keys, cache.layers[0].values = cache.layers[0].keys[:1], cache.layers[0].values[:1]
    with pytest.raises(ValueError, match="1 rows were assigned to a cache of 3 rows, some of them released"):
        cache.crop(0)


def test_edits_of_other_threads_are_found(cache, generator):
    filled(cache, generator, 2, 20)
    values = cache.layers[0].values
    thread = threading.Thread(target=lambda: values.fill_(3))
    thread.start()
    thread.join()
    assert (cache.gather(0)[1] == 3).all()


# What is kept


def test_reading_twice_returns_one_tensor_until_the_cache_goes_on(cache, generator):
    filled(cache, generator, 2, 20)
    layer = cache.layers[0]
    keys = layer.keys
    assert layer.keys is keys
    assert next(iter(cache))[0] is keys
    layer.keys = other = keys.clone()
    assert layer.keys is other
    assert cache.get_seq_length() == 20
    assert layer.keys is other
    forward(cache, random_layers(2, 1, generator))
    assert layer.keys.shape[2] == 21


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_copies_are_kept_no_longer_than_until_the_next_pass(cache, generator, mode):
    with mode():
        filled(cache, generator, 2, 20)
        kept = weakref.ref(cache.layers[0].keys)
        free = weakref.ref(cache.gather(0)[0])
        gc.collect()
        assert kept() is not None
        assert free() is None
        forward(cache, random_layers(2, 1, generator))
        gc.collect()
        assert kept() is None


def test_a_cache_whose_copies_were_read_is_freed_at_once(generator):
    pool = PagePool(tiny_config(), page_size=16)
    cache = PagedCache(pool=pool)
    filled(cache, generator, 2, 20)
    keys = cache.layers[0].keys
    del cache
    assert pool.stats().num_active_pages == 0
    keys.zero_()


def test_reset_drops_edits(cache, generator):
    filled(cache, generator, 2, 20)
    cache.layers[0].keys = cache.layers[0].keys[:, :, :4]
    cache.reset()
    reference = filled(cache, generator, 1, 3)
    assert cache.lengths == reference.lengths


# set


@pytest.mark.parametrize("length", LENGTHS)
def test_set_writes_what_it_is_given(cache, generator, length):
    filled(cache, generator, 2, length)
    fork = cache.fork()
    keys, values = random_layers(2, length, generator)[0]
    cache.set(1, keys, values)
    assert torch.equal(cache.gather(1)[0], keys)
    assert torch.equal(cache.gather(1)[1], values)
    assert not torch.equal(fork.gather(1)[0], keys)
    keys.zero_()  # the caller's own
    assert cache.gather(1)[0].abs().max() > 0
    cache.pool.check_integrity()


def test_set_leaves_out_padding(cache, generator):
    filled(cache, generator, 2, 20, padding=[0, 7])
    keys, values = random_layers(2, 20, generator)[0]
    cache.set(0, keys, values)
    keys[1, :, :7] = values[1, :, :7] = 0
    assert_equal([cache.gather(0)], [(keys, values)])


def test_set_of_all_layers_changes_the_columns(cache, generator):
    filled(cache, generator, 2, 20, padding=[0, 7])
    layers = random_layers(3, 33, generator)
    for layer, pair in enumerate(layers):
        cache.set(layer, *pair)
    assert_equal(contents(cache), layers)
    assert cache.lengths == [33] * 3
    cache.pool.check_integrity()


def test_set_fills_an_empty_cache(cache, generator):
    layers = random_layers(2, 17, generator)
    for layer, pair in enumerate(layers):
        cache.set(layer, *pair)
    assert_equal(contents(cache), layers)


@pytest.mark.parametrize("length", [16, 20])
def test_a_write_that_does_not_fit_changes_nothing(generator, length):
    cache = PagedCache(tiny_config(), num_pages=2, page_size=16)
    filled(cache, generator, 1, length)
    other = cache.fork()
    held = PagedCache(pool=cache.pool)
    if length == 16:
        filled(held, generator, 1, 1)
    before = contents(cache)
    with pytest.raises(OutOfPagesError):
        cache.set(0, before[0][0] + 1, before[0][1])
    assert_equal(contents(cache), before)
    cache.layers[0].keys.add_(1)
    with pytest.raises(OutOfPagesError):
        forward(cache, random_layers(1, 1, generator))
    cache.pool.check_integrity()
    other.reset()
    assert torch.equal(cache.gather(0)[0], before[0][0] + 1)
    assert cache.get_seq_length() == length


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda keys: keys.double(), r"keys of 2 heads of 8 in torch.float64 .* holds 2 heads of 8 in torch.float32"),
        (lambda keys: keys[:, :1], "keys of 1 heads of 8 .* holds 2 heads of 8"),
        (lambda keys: keys[..., :4], "keys of 2 heads of 4 .* holds 2 heads of 8"),
        (lambda keys: keys[0], r"given a tensor \(2, 20, 8\) for its keys. Give a tensor \(num_rows"),
        (lambda keys: keys[:, :, :0], r"given a tensor \(2, 2, 0, 8\) for its keys.*call cache.reset\(\)"),
        (lambda keys: None, "given None for its keys"),
        (lambda keys: keys.clone().requires_grad_(), "keys that require gradients"),
        (lambda keys: keys.to("meta"), "on meta, but this cache holds"),
    ],
)
def test_what_can_not_be_keys_is_refused_at_once(cache, generator, change, message):
    filled(cache, generator, 2, 20)
    before = contents(cache)
    with pytest.raises(ValueError, match=message):
        cache.layers[0].keys = change(cache.layers[0].keys)
    if change(before[0][0]) is not None:
        with pytest.raises(ValueError, match=message):
            cache.set(0, change(before[0][0]), before[0][1])
    assert_equal(contents(cache), before)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            "keys",
            "Keys or values of 2 rows and 5 columns were .* layer 0 has values of 2 rows and 20 columns, layer 1",
        ),
        ("both", "Keys or values of 2 rows and 5 columns were assigned to some layers .* layer 1 has what it had"),
    ],
)
def test_other_columns_in_some_layers_only_are_refused(cache, generator, edit, message):
    filled(cache, generator, 2, 20)
    layer = cache.layers[0]
    layer.keys = layer.keys[:, :, :5]
    if edit == "both":
        layer.values = layer.values[:, :, :5]
    assert layer.get_seq_length() == 5
    assert cache.layers[1].get_seq_length() == 20
    for use in (
        lambda: forward(cache, random_layers(2, 1, generator)),
        lambda: cache.crop(-1),
        lambda: cache.fork(),
        lambda: cache.reorder_cache(torch.tensor([1, 0])),
        lambda: cache.gather(1),
        lambda: cache.lengths,
    ):
        with pytest.raises(ValueError, match=message):
            use()
    layer.values = layer.values[:, :, :5]
    cache.layers[1].keys, cache.layers[1].values = cache.layers[1].keys[:, :, :5], cache.layers[1].values[:, :, :5]
    assert cache.lengths == [5, 5]


def test_an_empty_cache_that_was_filled_in_part_is_refused(cache, generator):
    cache.layers[0].keys = random_layers(2, 5, generator)[0][0]
    with pytest.raises(ValueError, match="layer 0 has no values, layer 1 has what it had"):
        forward(cache, random_layers(2, 1, generator))


def test_set_refuses_what_is_not_there(cache, generator):
    filled(cache, generator, 2, 20)
    keys, values = random_layers(2, 20, generator)[0]
    with pytest.raises(ValueError, match=r"Layer 5 stores no keys and values; those that do: \[0, 1\]"):
        cache.set(5, keys, values)
    with pytest.raises(ValueError, match="given values of shape"):
        cache.set(0, keys, values[:, :, :3])


def test_changes_within_a_pass_are_refused(cache, generator):
    filled(cache, generator, 2, 20)
    before = contents(cache)
    new = random_layers(2, 1, generator)
    cache.get_mask_sizes(1, 0)
    cache.update(*new[0], 0)
    for change in (
        lambda: setattr(cache.layers[1], "keys", before[1][0]),
        lambda: cache.set(1, *before[1]),
    ):
        with pytest.raises(ValueError, match="layer 1 were changed while a forward pass was under way"):
            change()
    cache.layers[1].keys.zero_()
    with pytest.raises(ValueError, match="layer 1 were changed while a forward pass was under way"):
        cache.update(*new[1], 1)
    cache.crop(0)
    assert cache.gather(1)[0].abs().max() == 0
    forward(cache, new)
    assert cache.get_seq_length() == 21
    assert cache.gather(0)[0].shape[1::2] == (NUM_KV_HEADS, HEAD_DIM)


@pytest.mark.parametrize("num_cached", [0, 20])
def test_compressing_a_layer_within_the_pass_that_writes_it_is_refused(num_cached):
    model = tiny_llama()
    cache = paged_cache(model)
    if num_cached:
        run(model, cache, random_ids(2, num_cached), [num_cached])

    def compress(module, args, output):
        layer = cache.layers[module.layer_idx]
        layer.keys, layer.values = layer.keys[:, :, ::2], layer.values[:, :, ::2]

    hook = model.model.layers[0].self_attn.register_forward_hook(compress)
    with pytest.raises(ValueError, match="layer 0 were read in the middle of the forward pass that has written them"):
        run(model, cache, random_ids(2, 20), [20])
    hook.remove()
    cache.roll_back()
    assert cache.get_seq_length() == num_cached
    run(model, cache, random_ids(2, 20), [20])
    assert cache.get_seq_length() == num_cached + 20
