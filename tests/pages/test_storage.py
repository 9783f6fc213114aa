import gc
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_paged.pages.storage import LayerStorage, disagreement

PAGE_SIZE = 16
STATM = Path("/proc/self/statm")
MIB = 2**20


def like(num_heads=2, key_dim=8, value_dim=8, dtype=torch.float32, num_tokens=1, batch=1):
    """Keys and values as a model hands them over."""
    return (
        torch.zeros(batch, num_heads, num_tokens, key_dim, dtype=dtype),
        torch.zeros(batch, num_heads, num_tokens, value_dim, dtype=dtype),
    )


def tokens(count, storage, seed=0):
    """Keys and values to write."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(num_heads, count, head_dim, generator=generator).to(storage.dtype)
        for num_heads, head_dim in (storage.key_shape, storage.value_shape)
    )


def everything(storage):
    return storage.gather(torch.arange(storage.num_pages * storage.page_size))


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def resident_bytes():
    gc.collect()
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value_dim", [8, 5])
def test_tokens_are_read_as_they_were_written(dtype, value_dim):
    storage = LayerStorage(*like(value_dim=value_dim, dtype=dtype), num_pages=3, page_size=PAGE_SIZE)
    slots = torch.tensor([47, 0, 15, 16, 31])
    keys, values = tokens(5, storage)
    storage.write(keys, values, slots)
    assert_equal(storage.gather(slots), (keys, values))
    assert_equal(storage.gather(slots.flip(0)), (keys.flip(1), values.flip(1)))
    assert storage.gather(slots)[1].dtype == dtype


def test_a_write_leaves_every_other_slot_alone():
    storage = LayerStorage(*like(), num_pages=2, page_size=PAGE_SIZE)
    all_keys, all_values = tokens(2 * PAGE_SIZE, storage, seed=1)
    storage.write(all_keys, all_values, torch.arange(2 * PAGE_SIZE))
    keys, values = tokens(2, storage, seed=2)
    storage.write(keys, values, torch.tensor([3, 16]))
    all_keys[:, [3, 16]], all_values[:, [3, 16]] = keys, values
    assert_equal(everything(storage), (all_keys, all_values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("slots", [[47], [16, 3, 31]])
def test_one_token_of_each_row_is_written_as_any_tokens_are(slots, dtype):
    storage, other = (
        LayerStorage(*like(value_dim=5, dtype=dtype), num_pages=3, page_size=PAGE_SIZE) for _ in range(2)
    )
    keys, values = tokens(len(slots), storage)
    by_row = [tensor.transpose(0, 1)[:, :, None] for tensor in (keys, values)]
    storage.write_one_each(*by_row, slots[0] if len(slots) == 1 else np.array(slots))
    other.write(keys, values, torch.tensor(slots))
    assert_equal(everything(storage), everything(other))
    storage.resize(5)
    storage.write_one_each(*(tensor[:1] for tensor in by_row), 79)
    assert_equal(storage.gather(torch.tensor([79])), (keys[:, :1], values[:, :1]))


def test_a_new_storage_is_zero():
    storage = LayerStorage(*like(), num_pages=2, page_size=PAGE_SIZE)
    assert all(not tensor.any() for tensor in everything(storage))


def test_the_kernel_sees_slots_head_by_head_without_a_copy():
    storage = LayerStorage(*like(value_dim=5), num_pages=2, page_size=PAGE_SIZE)
    keys, values = tokens(1, storage)
    storage.write(keys, values, torch.tensor([17]))
    assert storage.keys.shape == (1, 2, 32, 8)
    assert storage.values.shape == (1, 2, 32, 5)
    assert torch.equal(storage.keys[0, :, 17], keys[:, 0])
    assert torch.equal(storage.values[0, :, 17], values[:, 0])


def test_the_first_slot_is_aligned_to_a_cache_line():
    for num_pages in (1, 3, 100):
        storage = LayerStorage(*like(dtype=torch.bfloat16), num_pages=num_pages, page_size=PAGE_SIZE)
        assert storage.keys.data_ptr() % 64 == storage.values.data_ptr() % 64 == 0


def test_token_bytes_counts_keys_and_values():
    storage = LayerStorage(*like(num_heads=3, key_dim=8, value_dim=5, dtype=torch.bfloat16), 1, PAGE_SIZE)
    assert storage.token_bytes == 3 * (8 + 5) * 2


def test_pages_are_copied_whole_and_the_originals_stay():
    storage = LayerStorage(*like(value_dim=5), num_pages=5, page_size=PAGE_SIZE)
    storage.write(*tokens(5 * PAGE_SIZE, storage), torch.arange(5 * PAGE_SIZE))
    expected = [tensor.clone().unflatten(1, (5, PAGE_SIZE)) for tensor in everything(storage)]
    storage.copy_pages(torch.tensor([0, 4, 0]), torch.tensor([3, 2, 1]))
    for tensor in expected:
        tensor[:, 3], tensor[:, 2], tensor[:, 1] = tensor[:, 0].clone(), tensor[:, 4].clone(), tensor[:, 0].clone()
    assert_equal(everything(storage), [tensor.flatten(1, 2) for tensor in expected])


def test_clearing_values_zeroes_the_values_of_those_pages_only():
    storage = LayerStorage(*like(), num_pages=3, page_size=PAGE_SIZE)
    keys, values = tokens(3 * PAGE_SIZE, storage)
    values[:, 20] = float("nan")
    storage.write(keys, values, torch.arange(3 * PAGE_SIZE))
    storage.clear_values(torch.tensor([1]))
    values[:, PAGE_SIZE : 2 * PAGE_SIZE] = 0
    assert_equal(everything(storage), (keys, values))


@pytest.mark.parametrize("num_pages", [1, 2, 3, 7])
def test_resizing_keeps_the_pages_that_remain_and_zeroes_new_ones(num_pages):
    storage = LayerStorage(*like(value_dim=5), num_pages=2, page_size=PAGE_SIZE)
    written = tokens(2 * PAGE_SIZE, storage)
    storage.write(*written, torch.arange(2 * PAGE_SIZE))
    storage.resize(num_pages)
    assert storage.num_pages == num_pages
    kept = min(2, num_pages) * PAGE_SIZE
    for found, expected in zip(everything(storage), written, strict=True):
        assert torch.equal(found[:, :kept], expected[:, :kept])
        assert not found[:, kept:].any()
    assert storage.keys.shape == (1, 2, num_pages * PAGE_SIZE, 8)
    assert storage.values.shape == (1, 2, num_pages * PAGE_SIZE, 5)


def test_a_storage_has_at_least_one_page_and_can_grow():
    storage = LayerStorage(*like(), num_pages=0, page_size=PAGE_SIZE)
    assert storage.num_pages == 1
    storage.resize(3)
    written = tokens(1, storage)
    storage.write(*written, torch.tensor([15]))
    assert_equal(storage.gather(torch.tensor([15])), written)


def test_keys_and_values_that_fit_have_no_mismatch():
    storage = LayerStorage(*like(value_dim=5), num_pages=1, page_size=PAGE_SIZE)
    assert storage.mismatch(*like(value_dim=5, num_tokens=7, batch=3)) is None


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        (like(num_heads=3)[0], like()[1], "key heads and head size (3, 8), but this cache holds (2, 8)"),
        (like(key_dim=4)[0], like()[1], "key heads and head size (2, 4), but this cache holds (2, 8)"),
        (like()[0], like(num_heads=1)[1], "value heads and head size (1, 8), but this cache holds (2, 8)"),
        (like()[0], like(value_dim=9)[1], "value heads and head size (2, 9), but this cache holds (2, 8)"),
        (*like(dtype=torch.float16), "dtype torch.float16, but this cache holds torch.float32"),
        (like()[0].to("meta"), like()[1], "device meta, but this cache holds cpu"),
    ],
    ids=["key heads", "key size", "value heads", "value size", "dtype", "device"],
)
def test_a_mismatch_says_what_was_given_and_what_is_held(keys, values, message):
    storage = LayerStorage(*like(), num_pages=1, page_size=PAGE_SIZE)
    assert storage.mismatch(keys, values) == message


def test_keys_and_values_of_the_same_tokens_agree():
    assert disagreement(*like(value_dim=5, num_tokens=7, batch=3)) is None
    assert disagreement(like(num_heads=3)[0], like()[1]) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (like(num_tokens=3, batch=2)[1], "values of shape (2, 2, 3, 8) for keys of shape (2, 2, 4, 8)"),
        (like(num_tokens=4, batch=3)[1], "values of shape (3, 2, 4, 8) for keys of shape (2, 2, 4, 8)"),
        (
            like(num_tokens=4, batch=2, dtype=torch.float16)[1],
            "values in torch.float16 on cpu, but keys in torch.float32 on cpu",
        ),
        (
            like(num_tokens=4, batch=2)[1].to("meta"),
            "values in torch.float32 on meta, but keys in torch.float32 on cpu",
        ),
    ],
    ids=["tokens", "rows", "dtype", "device"],
)
def test_keys_and_values_of_different_tokens_disagree(values, message):
    keys, _ = like(num_tokens=4, batch=2)
    assert disagreement(keys, values) == message


@pytest.mark.skipif(not STATM.exists(), reason="resident memory is read from Linux's /proc")
def test_reserved_storage_costs_memory_only_where_it_is_written():
    before = resident_bytes()
    # 128 pages of 128 tokens of 2 heads of 4096 float32: 2 x 512 MiB.
    storage = LayerStorage(*like(num_heads=2, key_dim=4096, value_dim=4096), num_pages=128, page_size=128)
    num_bytes = storage.num_pages * storage.page_size * storage.token_bytes
    assert num_bytes == 1024 * MIB
    untouched = resident_bytes()
    assert untouched - before < 0.05 * num_bytes
    written = tokens(1, storage)
    storage.write(*written, torch.tensor([5000]))
    assert_equal(storage.gather(torch.tensor([5000])), written)
    # A token has 64 KiB here. The operating system may back each head of keys and values by a huge page, 2 MiB.
    assert resident_bytes() - untouched < 16 * MIB
    storage.copy_pages(torch.tensor([39]), torch.tensor([100]))
    assert resident_bytes() - untouched < 40 * MIB  # two pages of 8 MiB each


@pytest.mark.skipif(not STATM.exists(), reason="resident memory is read from Linux's /proc")
def test_storage_that_is_gone_leaves_nothing_behind():
    for _ in range(3):  # an allocator would keep what it was given back, and hand it out again
        before = resident_bytes()
        storages = [LayerStorage(*like(num_heads=4, key_dim=64, value_dim=64), 128, 128) for _ in range(4)]
        assert resident_bytes() - before < MIB
        for storage in storages:
            storage.keys.fill_(1)
        assert resident_bytes() - before > 60 * MIB
        del storage, storages
        gc.collect()
        assert resident_bytes() - before < MIB


def test_a_storage_made_under_inference_mode_works_outside_of_it():
    with torch.inference_mode():
        storage = LayerStorage(*like(), num_pages=1, page_size=PAGE_SIZE)
        first = tokens(1, storage, seed=1)
        storage.write(*first, torch.tensor([0]))
        storage.resize(2)
    second = tokens(1, storage, seed=2)
    storage.write(*second, torch.tensor([16]))
    storage.copy_pages(torch.tensor([1]), torch.tensor([0]))
    storage.clear_values(torch.tensor([1]))
    storage.resize(3)
    assert_equal(storage.gather(torch.tensor([0])), second)
    assert not any(tensor.is_inference() for tensor in (storage.keys, storage.values))


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("restless_threads")
def test_a_write_during_growth_is_not_lost():
    storage = LayerStorage(*like(), num_pages=4, page_size=PAGE_SIZE)
    keys, values = tokens(4 * PAGE_SIZE, storage)
    start = threading.Barrier(3)

    def write(first):
        start.wait()
        for slot in range(first, 4 * PAGE_SIZE, 2):
            storage.write(keys[:, slot : slot + 1], values[:, slot : slot + 1], torch.tensor([slot]))

    def grow():
        start.wait()
        for num_pages in range(5, 25):
            storage.resize(num_pages)

    with ThreadPoolExecutor(3) as executor:
        for future in [executor.submit(write, 0), executor.submit(write, 1), executor.submit(grow)]:
            future.result()
    assert_equal(storage.gather(torch.arange(4 * PAGE_SIZE)), (keys, values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pages", [[1], [2, 0]])
def test_whole_pages_go_elsewhere_and_come_back_bit_for_bit(dtype, pages):
    storage, other = (
        LayerStorage(*like(value_dim=5, dtype=dtype), num_pages=3, page_size=PAGE_SIZE) for _ in range(2)
    )
    storage.write(*tokens(3 * PAGE_SIZE, storage), torch.arange(3 * PAGE_SIZE))
    content = storage.read_pages(torch.tensor(pages))
    assert content.shape == (len(pages), PAGE_SIZE * storage.token_bytes)
    targets = torch.tensor([2, 1][: len(pages)])
    other.write_pages(targets, content)
    assert torch.equal(other.read_pages(targets), content)
    slots = (torch.tensor(pages)[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()
    there = (targets[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()
    assert_equal(other.gather(there), storage.gather(slots))
    untouched = next(page for page in range(3) if page not in targets)
    assert not other.read_pages(torch.tensor([untouched])).any()
