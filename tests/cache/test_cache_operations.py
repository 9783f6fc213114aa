import copy
import gc

import pytest
import torch
from transformers import Cache, DynamicCache, LlamaForCausalLM

from hf_paged import OutOfPagesError, PagedCache, PagePool
from hf_paged.attention.mask import paged_flex_mask
from hf_paged.errors import UnclearPassError
from tests.reference import (
    EDGES,
    HEAD_DIM,
    NUM_KV_HEADS,
    NUM_LAYERS,
    ReferenceCache,
    assert_same,
    count_holders,
    filled,
    forward,
    random_layers,
    table_of,
    tiny_config,
)

pytestmark = pytest.mark.usefixtures("quick_collection")


@pytest.fixture
def cache():
    return PagedCache(tiny_config(), page_size=16)


def extend(cache, reference, num_new, generator):
    """One forward pass on the cache and on the reference, padding as before and none added."""
    num_rows = max(cache.batch_size, 1)
    layers = random_layers(num_rows, num_new, generator, len(cache))
    has_padding = any(0 in row for row in reference.mask)
    forward(cache, layers, [row + [1] * num_new for row in reference.mask] if has_padding else None)
    reference.append(layers)


def plan(cache, num_rows, num_new, attention_mask):
    """Plan a forward pass as the mask function does: the length is all that it has of the cache."""
    kv_length, _ = cache.get_mask_sizes(num_new, 0)
    return kv_length.sequences.reserve(num_rows, num_new, attention_mask)


def assert_layers_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# Appending


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize(
    "chunks",
    [[1], [15, 1, 1], [16, 1], [17, 16, 15], [5, 27, 1, 33], [1] * 40],
    ids=lambda chunks: "+".join(map(str, chunks[:5])),
)
def test_update_returns_what_dynamic_cache_returns(cache, generator, num_rows, chunks):
    dynamic = DynamicCache()
    for num_new in chunks:
        layers = random_layers(num_rows, num_new, generator)
        assert_layers_equal(forward(cache, layers), forward(dynamic, layers))
        assert cache.get_seq_length() == dynamic.get_seq_length()
        assert cache.get_mask_sizes(7, 0) == dynamic.get_mask_sizes(7, 0)
    assert_layers_equal(
        [cache.gather(layer) for layer in range(NUM_LAYERS)], [(layer.keys, layer.values) for layer in dynamic.layers]
    )
    cache.pool.check_integrity()


@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256])
def test_every_page_size_holds_the_same(generator, page_size):
    cache = PagedCache(tiny_config(), page_size=page_size)
    reference = filled(cache, generator, 2, page_size - 1)
    for num_new in (1, 1, page_size):
        extend(cache, reference, num_new, generator)
        assert_same(cache, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_dtype_is_held_as_it_came(cache, generator, dtype):
    layers = [(keys.to(dtype), values.to(dtype)) for keys, values in random_layers(2, 17, generator)]
    forward(cache, layers)
    assert_layers_equal([cache.gather(layer) for layer in range(NUM_LAYERS)], layers)
    assert cache.gather(0)[0].dtype == dtype


@pytest.mark.parametrize("padding", [[0, 3], [1, 0], [0, 17], [16, 2, 0], [19, 0]])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_stored_and_reads_as_zero(cache, generator, padding, side):
    num_rows, num_tokens = len(padding), 20
    layers = random_layers(num_rows, num_tokens, generator)
    mask = [[0] * count + [1] * (num_tokens - count) for count in padding]
    if side == "right":
        mask = [row[::-1] for row in mask]
    reference = ReferenceCache()
    returned = forward(cache, layers, mask)
    reference.append(layers, mask)
    assert_layers_equal(returned, [reference.dense(layer) for layer in range(NUM_LAYERS)])
    for num_new in (1, 15, 17):
        extend(cache, reference, num_new, generator)
        assert_same(cache, reference)
    assert cache.pool.groups[0].allocator.num_active == sum(-(-length // 16) for length in reference.lengths)
    cache.pool.check_integrity()


def test_new_columns_may_have_padding_too(cache, generator):
    reference = filled(cache, generator, 3, 15, padding=[0, 4, 15])
    layers = random_layers(3, 3, generator)
    new = [[0, 1, 0], [1, 1, 1], [0, 0, 1]]
    mask = [old + added for old, added in zip(reference.mask, new, strict=True)]
    returned = forward(cache, layers, mask)
    reference.append(layers, new)
    assert_layers_equal(returned, [reference.dense(layer) for layer in range(NUM_LAYERS)])
    assert_same(cache, reference)


def test_hiding_a_stored_token_does_not_remove_it(cache, generator):
    reference = filled(cache, generator, 2, 5)
    layers = random_layers(2, 1, generator)
    forward(cache, layers, [[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    reference.append(layers)
    assert_same(cache, reference)


def test_a_batch_of_nothing_but_padding_can_be_held(cache, generator):
    reference = filled(cache, generator, 2, 3, padding=[3, 3])
    assert_same(cache, reference)
    assert cache.pool.groups[0].allocator.num_active == 0


def test_a_row_left_with_nothing_but_padding_can_be_read_after_trimming(cache, generator):
    reference = filled(cache, generator, 2, 3, padding=[0, 2])
    cache.crop(-1)
    reference.crop(1)
    cache.pool.trim()
    assert_same(cache, reference)


@pytest.mark.parametrize("which", ["both", "keys", "values"])
def test_keys_or_values_that_need_gradients_are_refused(cache, generator, which):
    layers = random_layers(1, 3, generator)
    keys, values = layers[0]
    keys.requires_grad_(which != "values")
    values.requires_grad_(which != "keys")
    with pytest.raises(ValueError, match=r"can't be differentiated. Run the model under torch.no_grad\(\)"):
        cache.update(keys, values, 0)
    assert (cache.get_seq_length(), cache.pool.num_pages) == (0, 0)
    with torch.no_grad():
        forward(cache, layers)
    assert cache.get_seq_length() == 3
    assert not cache.gather(0)[0].requires_grad


def test_a_cache_filled_under_inference_mode_works_outside_of_it(cache, generator):
    with torch.inference_mode():
        reference = filled(cache, generator, 2, 20)
    extend(cache, reference, 20, generator)
    fork = cache.fork()
    with torch.inference_mode():
        fork.crop(-3)
    expected = reference.fork()
    expected.crop(3)
    extend(fork, expected, 16 * 20, generator)
    assert_same(cache, reference)
    assert_same(fork, expected)


# What does not fit


def broken(layers, layer, change):
    return [change(*pair) if index == layer else pair for index, pair in enumerate(layers)]


def one_more_row(keys, values):
    return torch.cat([keys, keys[:1]]), torch.cat([values, values[:1]])


def one_more_head(keys, values):
    return torch.cat([keys, keys[:, :1]], dim=1), torch.cat([values, values[:, :1]], dim=1)


def half_the_head_size(keys, values):
    return keys[..., : HEAD_DIM // 2], values[..., : HEAD_DIM // 2]


def another_dtype(keys, values):
    return keys.double(), values.double()


def another_value_dtype(keys, values):
    return keys, values.double()


def one_more_value(keys, values):
    return keys, torch.cat([values, values[:, :, :1]], dim=2)


def one_more_value_row(keys, values):
    return keys, torch.cat([values, values[:1]])


MISFITS = [
    (one_more_row, r"(holds 2 rows, but a batch of 3|given \d+ tokens in 3 rows)"),
    (one_more_head, r"Layer \d was given key heads and head size \(3, 8\), but this cache holds \(2, 8\)"),
    (half_the_head_size, r"Layer \d was given key heads and head size \(2, 4\), but this cache holds \(2, 8\)"),
    (another_dtype, r"Layer \d was given dtype torch.float64, but this cache holds torch.float32"),
    (another_value_dtype, r"Layer \d was given values in torch.float64 on cpu, but keys in torch.float32"),
    (one_more_value, "values"),
    (one_more_value_row, "values"),
]


@pytest.mark.parametrize(("change", "message"), MISFITS, ids=[change.__name__ for change, _ in MISFITS])
@pytest.mark.parametrize("layer", [0, 1])
def test_what_does_not_fit_is_refused_and_the_cache_goes_on(cache, generator, change, message, layer):
    reference = filled(cache, generator, 2, 15)
    with pytest.raises(ValueError, match=message):
        forward(cache, broken(random_layers(2, 3, generator), layer, change))
    assert_same(cache, reference)
    extend(cache, reference, 3, generator)
    assert_same(cache, reference)
    cache.pool.check_integrity()


@pytest.mark.parametrize("change", [another_value_dtype, one_more_value, one_more_value_row])
def test_first_keys_and_values_that_do_not_fit_together_are_refused(cache, generator, change):
    with pytest.raises(ValueError, match="values"):
        forward(cache, broken(random_layers(2, 3, generator), 0, change))
    reference = filled(cache, generator, 1, 5)
    assert_same(cache, reference)


@pytest.mark.parametrize("num_new", [1, 4])
def test_layers_of_one_pass_must_be_given_as_many_tokens(cache, generator, num_new):
    reference = filled(cache, generator, 2, 15)
    cache.update(*random_layers(2, 3, generator)[0], 0)
    with pytest.raises(ValueError, match=f"Layer 1 was given {num_new} tokens in 2 rows, but .* reserved for"):
        cache.update(*random_layers(2, num_new, generator)[1], 1)
    assert_same(cache, reference)


def test_updating_a_layer_twice_in_one_pass_is_refused():
    cache = PagedCache(tiny_config(num_hidden_layers=3), page_size=16)
    generator = torch.Generator().manual_seed(0)
    reference = filled(cache, generator, 2, 15)
    layers = random_layers(2, 3, generator)
    cache.update(*layers[0], 0)
    with pytest.raises(ValueError, match=r"Layer 0 was updated twice .* pass, but layers \[1, 2\] not yet"):
        cache.update(*layers[0], 0)
    cache.roll_back()
    assert_same(cache, reference)
    extend(cache, reference, 3, generator)
    assert_same(cache, reference)


def test_a_pass_without_tokens_is_refused(cache, generator):
    reference = filled(cache, generator, 2, 15)
    with pytest.raises(ValueError, match="needs at least one new token, but was given 0"):
        forward(cache, random_layers(2, 0, generator))
    extend(cache, reference, 1, generator)
    assert_same(cache, reference)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 1, None), "holds a batch with padding, so attention_mask is needed"),
        ((2, 1, torch.ones(2, 5)), r"attention_mask has shape \(2, 5\), but 2 rows with 5 cached and 1 new"),
        ((2, 1, torch.ones(2, 6)), "wants a token in row 1, column 0, but that column was padding"),
        ((3, 1, torch.ones(3, 6)), "holds 2 rows, but a batch of 3 was given"),
        ((2, 0, torch.ones(2, 5)), "at least one new token, but was given 0"),
    ],
    ids=["no mask", "shape", "unstored token", "rows", "nothing"],
)
def test_a_plan_that_does_not_fit_is_refused_and_changes_nothing(cache, generator, arguments, message):
    reference = filled(cache, generator, 2, 5, padding=[0, 2])
    with pytest.raises(ValueError, match=message):
        plan(cache, *arguments)
    extend(cache, reference, 1, generator)
    assert_same(cache, reference)


# Passes that fail


@pytest.mark.parametrize("num_written", [0, 1, 2], ids=lambda count: f"{count} layers")
@pytest.mark.parametrize("num_failed", [1, 17], ids=lambda count: f"{count} tokens")
@pytest.mark.parametrize("num_held", [0, 15, 16])
def test_a_pass_that_fails_loses_nothing_and_keeps_no_page(num_written, num_failed, num_held):
    cache = PagedCache(tiny_config(num_hidden_layers=3), page_size=16)
    generator = torch.Generator().manual_seed(0)
    reference = filled(cache, generator, 2, num_held) if num_held else ReferenceCache()
    num_active = cache.pool.groups[0].allocator.num_active
    failed = random_layers(2, num_failed, generator, 3)
    plan(cache, 2, num_failed, None)
    for layer in range(num_written):
        cache.update(*failed[layer], layer)
    assert_same(cache, reference)
    cache.roll_back()
    assert cache.pool.groups[0].allocator.num_active == num_active
    assert_same(cache, reference)
    layers = random_layers(2, 3, generator, 3)
    forward(cache, layers)
    reference.append(layers)
    assert_same(cache, reference)
    cache.pool.check_integrity()


@pytest.mark.parametrize("num_written", [0, 1, 2], ids=lambda count: f"{count} layers")
@pytest.mark.parametrize("num_next", [3, 1], ids=["same length", "other length"])
def test_the_pass_after_one_that_stopped_is_refused_until_it_is_rolled_back(num_written, num_next):
    cache = PagedCache(tiny_config(num_hidden_layers=3), page_size=16)
    generator = torch.Generator().manual_seed(0)
    reference = filled(cache, generator, 2, 15)
    failed = random_layers(2, 3, generator, 3)
    plan(cache, 2, 3, None)
    for layer in range(num_written):
        cache.update(*failed[layer], layer)
    if num_written:
        for _ in range(2):
            with pytest.raises(UnclearPassError, match=rf"through layer {num_written - 1} and .*cache.roll_back\(\)"):
                plan(cache, 2, num_next, None)
        assert_same(cache, reference)
        cache.roll_back()
    extend(cache, reference, num_next, generator)
    assert_same(cache, reference)
    cache.pool.check_integrity()


@pytest.mark.parametrize("num_failed", [3, 1])
def test_a_model_whose_pass_failed_goes_on_from_where_it_was(num_failed):
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(attn_implementation="sdpa")).eval()
    input_ids = torch.randint(0, 64, (2, 20))

    def fail(*arguments):
        raise RuntimeError("out of memory")

    cache = PagedCache.from_model(model, page_size=16)
    with torch.no_grad():
        expected = model(input_ids, use_cache=False).logits[:, 17:]
        model(input_ids[:, :17], past_key_values=cache)
        hook = model.model.layers[0].mlp.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(input_ids[:, 17 : 17 + num_failed], past_key_values=cache)
        hook.remove()
        cache.roll_back()
        logits = model(input_ids[:, 17:], past_key_values=cache).logits
    torch.testing.assert_close(logits, expected)


def test_a_failure_inside_a_layer_loses_nothing(cache, generator, monkeypatch):
    reference = filled(cache, generator, 2, 15)

    def fail(*arguments):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(cache.pool.storage(1), "write", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            forward(cache, random_layers(2, 17, generator))
    assert_same(cache, reference)
    extend(cache, reference, 3, generator)
    assert_same(cache, reference)
    cache.pool.check_integrity()


@pytest.mark.parametrize(
    "operation",
    [
        lambda cache: cache.crop(-3),
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.batch_select_indices(torch.tensor([1])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.fork(),
    ],
    ids=["crop", "reorder", "select", "repeat", "fork"],
)
def test_an_operation_after_a_failed_pass_does_not_see_its_tokens(generator, operation):
    results, num_pages = [], []
    for has_failed in (False, True):
        cache = PagedCache(tiny_config(), page_size=16)
        filled(cache, generator.manual_seed(0), 2, 15)
        if has_failed:
            cache.update(*random_layers(2, 17, generator)[0], 0)
            with pytest.raises(UnclearPassError, match=r"If that pass failed, call cache.roll_back\(\)"):
                operation(cache)
            cache.roll_back()
        returned = operation(cache)
        result = cache if returned is None else returned
        results.append([result.gather(layer) for layer in range(NUM_LAYERS)])
        num_pages.append((cache.pool.groups[0].allocator.num_active, cache.pool.groups[0].allocator.num_shared))
        cache.pool.check_integrity()
    assert_layers_equal(*results)
    assert num_pages[0] == num_pages[1]


@pytest.mark.parametrize("operation", [PagedCache.roll_back, PagedCache.reset], ids=["roll back", "reset"])
def test_a_first_pass_that_failed_leaves_an_empty_cache(cache, generator, operation):
    cache.update(*random_layers(2, 17, generator)[0], 0)
    operation(cache)
    assert (cache.batch_size, cache.lengths, cache.pool.groups[0].allocator.num_active) == (-1, [], 0)
    assert_same(cache, filled(cache, generator, 3, 5))


def test_planning_again_for_the_same_tokens_gives_the_same_plan(cache):
    step = plan(cache, 2, 3, None)
    assert plan(cache, 2, 3, None) is step
    assert plan(cache, 2, 3, torch.ones(2, 3)) is step
    assert not step.is_cancelled


def test_planning_for_other_tokens_gives_the_first_plan_up(cache):
    first = plan(cache, 2, 33, torch.tensor([[1] * 33, [0] + [1] * 32]))
    second = plan(cache, 2, 4, torch.tensor([[1] * 4, [0] + [1] * 3]))
    assert (first.is_cancelled, second.is_cancelled) == (True, False)
    assert cache.pool.groups[0].allocator.num_active == 2
    plan(cache, 3, 4, torch.tensor([[1] * 4, [0] + [1] * 3, [0, 0, 1, 1]]))
    assert cache.pool.groups[0].allocator.num_active == 3
    cache.crop(0)
    assert cache.pool.groups[0].allocator.num_active == 0


# Running out of pages


@pytest.mark.parametrize("let_go", ["reset", "crop", "delete"])
def test_running_out_of_pages_changes_nothing_and_ends_when_another_cache_frees_some(generator, let_go):
    pool = PagePool(tiny_config(), num_pages=4, page_size=16)
    cache, other = PagedCache(pool=pool), PagedCache(pool=pool)
    reference = filled(cache, generator, 1, 32)
    filled(other, generator, 1, 17)
    assert (cache.get_seq_length(), other.get_seq_length()) == (32, 17)
    before = pool.stats()
    layers = random_layers(1, 1, generator)
    with pytest.raises(OutOfPagesError, match="needs 1 more pages, but 0 of 4 are free"):
        forward(cache, layers)
    assert pool.stats() == before
    assert_same(cache, reference)
    if let_go == "reset":
        other.reset()
    elif let_go == "crop":
        other.crop(-1)
    else:
        del other
        gc.collect()
    forward(cache, layers)
    reference.append(layers)
    assert_same(cache, reference)
    pool.check_integrity()


def test_a_prompt_that_is_too_long_leaves_an_empty_cache(generator):
    cache = PagedCache(tiny_config(), num_pages=2, page_size=16)
    with pytest.raises(OutOfPagesError, match="needs 3 more pages, but 2 of 2 are free"):
        forward(cache, random_layers(1, 33, generator))
    assert (cache.batch_size, cache.get_seq_length(), cache.pool.groups[0].allocator.num_active) == (-1, 0, 0)
    assert_same(cache, filled(cache, generator, 2, 16))


def test_a_full_pool_still_takes_tokens_into_partial_pages(generator):
    cache = PagedCache(tiny_config(), num_pages=2, page_size=16)
    reference = filled(cache, generator, 2, 1)
    extend(cache, reference, 15, generator)
    with pytest.raises(OutOfPagesError, match="needs 2 more pages, but 0 of 2 are free"):
        forward(cache, random_layers(2, 1, generator))
    assert_same(cache, reference)


def test_a_dropped_fork_leaves_the_last_page_to_the_other_one(generator):
    cache = PagedCache(tiny_config(), num_pages=1, page_size=16)
    reference = filled(cache, generator, 1, 5)
    fork = cache.fork()
    del fork
    gc.collect()
    extend(cache, reference, 1, generator)
    assert_same(cache, reference)


def test_the_memory_of_a_dropped_cache_is_free(generator):
    pool = PagePool(tiny_config(), page_size=16)
    cache = PagedCache(pool=pool)
    filled(cache, generator, 3, 40)
    assert pool.groups[0].allocator.num_active == 9
    del cache
    gc.collect()
    assert pool.groups[0].allocator.num_active == 0
    assert pool.stats().num_tokens == 0


def test_who_holds_a_mask_holds_no_pages_and_who_holds_a_layer_holds_them(generator):
    cache = PagedCache(tiny_config(), page_size=16)
    pool, layer = cache.pool, cache.layers[0]
    filled(cache, generator, 2, 20)
    length, _ = cache.get_mask_sizes(1, 0)
    mask = paged_flex_mask(2, 1, length, q_offset=20, config=pool.config)  # as torch.compile keeps one
    keys = layer.keys.clone()
    del cache, length
    gc.collect()
    assert torch.equal(layer.keys, keys)
    del layer
    gc.collect()
    assert mask.metadata.step is not None
    pool.check_integrity()
    assert pool.stats().num_active_pages == 0


# Cropping


@pytest.mark.parametrize("num_removed", [0, 1, 3, 19, 34, 35])
@pytest.mark.parametrize("padding", [None, [0, 1], [34, 0], [2, 20]], ids=str)
def test_crop_removes_the_last_columns(cache, generator, num_removed, padding):
    reference = filled(cache, generator, 2, 35, padding)
    cache.crop(-num_removed)
    reference.crop(num_removed)
    assert_same(cache, reference)
    assert cache.pool.groups[0].allocator.num_active == sum(-(-length // 16) for length in reference.lengths)
    extend(cache, reference, 20, generator)
    assert_same(cache, reference)
    cache.pool.check_integrity()


@pytest.mark.parametrize("tokens_to_remove", [1, 5, -6, -100])
def test_crop_refuses_what_it_cannot_remove(cache, generator, tokens_to_remove):
    reference = filled(cache, generator, 2, 5)
    with pytest.raises(ValueError, match=rf"crop\({tokens_to_remove}\) was called on a cache of 5 tokens.*below -5"):
        cache.crop(tokens_to_remove)
    assert_same(cache, reference)


def test_cropping_nothing_off_an_empty_cache_is_allowed(cache):
    cache.crop(0)
    assert cache.get_seq_length() == 0
    with pytest.raises(ValueError, match=r"crop\(-1\) was called on a cache of 0 tokens"):
        cache.crop(-1)


def test_cropping_into_a_shared_page_leaves_the_fork_alone(cache, generator):
    reference = filled(cache, generator, 2, 20)
    fork, expected = cache.fork(), reference.fork()
    cache.crop(-2)
    reference.crop(2)
    extend(cache, reference, 3, generator)
    assert_same(cache, reference)
    assert_same(fork, expected)


# Rows


@pytest.mark.parametrize("beams", [[0, 1, 2], [2, 1, 0], [0, 0, 0], [1, 1, 2], [-1, -3, -2]])
@pytest.mark.parametrize("padding", [None, [0, 3, 17]], ids=str)
def test_reordering_gives_each_row_what_another_had(cache, generator, beams, padding):
    reference = filled(cache, generator, 3, 20, padding)
    cache.reorder_cache(torch.tensor(beams))
    reference.select(beams)
    assert_same(cache, reference)
    extend(cache, reference, 15, generator)
    assert_same(cache, reference)
    cache.pool.check_integrity()


@pytest.mark.parametrize(
    "indices",
    [
        torch.tensor([2, 0]),
        torch.tensor([1]),
        torch.tensor([0, 0, 1, 2, 2]),
        torch.tensor([True, False, True]),
        [1, 2],
    ],
    ids=str,
)
@pytest.mark.parametrize("padding", [None, [0, 3, 17]], ids=str)
def test_selecting_rows_keeps_just_those(cache, generator, indices, padding):
    reference = filled(cache, generator, 3, 20, padding)
    cache.batch_select_indices(indices)
    reference.select([0, 2] if torch.as_tensor(indices).dtype == torch.bool else [int(index) for index in indices])
    assert_same(cache, reference)
    assert cache.pool.groups[0].allocator.num_active == len(count_holders(table_of(cache)))
    extend(cache, reference, 15, generator)
    assert_same(cache, reference)
    cache.pool.check_integrity()


@pytest.mark.parametrize("repeats", [1, 2, 5])
@pytest.mark.parametrize("padding", [None, [3, 0]], ids=str)
def test_repeating_rows_shares_their_pages(cache, generator, repeats, padding):
    reference = filled(cache, generator, 2, 20, padding)
    num_active = cache.pool.groups[0].allocator.num_active
    cache.batch_repeat_interleave(repeats)
    reference.repeat(repeats)
    assert cache.pool.groups[0].allocator.num_active == num_active
    assert_same(cache, reference)
    extend(cache, reference, 1, generator)
    assert_same(cache, reference)
    assert cache.pool.groups[0].allocator.num_active == num_active + 2 * (repeats - 1)
    cache.pool.check_integrity()


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([0, 3, 1])), r"Rows \[3\] were asked for, but .* 3 rows"),
        (lambda cache: cache.reorder_cache(torch.tensor([-4, 0, 1])), r"Rows \[-4\] were asked for, but .* 3 rows"),
        (lambda cache: cache.batch_select_indices(torch.tensor([5, 0, 7])), r"Rows \[5, 7\] were asked for"),
        (lambda cache: cache.batch_select_indices(torch.tensor([False] * 3 + [True])), "3 rows"),
        (lambda cache: cache.batch_select_indices(torch.tensor([True, False])), "3 rows"),
    ],
    ids=["beyond", "before", "several", "long mask", "short mask"],
)
def test_rows_that_do_not_exist_are_refused(cache, generator, operation, message):
    reference = filled(cache, generator, 3, 5)
    with pytest.raises(ValueError, match=message):
        operation(cache)
    assert_same(cache, reference)
    cache.pool.check_integrity()


# Starting over, forking, copying


def test_reset_frees_everything_and_the_cache_is_as_new(cache, generator):
    filled(cache, generator, 3, 20, padding=[0, 3, 19])
    fork = cache.fork()
    expected = [fork.gather(layer) for layer in range(NUM_LAYERS)]
    cache.reset()
    assert (cache.get_seq_length(), cache.batch_size, cache.gather(0)) == (0, -1, (None, None))
    assert_same(cache, filled(cache, generator, 2, 17))
    assert_layers_equal([fork.gather(layer) for layer in range(NUM_LAYERS)], expected)
    fork.reset()
    cache.reset()
    assert cache.pool.groups[0].allocator.num_active == 0
    cache.pool.check_integrity()


@pytest.mark.parametrize(
    ("fork_of", "num_tokens"),
    [*((PagedCache.fork, length) for length in EDGES), (copy.deepcopy, 17), (copy.copy, 17)],
    ids=lambda value: str(value) if isinstance(value, int) else value.__name__,
)
@pytest.mark.parametrize("is_padded", [False, True])
def test_a_fork_shares_its_pages_and_goes_its_own_way(cache, generator, fork_of, num_tokens, is_padded):
    reference = filled(cache, generator, 2, num_tokens, [0, num_tokens - 1] if is_padded else None)
    num_active = cache.pool.groups[0].allocator.num_active
    fork, expected = fork_of(cache), reference.fork()
    assert fork.pool is cache.pool
    assert cache.pool.groups[0].allocator.num_active == num_active
    assert_same(fork, expected)
    for num_new in (1, 16):
        extend(fork, expected, num_new, generator)
        extend(cache, reference, num_new + 1, generator)
    cache.crop(-2)
    reference.crop(2)
    fork.batch_select_indices(torch.tensor([1]))
    expected.select([1])
    assert_same(cache, reference)
    assert_same(fork, expected)
    cache.pool.check_integrity()


def test_a_fork_of_an_empty_cache_is_empty(cache, generator):
    fork = cache.fork()
    assert_same(fork, filled(fork, generator, 2, 5))
    assert cache.get_seq_length() == 0


def test_caches_on_one_pool_do_not_disturb_each_other(generator):
    pool = PagePool(tiny_config(), page_size=16)
    caches = [PagedCache(pool=pool) for _ in range(3)]
    references = [filled(cache, generator, rows, 14) for rows, cache in enumerate(caches, start=1)]
    for _ in range(20):
        for cache, reference in zip(caches, references, strict=True):
            extend(cache, reference, 1, generator)
    for cache, reference in zip(caches, references, strict=True):
        assert_same(cache, reference)
    pool.check_integrity()


# What Transformers asks a cache


def test_it_is_a_transformers_cache(cache):
    assert isinstance(cache, Cache)
    assert len(cache) == NUM_LAYERS
    assert cache.is_croppable
    assert not any(layer.is_croppable for layer in cache.layers)
    assert cache.is_sliding == [False, False]


def test_the_batch_size_is_that_of_the_tokens_held(cache, generator):
    assert cache.batch_size == -1
    filled(cache, generator, 3, 5)
    assert cache.batch_size == 3
    cache.batch_select_indices(torch.tensor([0]))
    assert cache.batch_size == 1


def test_a_layer_has_its_old_length_until_it_is_written(cache, generator):
    filled(cache, generator, 2, 15)
    for layer, (keys, values) in enumerate(random_layers(2, 3, generator)):
        assert cache.get_seq_length(layer) == cache.layers[layer].get_seq_length() == 15
        cache.update(keys, values, layer)
    assert [cache.get_seq_length(layer) for layer in range(NUM_LAYERS)] == [18, 18]
    assert [layer.get_seq_length() for layer in cache.layers] == [18, 18]


def test_mask_sizes_count_padding_and_start_at_zero(cache, generator):
    assert cache.get_mask_sizes(5, 0) == (5, 0)
    filled(cache, generator, 2, 15, padding=[0, 3])
    assert [cache.get_mask_sizes(4, layer) for layer in range(NUM_LAYERS)] == [(19, 0)] * 2
    assert cache.layers[0].get_mask_sizes(4) == (19, 0)


def test_a_prompt_that_is_no_longer_than_the_cache_is_noticed(cache, generator):
    filled(cache, generator, 1, 5)
    input_ids = torch.arange(7)[None]
    assert input_ids[:, -(7 - cache.get_seq_length()) :].tolist() == [[5, 6]]
    with pytest.raises(ValueError, match="The cache holds 5 tokens, but input_ids has 5, so no token is left"):
        input_ids[:, -(5 - cache.get_seq_length()) :]


@pytest.mark.parametrize(("num_pages", "expected"), [(None, -1), (3, 48)])
def test_the_longest_length_is_what_fits_into_the_pool(generator, num_pages, expected):
    cache = PagedCache(tiny_config(), num_pages=num_pages, page_size=16)
    assert cache.get_max_length() == expected
    filled(cache, generator, 1, 20)
    assert cache.get_max_length() == expected


def test_it_is_initialized_by_the_first_keys(cache, generator):
    assert not cache.is_initialized
    layers = random_layers(1, 1, generator)
    cache.update(*layers[0], 0)
    assert not cache.is_initialized
    cache.update(*layers[1], 1)
    assert cache.is_initialized


def test_a_layer_is_initialized_while_it_has_keys(cache, generator):
    def state():
        return [(layer.is_initialized, layer.keys is not None) for layer in cache.layers]

    assert state() == [(False, False)] * NUM_LAYERS
    filled(cache, generator, 2, 17)
    assert state() == [(True, True)] * NUM_LAYERS
    filled(PagedCache(pool=cache.pool), generator, 1, 5)
    cache.crop(-17)
    assert state() == [(False, False)] * NUM_LAYERS


def test_early_initialization_makes_the_storage_and_holds_nothing(generator):
    cache = PagedCache(tiny_config(), num_pages=3, page_size=16)
    cache.early_initialization(2, NUM_KV_HEADS, HEAD_DIM, torch.float32, torch.device("cpu"))
    assert cache.is_initialized
    assert (cache.get_seq_length(), cache.batch_size) == (0, -1)
    assert cache.stats().reserved_bytes == 3 * 16 * NUM_LAYERS * 2 * NUM_KV_HEADS * HEAD_DIM * 4
    with pytest.raises(ValueError, match=r"dtype torch.float64, but this cache holds torch.float32"):
        forward(cache, broken(random_layers(1, 5, generator), 0, another_dtype))
    assert_same(cache, filled(cache, generator, 2, 5))


def test_iterating_gives_each_layer_as_dynamic_cache_does(cache, generator):
    assert list(cache) == [(None, None, None)] * NUM_LAYERS
    dynamic = DynamicCache()
    layers = random_layers(2, 17, generator)
    forward(cache, layers)
    forward(dynamic, layers)
    for (keys, values, window), (expected_keys, expected_values, expected_window) in zip(cache, dynamic, strict=True):
        assert torch.equal(keys, expected_keys)
        assert torch.equal(values, expected_values)
        assert window is expected_window is None


def test_layers_give_their_keys_and_values(cache, generator):
    reference = filled(cache, generator, 2, 17, padding=[0, 3])
    for index, layer in enumerate(cache.layers):
        assert_layers_equal([(layer.keys, layer.values)], [reference.dense(index)])


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("offload", ()),
        ("prefetch", ()),
        ("reset", ()),
        ("reorder_cache", (torch.tensor([0]),)),
        ("crop", (-1,)),
        ("batch_repeat_interleave", (2,)),
        ("batch_select_indices", (torch.tensor([0]),)),
    ],
)
def test_a_layer_cannot_be_changed_alone(cache, generator, method, arguments):
    reference = filled(cache, generator, 1, 5)
    with pytest.raises(ValueError, match=rf"{method}\(\) was called on layer 1 alone, but the layers .* share"):
        getattr(cache.layers[1], method)(*arguments)
    assert_same(cache, reference)


def test_its_representation_names_pages_and_lengths(generator):
    cache = PagedCache(tiny_config(), num_pages=5, page_size=16)
    filled(cache, generator, 2, 5, padding=[0, 2])
    assert repr(cache) == "PagedCache(2 layers, page_size=16, num_pages=5, lengths=[5, 3])"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda pool: {}, "needs either a model's config or a pool"),
        (lambda pool: {"config": tiny_config(), "pool": pool}, "needs either a model's config or a pool"),
        (lambda pool: {"pool": pool, "num_pages": 3}, "beside a pool, which has 4 pages of 16 tokens"),
        (lambda pool: {"pool": pool, "page_size": 16}, "beside a pool, which has 4 pages of 16 tokens"),
    ],
    ids=["neither", "both", "num_pages", "page_size"],
)
def test_arguments_that_exclude_each_other_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PagedCache(**arguments(PagePool(tiny_config(), num_pages=4, page_size=16)))


# Looking in


def test_stats_count_what_this_cache_holds(generator):
    pool = PagePool(tiny_config(), num_pages=10, page_size=16)
    cache, other = PagedCache(pool=pool), PagedCache(pool=pool)
    assert cache.stats().token_bytes == 0
    filled(other, generator, 1, 20)
    reference = filled(cache, generator, 2, 20, padding=[0, 4])
    fork, expected = cache.fork(), reference.fork()
    extend(fork, expected, 1, generator)
    stats = cache.stats()
    assert (stats.num_pages, stats.num_free_pages) == (10, 10 - 2 - 3 - 2)
    assert (stats.num_active_pages, stats.num_shared_pages) == (3, 2)
    assert (stats.num_tokens, stats.num_unique_tokens) == (36, 36)
    assert stats.token_bytes == NUM_LAYERS * 2 * NUM_KV_HEADS * HEAD_DIM * 4
    assert pool.stats().num_active_pages == 7
    assert pool.stats().num_tokens == 36 + 38 + 20


def test_a_pool_counts_the_tokens_of_a_pass_as_soon_as_it_is_over(cache, generator):
    filled(cache, generator, 2, 20)
    stats = cache.pool.stats()
    assert (stats.num_tokens, stats.num_active_pages) == (40, 4)
    assert stats.overhead == pytest.approx(4 * 16 / 40 - 1)


def test_the_memory_map_draws_every_page_and_lists_the_rows(generator):
    pool = PagePool(tiny_config(), num_pages=12, page_size=16)
    cache, other = PagedCache(pool=pool), PagedCache(pool=pool)
    reference = filled(cache, generator, 2, 40, padding=[0, 39])
    filled(other, generator, 1, 17)
    fork, expected = cache.fork(), reference.fork()
    extend(fork, expected, 1, generator)
    extend(cache, reference, 8, generator)
    first, second = table_of(cache).row_pages(0), table_of(cache).row_pages(1)
    marks = ["."] * 12
    for page in [*table_of(other).row_pages(0), *table_of(fork).row_pages(0), *table_of(fork).row_pages(1)]:
        marks[page] = "o"
    for page, mark in zip([*first, *second], "SS#5", strict=True):
        marks[page] = mark
    assert sorted(marks) == sorted("SS#5" + "oooo" + "....")
    assert str(cache.memory_map(width=5)).splitlines() == [
        "12 pages of 16 tokens: # full   1-9 tenths full   S shared   o held by another cache   c cached   . free",
        "     0 " + "".join(marks[:5]),
        "     5 " + "".join(marks[5:10]),
        "    10 " + "".join(marks[10:]),
        f"row 0: 48 tokens in pages {first[0]} {first[1]} {first[2]}",
        f"row 1: 9 tokens in pages {second[0]}",
    ]


@pytest.mark.parametrize(("num_tokens", "mark"), [(1, "1"), (2, "1"), (8, "5"), (15, "9"), (16, "#")])
def test_the_memory_map_shows_how_full_a_page_is(generator, num_tokens, mark):
    cache = PagedCache(tiny_config(), num_pages=1, page_size=16)
    filled(cache, generator, 1, num_tokens)
    assert str(cache.memory_map()).splitlines()[1:] == [f"     0 {mark}", f"row 0: {num_tokens} tokens in pages 0"]


def test_the_memory_map_shows_the_pages_of_a_dropped_cache_as_free(generator):
    cache = PagedCache(tiny_config(), num_pages=4, page_size=16)
    filled(cache, generator, 1, 5)
    fork, other = cache.fork(), PagedCache(pool=cache.pool)
    filled(other, generator, 1, 5)
    assert sorted(str(cache.memory_map()).splitlines()[1]) == sorted("     0 So..")
    del fork, other
    gc.collect()
    assert sorted(str(cache.memory_map()).splitlines()[1]) == sorted("     0 3...")


def test_the_memory_map_of_an_empty_cache_has_only_the_legend(cache):
    [line] = str(cache.memory_map()).splitlines()
    assert line.startswith("0 pages of 16 tokens: ")
