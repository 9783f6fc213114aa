"""What has left its device comes back as it was, or not at all."""

import logging
import random
import threading
from array import array
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import pytest
import torch

from hf_paged.errors import OutOfPagesError
from hf_paged.pages.group import PageGroup
from hf_paged.pages.prefix_index import PrefixIndex
from hf_paged.pages.tiers import prefixes
from hf_paged.pages.tiers.host import HostTier
from hf_paged.pages.tiers.prefixes import PrefixTiers
from hf_paged.pages.tiers.transport import page_bytes, read_pages, write_pages

PAGE_SIZE = 16
MIB = 2**20


class Disk:
    """A tier without a bound, which may be told to lose pages."""

    def __init__(self):
        self.contents = {}
        self.num_read = 0

    @property
    def num_bytes(self):
        return sum(content.nbytes for content in self.contents.values())

    def put(self, key, content):
        self.contents[key] = content

    def get(self, key):
        self.num_read += 1
        return self.contents.get(key)

    def __contains__(self, key):
        return key in self.contents


class Rows:
    """Rows of numbers, one for each page, that are computed or brought.

    A page's content follows from its group and from all of its row up to its end, so that it is known whether it is
    right.
    """

    def __init__(self, *windows, num_pages=8, **tiers):
        self.groups = [
            PageGroup([2 * index, 2 * index + 1], window, num_pages, num_pages, PAGE_SIZE, 0)
            for index, window in enumerate(windows)
        ]
        like = torch.zeros(1, 1, 1, 2)
        for group in self.groups:
            for layer in group.layers:
                group.open_storage(layer, like, like)
        self.tiers = PrefixTiers(self.groups, tiers)
        self.index = PrefixIndex(self.groups, self.tiers)
        self.page_bytes = page_bytes(self.groups[0].storages())

    def content(self, group, origin, row):
        seed = sha256(repr((group, origin, row)).encode()).digest()
        return torch.frombuffer(bytearray(seed * (self.page_bytes // 32)), dtype=torch.uint8)

    def find(self, origin, row):
        """Pages of the longest prefix that is on the device, or brought there, and held."""
        tokens, arrivals = tokens_of(row), self.tiers.arrivals()
        prefix = self.index.match(origin, tokens)
        prefix = self.tiers.extend(
            origin, tokens, prefix, self.index.ahead(origin, tokens, prefix.num_pages), arrivals
        )
        arrivals.finish()
        for index, group in enumerate(self.groups):
            first = prefix.starts[index] // PAGE_SIZE
            assert len(prefix.pages[index]) == prefix.num_pages - first
            for place, (page, content) in enumerate(
                zip(prefix.pages[index], read_pages(group.storages(), prefix.pages[index]), strict=True), first
            ):
                assert torch.equal(content, self.content(index, origin, row[: place + 1]))
                assert group.physical_to_logical(torch.device("cpu"))[page] == place
        return prefix

    def prefill(self, origin, row):
        """Bring or compute a row; return how many pages were not computed."""
        prefix = self.find(origin, row)
        places = range(prefix.num_pages, len(row))
        held, by_place = [list(pages) for pages in prefix.pages], []
        try:
            for index, (group, found, start) in enumerate(zip(self.groups, prefix.pages, prefix.starts, strict=True)):
                pages = group.take(len(places))
                held[index] += pages
                group.place(pages, places)
                contents = [self.content(index, origin, row[: place + 1]) for place in places]
                write_pages(group.storages(), pages, contents)
                by_place.append(dict(enumerate(found, start // PAGE_SIZE)) | dict(zip(places, pages, strict=True)))
            self.index.add(origin, tokens_of(row), by_place)
            return prefix.num_pages
        finally:
            self.release(held)

    def release(self, pages):
        for group, held in zip(self.groups, pages, strict=True):
            group.allocator.release(held)

    def check(self):
        for place, group in enumerate(self.groups):
            group.check_integrity(self.index.places(place))

    def evict(self):
        for group in self.groups:
            group.allocator.release(group.take(group.num_pages))


def tokens_of(row):
    return array("i", [number for number in row for _ in range(PAGE_SIZE)]).tobytes()


class OneByte:
    """A hash with 256 values."""

    def __init__(self, data):
        self._hash = sha256(data)

    def update(self, data):
        self._hash.update(data)

    def copy(self):
        copy = OneByte(b"")
        copy._hash = self._hash.copy()
        return copy

    def digest(self):
        return self._hash.digest()[:1]


WINDOWS = pytest.mark.parametrize("windows", [(None,), (None, 24), (40,), (24, None, 40)], ids=str)


@WINDOWS
def test_what_was_evicted_comes_back_where_its_tokens_are_the_same(windows):
    rows = Rows(*windows, host=HostTier(MIB))
    assert rows.prefill("model", (1, 2, 3, 4)) == 0
    rows.evict()
    assert rows.prefill("model", (1, 2, 5)) == 2
    assert rows.prefill("another", (1, 2)) == 0
    rows.evict()
    assert rows.prefill("model", (1, 2, 3, 4, 6)) == 4
    assert rows.prefill("model", (2, 3, 4)) == 0
    rows.check()


def test_pages_that_are_on_the_device_behind_a_gap_are_not_brought_again():
    rows = Rows(None, 40, host=HostTier(MIB))
    rows.prefill("model", (1, 2, 3, 4))
    rows.index.evict(0, 4)
    rows.prefill("model", (1, 2, 3, 4))
    assert (rows.tiers.num_demoted_pages, rows.tiers.num_promoted_pages) == (4, 4)
    assert rows.index.match("model", tokens_of((1, 2, 3, 4))).num_pages == 4


def test_what_is_kept_already_is_not_copied_again():
    rows = Rows(None, host=HostTier(MIB))
    rows.prefill("model", (1, 2, 3))
    rows.evict()
    rows.prefill("model", (1, 2, 3, 4))
    rows.evict()
    assert (rows.tiers.num_demoted_pages, rows.tiers.num_promoted_pages) == (4, 3)


def test_the_end_of_a_row_goes_down_first():
    below = Disk()
    host = HostTier(2 * Rows(None, host=below).page_bytes, below)
    rows = Rows(None, host=host, store=below)
    rows.prefill("model", (1, 2, 3, 4))
    rows.evict()
    assert sorted(len(key.tokens) // PAGE_SIZE // 4 for key in below.contents) == [3, 4]
    assert rows.prefill("model", (1, 2, 3, 4)) == 4
    assert below.num_read == 2


@WINDOWS
def test_pages_that_a_tier_has_lost_are_computed(windows):
    disk = Disk()
    rows = Rows(*windows, num_pages=16, store=disk)
    rows.prefill("model", (1, 2, 3, 4, 5))
    rows.evict()
    lost = [key for key in disk.contents if len(key.tokens) >= 4 * PAGE_SIZE * 4]
    disk.contents |= dict.fromkeys(lost)  # they seem to be there
    assert rows.prefill("model", (1, 2, 3, 4, 5)) == 3
    rows.check()


def test_nothing_is_brought_into_layers_that_have_no_storage_yet():
    disk = Disk()
    rows = Rows(None, store=disk)
    rows.prefill("model", (1, 2))
    rows.evict()
    group = PageGroup([0, 1], None, 8, 8, PAGE_SIZE, 0)
    tiers = PrefixTiers([group], {"store": disk})
    index, tokens = PrefixIndex([group], tiers), tokens_of((1, 2))
    like = torch.zeros(1, 1, 1, 2)
    for num_found, layer in ((0, 0), (0, 1), (2, None)):
        found = index.match("model", tokens)
        found = tiers.extend("model", tokens, found, index.ahead("model", tokens, 0), tiers.arrivals())
        assert found.num_pages == num_found
        if layer is not None:
            group.open_storage(layer, like, like)


@pytest.mark.parametrize("like", [torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 2, dtype=torch.float64)])
def test_pages_of_another_shape_or_dtype_are_not_brought(like):
    disk = Disk()
    rows = Rows(None, store=disk)
    rows.prefill("model", (1, 2))
    rows.evict()
    group = PageGroup([0, 1], None, 8, 8, PAGE_SIZE, 0)
    for layer in group.layers:
        group.open_storage(layer, like, like)
    tiers = PrefixTiers([group], {"store": disk})
    index, tokens = PrefixIndex([group], tiers), tokens_of((1, 2))
    found = index.match("model", tokens)
    assert tiers.extend("model", tokens, found, [{}], tiers.arrivals()).num_pages == 0


def test_a_prefix_for_which_there_are_no_pages_stays_where_it_is():
    rows = Rows(None, num_pages=4, host=HostTier(MIB))
    rows.prefill("model", (1, 2, 3))
    rows.evict()
    held = rows.groups[0].take(4)
    assert rows.find("model", (1, 2, 3)).num_pages == 0
    rows.groups[0].allocator.release(held)
    rows.check()


def test_a_failing_copy_leaks_no_page(monkeypatch):
    rows = Rows(None, 40, host=HostTier(MIB))
    rows.prefill("model", (1, 2, 3))
    rows.evict()

    def fail(*arguments):
        raise MemoryError("no room to gather")

    monkeypatch.setattr("hf_paged.pages.tiers.arrivals.write_pages", fail)
    with pytest.raises(MemoryError, match="no room to gather"):
        rows.find("model", (1, 2, 3))
    rows.check()


def test_pages_that_can_not_be_copied_to_the_host_make_room_all_the_same(monkeypatch, caplog):
    rows = Rows(None, host=HostTier(MIB))
    rows.prefill("model", (1, 2, 3))

    def fail(*arguments):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(prefixes, "read_pages", fail)
    with caplog.at_level(logging.WARNING, logger=prefixes.__name__):
        rows.evict()
    assert [record.getMessage() for record in caplog.records] == [
        "Pages that make room for others are not kept: they could not be copied to the host: CUDA error: out of memory"
    ]
    assert rows.prefill("model", (1, 2, 3)) == 0


# Only what is worth it


def slow(rows, seconds_per_page):
    """Let the disk seem to take so long, where computing a page takes a second."""
    rows.tiers.speeds.note_computed(1600, seconds=100)
    rows.tiers.speeds.note_moved("store", 64 * rows.page_bytes, 64 * seconds_per_page)


def test_a_tier_that_is_slower_than_computing_is_not_read():
    disk = Disk()
    rows = Rows(None, num_pages=16, store=disk)
    rows.prefill("model", (1, 2, 3, 4, 5))
    rows.evict()
    slow(rows, 1.1)
    assert rows.prefill("model", (1, 2, 3, 4, 5)) == 0
    assert disk.num_read == 0
    rows.evict()
    slow(rows, 0.001)
    assert rows.prefill("model", (1, 2, 3, 4, 5)) == 5


def test_a_tier_of_which_nothing_is_known_shows_with_one_page_how_slow_it_is(monkeypatch):
    disk, now = Disk(), [0.0]
    get = disk.get
    monkeypatch.setattr(prefixes, "perf_counter", lambda: now[0])

    def get_slowly(key):
        now[0] += 2
        return get(key)

    disk.get = get_slowly
    rows = Rows(None, num_pages=16, store=disk)
    rows.prefill("model", (1, 2, 3, 4, 5))
    rows.evict()
    rows.tiers.speeds.note_computed(1600, seconds=100)
    assert rows.prefill("model", (1, 2, 3, 4, 5)) == 1
    assert disk.num_read == 1
    rows.evict()
    assert rows.prefill("model", (1, 2, 3, 4, 5)) == 0
    for _ in range(100):
        rows.tiers.speeds.note_passed_over("store")
    rows.evict()
    assert rows.prefill("model", (1, 2, 3, 4, 5)) == 1


def test_a_slow_tier_behind_a_fast_one_is_left_where_it_begins():
    disk = Disk()
    host = HostTier(3 * Rows(None, host=disk).page_bytes, disk)
    rows = Rows(None, num_pages=16, host=host, store=disk)
    rows.prefill("model", (1, 2, 3, 4, 5))
    rows.evict()
    slow(rows, 1.1)
    assert rows.prefill("model", (1, 2, 3, 4, 5)) == 3
    assert disk.num_read == 0


def test_a_window_is_worth_more_than_its_pages_hold():
    """They stand for all tokens before them."""
    disk = Disk()
    rows = Rows(24, num_pages=16, store=disk)
    rows.prefill("model", (1, 2, 3, 4, 5, 6))
    rows.evict()
    slow(rows, 2)
    assert rows.prefill("model", (1, 2, 3, 4, 5, 6)) == 6
    assert disk.num_read == 2
    rows.evict()
    slow(rows, 10)
    assert rows.prefill("model", (1, 2, 3, 4, 5, 6)) == 0
    assert disk.num_read == 2


# Any calls


class Worker:
    """Prefills random rows of two numbers, so that many begin alike."""

    def __init__(self, rows, seed):
        self.rows = rows
        self.random = random.Random(seed)
        self.num_found = self.num_refused = 0

    def step(self):
        row = tuple(self.random.randrange(2) for _ in range(self.random.randrange(1, 6)))
        try:
            self.num_found += self.rows.prefill(self.random.choice(["one", "other"]), row)
        except OutOfPagesError:
            self.num_refused += 1


@pytest.fixture(params=["sha256", "one byte"])
def _hash(request, monkeypatch):
    if request.param == "one byte":
        monkeypatch.setattr(prefixes, "sha256", OneByte)


@pytest.mark.usefixtures("_hash")
@WINDOWS
@pytest.mark.parametrize("host_bytes", [1, 12000, MIB])
def test_every_page_that_is_found_holds_its_tokens(windows, host_bytes):
    disk = Disk()
    rows = Rows(*windows, num_pages=9, host=HostTier(host_bytes, disk), store=disk)
    worker = Worker(rows, seed=0)
    for _ in range(150):
        worker.step()
        rows.check()
        assert rows.tiers.tiers["host"].num_bytes <= host_bytes
    assert worker.num_refused == 0
    assert rows.tiers.num_promoted_pages > 50


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("restless_threads")
@WINDOWS
def test_threads_find_the_right_pages(windows):
    disk = Disk()
    rows = Rows(*windows, num_pages=12, host=HostTier(12000, disk), store=disk)
    workers = [Worker(rows, seed) for seed in range(4)]
    start = threading.Barrier(len(workers))

    def run(worker):
        start.wait()
        for _ in range(25):
            worker.step()

    with ThreadPoolExecutor(len(workers)) as executor:
        list(executor.map(run, workers))
    rows.check()
    assert rows.tiers.num_promoted_pages > 0
    assert sum(group.allocator.num_active for group in rows.groups) == 0
