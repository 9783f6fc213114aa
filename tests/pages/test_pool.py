import gc
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from transformers import MambaConfig

from hf_paged import OutOfPagesError, PagedCache, PagePool
from hf_paged._torch.host_memory import free_bytes
from hf_paged.pages.block_table import BlockTable
from hf_paged.pages.group import PageGroup
from hf_paged.pages.storage import LayerStorage
from tests.models import generate, random_ids, tiny_gemma, tiny_llama
from tests.reference import (
    NUM_LAYERS,
    append_ids,
    count_holders,
    numbered_table,
    open_pool,
    read_ids,
    rows_of,
    tiny_config,
)

pytestmark = pytest.mark.usefixtures("quick_collection")

TOKEN_BYTES = NUM_LAYERS * 2 * 2 * 4  # keys and values of one head of size 2 in float32


@pytest.mark.parametrize("page_size", [0, 1, 8, 24, 100, 512, 16.5, 16.0, "16"])
def test_a_page_size_that_the_kernel_cannot_take_is_refused(page_size):
    with pytest.raises(ValueError, match="a page must be a tile that the kernel can take: choose one of 16, 32, 64"):
        PagePool(tiny_config(), page_size=page_size)


@pytest.mark.parametrize("num_pages", [0, -1, 1.5, "3", True])
def test_a_number_of_pages_is_a_whole_one_and_not_none(num_pages):
    with pytest.raises(ValueError, match=f"num_pages={num_pages!r} was asked for, but a whole number of at least 1"):
        PagePool(tiny_config(), num_pages)


def test_a_number_of_pages_may_come_from_numpy():
    assert PagePool(tiny_config(), np.int64(3), page_size=16).num_pages == 3


@pytest.mark.parametrize("watermark", [-1, 0.5])
def test_a_watermark_is_a_whole_number(watermark):
    with pytest.raises(ValueError, match=f"watermark={watermark!r} was asked for, but a whole number of at least 0"):
        PagePool(tiny_config(), watermark=watermark)


def test_a_model_that_keeps_another_state_is_refused():
    with pytest.raises(ValueError, match=r"layer 0 of this 'mamba' model is a .* layer, which keeps another state"):
        PagePool(MambaConfig(num_hidden_layers=2))


def test_a_bounded_pool_has_its_pages_at_once_and_never_more():
    pool = open_pool(num_pages=3)
    assert pool.num_pages == 3
    assert all(pool.storage(layer).num_pages == 3 for layer in range(NUM_LAYERS))
    table = numbered_table(pool, 48)
    with pytest.raises(OutOfPagesError, match="needs 1 more pages, but 0 of 3 are free"):
        append_ids(table, [[48]])
    assert read_ids(table) == rows_of(48)
    assert pool.num_pages == 3
    pool.check_integrity()


def test_an_unbounded_pool_reserves_one_page_per_layer_before_the_first_token():
    pool = open_pool()
    assert (pool.num_pages, pool.stats().reserved_bytes) == (0, 16 * pool.stats().token_bytes)


def test_an_unbounded_pool_doubles_and_keeps_its_content():
    pool = open_pool()
    table = numbered_table(pool, 1)
    sizes = [pool.num_pages]
    for number in range(1, 16 * 16 * 4 + 1):
        append_ids(table, [[number]])
        if pool.num_pages != sizes[-1]:
            sizes.append(pool.num_pages)
            assert read_ids(table) == rows_of(number + 1)
            assert all(pool.storage(layer).num_pages == pool.num_pages for layer in range(NUM_LAYERS))
            pool.check_integrity()
    assert sizes == [sizes[0] * 2**power for power in range(len(sizes))]
    assert len(sizes) > 2


def test_a_pool_whose_storage_takes_memory_at_once_grows_in_small_steps():
    pool = PagePool(tiny_config(), page_size=16)
    keys = torch.zeros(1, 2, 1, 16, device="meta")
    group = pool.groups[0]
    group.open_storage(0, keys, keys)
    sizes = []
    for _ in range(300):
        group.take(1)
        sizes.append(group.num_pages)
    assert list(dict.fromkeys(sizes)) == [
        *range(16, 130, 8),
        136,
        145,
        155,
        165,
        176,
        187,
        199,
        212,
        226,
        241,
        257,
        274,
        292,
        311,
    ]


def test_growth_makes_room_for_a_long_prompt_at_once():
    pool = open_pool()
    table = numbered_table(pool, 16 * 1000, 5)
    assert 1001 <= pool.num_pages <= 2002
    assert read_ids(table) == rows_of(16 * 1000, 5)


@pytest.mark.parametrize(("max_pages", "expected"), [(None, 80), (60, 60), (40, 40)])
def test_a_prompt_on_a_cpu_leaves_room_for_what_follows_before_anything_must_be_copied(max_pages, expected):
    group = PageGroup((0, 1), None, 0, max_pages, 16, 0)
    pages = group.take(40)
    assert group.num_pages == 40
    like = torch.zeros(1, 1, 1, 2)
    storages = [group.open_storage(layer, like, like) for layer in (0, 1)]
    assert [storage.num_pages for storage in storages] == [group.num_pages] * 2 == [expected] * 2
    assert len(group.physical_to_logical(torch.device("cpu"))) == expected
    tensors = [storage.keys for storage in storages]
    pages += group.take(expected - 40)
    assert all(storage.keys is held for storage, held in zip(storages, tensors, strict=True))
    group.allocator.release(pages)
    group.check_integrity()


def test_few_pages_of_a_growing_pool_are_room_enough():
    group = PageGroup((0,), None, 0, None, 16, 0)
    group.take(3)
    assert group.open_storage(0, torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2)).num_pages == 16


def test_growth_leaves_the_watermark_free():
    pool = open_pool(watermark=5)
    table = numbered_table(pool, 16 * 40)
    assert pool.groups[0].allocator.num_free >= 5
    assert read_ids(table) == rows_of(16 * 40)


def test_a_layer_that_is_used_late_has_as_many_pages():
    pool = PagePool(tiny_config(), page_size=16)
    pages = pool.groups[0].take(40)
    pool.open_storage(1, torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
    assert pool.storage(0) is None
    assert pool.storage(1).num_pages == pool.num_pages
    pool.groups[0].allocator.release(pages)
    pool.check_integrity()


@pytest.mark.parametrize("num_heads", [1, 2])
@pytest.mark.parametrize("grows", [False, True])
def test_a_layer_need_not_be_like_the_one_before(num_heads, grows):
    pool = PagePool(tiny_config(), page_size=16)
    group, like = pool.groups[0], torch.zeros(1, 1, 1, 2)
    pages = group.take(1)
    pool.open_storage(0, like, like)
    assert pool.storage(1) is None
    if grows:
        pages += group.take(pool.num_pages)
    keys, values = torch.zeros(1, num_heads, 1, 2), torch.zeros(1, num_heads, 1, 2)
    storage = pool.open_storage(1, keys, values)
    assert storage is pool.storage(1)
    assert storage.fits(keys, values)
    assert storage.num_pages == pool.num_pages
    group.allocator.release(pages)
    pool.check_integrity()


def test_trimming_gives_back_the_memory_behind_the_last_held_page():
    pool = open_pool()
    table, other = numbered_table(pool, 20), numbered_table(pool, 16 * 60)
    reserved = pool.stats().reserved_bytes
    other.clear()
    pool.trim()
    stats = pool.stats()
    assert (stats.num_pages, stats.num_free_pages) == (2, 0)
    assert stats.reserved_bytes == 2 * 16 * TOKEN_BYTES < reserved
    assert read_ids(table) == rows_of(20)
    pool.check_integrity()


def test_trimming_keeps_free_pages_before_a_held_one():
    pool = open_pool()
    other, table = numbered_table(pool, 16 * 3), numbered_table(pool, 20)
    del other
    gc.collect()
    pool.trim()
    assert (pool.num_pages, pool.groups[0].allocator.num_free) == (5, 3)
    append_ids(table, [list(range(20, 16 * 5))])
    assert pool.num_pages == 5
    assert read_ids(table) == rows_of(16 * 5)
    pool.check_integrity()


def test_an_empty_pool_is_trimmed_to_one_page_per_layer_and_grows_again():
    pool = open_pool()
    table = numbered_table(pool, 100)
    table.clear()
    pool.trim()
    assert (pool.num_pages, pool.stats().reserved_bytes) == (0, 16 * pool.stats().token_bytes)
    table.open_rows(2)
    append_ids(table, rows_of(100, 17))
    assert read_ids(table) == rows_of(100, 17)
    pool.check_integrity()


def test_trimming_a_bounded_pool_changes_nothing():
    pool = open_pool(num_pages=4)
    table = numbered_table(pool, 5)
    pool.trim()
    assert (pool.num_pages, pool.groups[0].allocator.num_free) == (4, 3)
    assert read_ids(table) == rows_of(5)


def test_a_layer_keeps_the_storage_that_it_has():
    pool = open_pool()
    storage = pool.storage(0)
    assert pool.open_storage(0, torch.zeros(3, 1, 5, 2), torch.zeros(3, 1, 5, 2)) is storage


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        (torch.zeros(1, 2, 1, 2), torch.zeros(1, 1, 1, 2), r"key heads and head size \(2, 2\), but .* \(1, 2\)"),
        (torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 3), r"value heads and head size \(1, 3\), but .* \(1, 2\)"),
        (torch.zeros(1, 1, 1, 2).half(), torch.zeros(1, 1, 1, 2).half(), "dtype torch.float16, but .* torch.float32"),
        (
            torch.zeros(1, 1, 1, 2),
            torch.zeros(1, 1, 1, 2).half(),
            "values in torch.float16 .* but keys in torch.float",
        ),
    ],
    ids=["heads", "value size", "dtype", "value dtype"],
)
def test_keys_and_values_that_do_not_fit_are_refused(keys, values, message):
    pool = open_pool()
    with pytest.raises(ValueError, match=rf"Layer 1 was given {message}.*make a new PagedCache for this model"):
        pool.open_storage(1, keys, values)


def test_first_keys_and_values_that_do_not_fit_together_are_refused():
    pool = PagePool(tiny_config(), page_size=16)
    with pytest.raises(ValueError, match=r"given values in .*float16 on cpu, but keys in .*float32"):
        pool.open_storage(1, torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2).half())
    assert pool.storage(1) is None


def test_every_held_page_knows_its_place_in_its_row():
    pool = open_pool()
    table = numbered_table(pool, 40, 5, 17)
    table.select([0, 0, 2])
    append_ids(table, [[1], [2], [3]])
    index = pool.groups[0].physical_to_logical(torch.device("cpu"))
    for row in range(3):
        assert index[table.row_pages(row)].tolist() == list(range(len(table.row_pages(row))))


@pytest.mark.parametrize("is_inference", [False, True])
def test_page_places_are_mirrored_on_other_devices(is_inference):
    # The meta device stands in for an accelerator: it says whether an operation may run, and holds no data.
    pool = open_pool()
    table = numbered_table(pool, 5)
    meta = torch.device("meta")
    with torch.inference_mode(is_inference):
        mirror = pool.groups[0].physical_to_logical(meta)
    append_ids(table, [list(range(5, 40))])
    assert pool.groups[0].physical_to_logical(meta) is mirror
    append_ids(table, [list(range(40, 16 * 40))])
    assert pool.groups[0].physical_to_logical(meta).shape == (pool.num_pages,)


def test_a_pool_grown_under_inference_mode_works_outside_of_it():
    pool = open_pool()
    with torch.inference_mode():
        table = numbered_table(pool, 5)
    fork = table.fork()
    append_ids(table, [list(range(5, 16 * 40))])
    with torch.inference_mode():
        append_ids(fork, [[5]])
        pool.trim()
    append_ids(fork, [[6]])
    assert (read_ids(table), read_ids(fork)) == (rows_of(16 * 40), rows_of(7))


def test_values_of_new_last_pages_are_cleared():
    # A masked slot has weight 0, and 0 times NaN is NaN.
    pool = open_pool(num_pages=4)
    for layer in range(NUM_LAYERS):
        rubbish = torch.full((1, 64, 2), float("nan"))
        pool.storage(layer).write(rubbish, rubbish, torch.arange(64))
    table = numbered_table(pool, 20)
    append_ids(table, [list(range(20, 36))])
    for layer in range(NUM_LAYERS):
        slots = torch.cat([torch.arange(16 * page, 16 * page + 16) for page in table.row_pages(0)])
        assert not pool.storage(layer).gather(slots)[1].isnan().any()


def test_stats_agree_with_an_independent_count():
    pool = open_pool()
    table = numbered_table(pool, 33, 5)
    fork = table.fork()
    other = numbered_table(pool, 16, 0)
    append_ids(fork, [[7777], []])
    fork.select([0, 0, 1])
    other.reserve(np.array([1, 0]))
    tables = (table, fork, other)
    used: dict[int, set[int]] = {page: set() for page in count_holders(*tables)}
    for one in tables:
        for row in range(one.num_rows):
            for position in range(int(one.lengths[row])):
                used[one.row_pages(row)[position // 16]].add(position % 16)
    num_unique = sum(map(len, used.values()))
    num_tokens = 33 + 5 + 2 * 34 + 5 + 16
    assert num_unique == 33 + 5 + 2 + 16

    stats = pool.stats()
    assert stats.num_pages == pool.num_pages
    assert stats.num_active_pages == len(used) == 3 + 1 + 1 + 2
    assert stats.num_free_pages == pool.num_pages - len(used)
    assert stats.num_cached_pages == 0
    assert stats.num_shared_pages == sum(count > 1 for count in count_holders(*tables).values())
    assert (stats.num_tokens, stats.num_unique_tokens) == (num_tokens, num_unique)
    assert (stats.page_size, stats.token_bytes) == (16, TOKEN_BYTES)
    assert stats.reserved_bytes == pool.num_pages * 16 * TOKEN_BYTES
    assert stats.active_bytes == 7 * 16 * TOKEN_BYTES
    assert stats.live_bytes == stats.minimum_bytes == num_unique * TOKEN_BYTES
    assert stats.wasted_bytes == (7 * 16 - num_unique) * TOKEN_BYTES
    assert stats.shared_bytes == (num_tokens - num_unique) * TOKEN_BYTES
    assert stats.padded_bytes == (2 * 33 + 3 * 34 + 2 * 16) * TOKEN_BYTES
    assert stats.overhead == pytest.approx(7 * 16 / num_unique - 1)


def test_stats_of_one_table_count_sharing_with_anyone():
    pool = open_pool()
    table = numbered_table(pool, 33)
    fork = table.fork()
    append_ids(fork, [[7777]])
    stats = pool.account([[fork]])
    assert (stats.num_active_pages, stats.num_shared_pages, stats.num_tokens, stats.num_unique_tokens) == (
        3,
        2,
        34,
        34,
    )


@pytest.mark.parametrize("lengths", [(33, 20), (20, 33)])
def test_a_shared_page_counts_with_the_row_that_uses_most_of_it(lengths):
    pool = open_pool()
    table = numbered_table(pool, 33)
    table.select([0, 0])
    table.truncate(np.array(lengths))
    stats = pool.stats()
    assert (stats.num_active_pages, stats.num_shared_pages) == (3, 2)
    assert (stats.num_tokens, stats.num_unique_tokens) == (53, 33)


def test_stats_of_an_empty_pool_are_zero():
    stats = open_pool().stats()
    assert (stats.num_pages, stats.num_active_pages, stats.num_tokens, stats.active_bytes) == (0, 0, 0, 0)
    assert stats.overhead == 0.0


def shrink_a_layer(pool, table):
    pool.storage(1).resize(1)


@pytest.mark.parametrize(
    ("cook", "message"),
    [
        (
            lambda pool, table: pool.groups[0].allocator.retain(table.row_pages(0)[:1]),
            "Reference counts differ from the",
        ),
        (
            lambda pool, table: pool.groups[0].allocator.release(table.row_pages(0)[:1]),
            "Reference counts differ from the",
        ),
        (lambda pool, table: pool.groups[0].take(1), "Reference counts differ from the"),
        (lambda pool, table: pool.groups[0].place(table.row_pages(0)[1:], [5]), r"Page \d+ is page 1 of a row, not 5"),
        (
            lambda pool, table: pool.groups[0].allocator._free.append(table.row_pages(0)[0]),
            r"held and 0 cached pages don't make 16 pages",
        ),
        (shrink_a_layer, "Layer 1 has 1 pages of 16"),
    ],
    ids=["retained", "released", "taken", "misplaced", "freed", "shrunk"],
)
def test_integrity_fails_when_the_books_are_cooked(cook, message):
    pool = open_pool()
    table = numbered_table(pool, 20)
    pool.check_integrity()
    cook(pool, table)
    with pytest.raises(RuntimeError, match=message):
        pool.check_integrity()


class Worker:
    """A thread's own tables, beside lists of numbers, on a pool that other threads use."""

    def __init__(self, pool, seed):
        self.pool = pool
        self.random = random.Random(seed)
        self.next_id = 100_000 * seed
        self.tables = []
        self.num_refused = 0
        self.open()

    def open(self):
        num_rows = self.random.randrange(1, 4)
        table = BlockTable(self.pool.groups[0])
        table.open_rows(num_rows)
        self.tables.append((table, [[] for _ in range(num_rows)]))

    def step(self):
        table, rows = self.random.choice(self.tables)
        match self.random.randrange(8):
            case 0 | 1 | 2 | 3:
                self.append(table, rows)
            case 4:
                lengths = [self.random.randrange(len(row) // 2, len(row) + 1) for row in rows]
                table.truncate(np.array(lengths))
                rows[:] = [row[:length] for row, length in zip(rows, lengths, strict=True)]
            case 5:
                self.tables.append((table.fork(), [list(row) for row in rows]))
            case 6:
                indices = [self.random.randrange(len(rows)) for _ in range(self.random.randrange(1, 4))]
                table.select(indices)
                rows[:] = [list(rows[index]) for index in indices]
            case 7:
                self.tables.remove((table, rows))
                del table
                self.open()
        del self.tables[:-4]
        self.check()

    def append(self, table, rows):
        new = []
        for _ in rows:
            count = self.random.choice([0, 1, 1, 5, 16, 17])
            new.append(list(range(self.next_id, self.next_id + count)))
            self.next_id += count
        try:
            append_ids(table, new)
        except OutOfPagesError:
            self.num_refused += 1
            return
        for row, ids in zip(rows, new, strict=True):
            row += ids

    def check(self):
        for table, rows in self.tables:
            assert read_ids(table) == rows


def work(pool, workers, num_steps, others=()):
    take_steps(workers, num_steps)
    check_books(pool, workers, others)


def take_steps(workers, num_steps):
    start = threading.Barrier(len(workers))

    def run(worker):
        start.wait()
        for _ in range(num_steps):
            worker.step()

    with ThreadPoolExecutor(len(workers)) as executor:
        for future in [executor.submit(run, worker) for worker in workers]:
            future.result()


def check_books(pool, workers, others=()):
    for worker in workers:
        worker.check()
    pool.check_integrity()
    holders = count_holders(*others, *(table for worker in workers for table, _ in worker.tables))
    assert pool.groups[0].allocator.num_active == len(holders)
    assert pool.stats().num_active_pages == len(holders)


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("restless_threads")
def test_threads_on_one_growing_pool_keep_their_own_tokens():
    pool = open_pool()
    work(pool, [Worker(pool, seed) for seed in range(1, 5)], num_steps=40)
    assert pool.num_pages > 16


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("restless_threads")
def test_threads_on_one_bounded_pool_keep_their_own_tokens_when_it_runs_out():
    pool = open_pool(num_pages=20)
    workers = [Worker(pool, seed) for seed in range(1, 5)]
    work(pool, workers, num_steps=40)
    assert sum(worker.num_refused for worker in workers) > 0


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("restless_threads")
def test_threads_that_write_while_the_pool_grows_and_is_trimmed_lose_nothing():
    pool = open_pool()
    workers = [Worker(pool, seed) for seed in range(1, 4)]
    done = threading.Event()

    def resize():
        while not done.is_set():
            pages = pool.groups[0].take(pool.num_pages + 1)
            pool.groups[0].allocator.release(pages)
            pool.trim()

    thread = threading.Thread(target=resize)
    thread.start()
    try:
        take_steps(workers, num_steps=20)
    finally:
        done.set()
        thread.join()
    check_books(pool, workers)  # now that nobody else holds a page


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("restless_threads")
def test_forks_of_one_table_may_be_written_by_different_threads():
    pool = open_pool()
    prompt = numbered_table(pool, 40)
    workers = []
    for seed in range(1, 5):
        worker = Worker(pool, seed)
        worker.tables = [(prompt.fork(), rows_of(40))]
        workers.append(worker)
    work(pool, workers, num_steps=25, others=[prompt])
    assert read_ids(prompt) == rows_of(40)


def test_a_layer_may_get_its_storage_while_others_are_cleared(monkeypatch):
    group = PagePool(tiny_config(), page_size=16).groups[0]
    tensor = torch.zeros(1, 2, 1, 16)
    group.open_storage(0, tensor, tensor)
    clear = LayerStorage.clear_values

    def clear_while_another_thread_opens(storage, pages):
        group.open_storage(1, tensor, tensor)
        clear(storage, pages)

    monkeypatch.setattr(LayerStorage, "clear_values", clear_while_another_thread_opens)
    group.clear_values([0])
    assert group.storage(1) is not None


# As much as fits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_part_of_the_free_memory_is_filled_with_pages_to_the_last_one(dtype, monkeypatch):
    model = tiny_llama().to(dtype)
    monkeypatch.setattr("hf_paged.pages.pool.free_bytes", lambda device: 10**6)
    pool = PagePool.from_model(model, page_size=16, memory_fraction=0.5)
    generate(model, "sdpa", PagedCache(pool=pool), random_ids(1, 3), max_new_tokens=2)
    reserved, page = pool.stats().reserved_bytes, 16 * pool.stats().token_bytes
    assert reserved <= 0.5 * 10**6 < reserved + page


def test_layers_with_a_window_are_counted_too(monkeypatch):
    model = tiny_gemma(24)
    monkeypatch.setattr("hf_paged.pages.pool.free_bytes", lambda device: 10**6)
    pool = PagePool.from_model(model, page_size=16, memory_fraction=0.9)
    generate(model, "sdpa", PagedCache(pool=pool), random_ids(1, 3), max_new_tokens=2)
    assert pool.max_pages * 16 * pool.stats().token_bytes <= 0.9 * 10**6


def test_what_is_free_is_known_here():
    assert 10**6 < free_bytes(torch.device("cpu")) < 10**15
    with pytest.raises(ValueError, match="How much memory is free on meta can't be told"):
        free_bytes(torch.device("meta"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memory_fraction": 0.5, "num_pages": 3}, "num_pages=3 and memory_fraction=0.5 were asked for"),
        ({"memory_fraction": 1.5}, "a fraction is above 0 and below 1"),
        ({"memory_fraction": 1e-15}, "has room for no page of 128 tokens"),
    ],
    ids=["both", "too much", "too little"],
)
def test_a_fraction_that_can_not_be_had_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PagePool.from_model(tiny_llama(), **arguments)
