import gc
import random
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hf_paged import OutOfPagesError
from hf_paged.pages.tiers.base import PageKey
from hf_paged.pages.tiers.host import HostTier


def key(number):
    return PageKey(digest=b"%d" % number, parent=b"", tokens=b"")


def content(number, num_bytes=10):
    return torch.full((num_bytes,), number % 251, dtype=torch.uint8)


class Everything:
    """A tier without a bound."""

    def __init__(self):
        self.contents = {}

    def put(self, key, content):
        self.contents[key] = content


def test_a_page_is_found_by_all_of_its_key_whatever_the_digest():
    tier = HostTier(100)
    keys = [PageKey(b"x", parent, tokens) for parent in (b"a", b"b") for tokens in (b"1", b"2")]
    for number, page in enumerate(keys[:3]):
        tier.put(page, content(number))
    for number, page in enumerate(keys[:3]):
        assert torch.equal(tier.get(page), content(number))
        assert page in tier
    assert keys[3] not in tier
    assert tier.get(keys[3]) is None


def test_the_page_that_was_not_used_for_longest_is_dropped_and_handed_down():
    below = Everything()
    tier = HostTier(30, below)
    for number in range(3):
        tier.put(key(number), content(number))
    tier.get(key(0))
    tier.put(key(1), content(1))
    tier.put(key(3), content(3))
    assert [number for number in range(4) if key(number) in tier] == [0, 1, 3]
    assert list(below.contents) == [key(2)]
    assert torch.equal(below.contents[key(2)], content(2))


def test_a_page_that_does_not_fit_at_all_is_handed_down():
    below = Everything()
    tier = HostTier(30, below)
    tier.put(key(0), content(0))
    tier.put(key(1), content(1, 31))
    assert list(below.contents) == [key(1)]
    assert (tier.num_pages, tier.num_bytes) == (1, 10)


def test_a_page_that_is_put_twice_is_held_once():
    tier = HostTier(30)
    first = content(0)
    tier.put(key(0), first)
    tier.put(key(0), content(0))
    assert (tier.num_pages, tier.num_bytes) == (1, 10)
    assert tier.get(key(0)) is first


def test_pages_make_room_for_what_is_set_aside_and_get_it_back():
    tier = HostTier(30, Everything())
    for number in range(3):
        tier.put(key(number), content(number))
    bytes_of_rows = tier.set_aside(15)
    assert (tier.num_pages, tier.set_aside_bytes) == (1, 15)
    assert list(tier.next_tier.contents) == [key(0), key(1)]
    tier.put(key(3), content(3, 16))
    assert key(3) not in tier
    del bytes_of_rows
    tier.put(key(3), content(3, 16))
    assert (tier.num_bytes, tier.set_aside_bytes) == (26, 0)


def test_no_more_is_set_aside_than_there_is():
    tier = HostTier(30)
    tier.put(key(0), content(0))
    kept = tier.set_aside(25)
    with pytest.raises(OutOfPagesError, match=r"needs 6 bytes of the host, but of host_bytes=30 only 5 are not taken"):
        tier.set_aside(6)
    assert tier.set_aside_bytes == kept.num_bytes == 25


def test_bytes_may_be_given_back_while_the_tier_is_locked():
    tier = HostTier(30)
    cycle = [tier.set_aside(30)]
    cycle.append(cycle)
    del cycle
    with tier._lock:
        gc.collect()
    assert tier.set_aside(30).num_bytes == 30


@pytest.mark.parametrize("seed", range(5))
def test_any_calls_leave_the_pages_that_were_used_last(seed):
    random_ = random.Random(seed)
    tier, below = HostTier(200, Everything()), {}
    expected, aside, taken = OrderedDict(), [], 0
    for _ in range(400):
        match random_.randrange(4):
            case 0 | 1:
                page, size = random_.randrange(30), random_.choice([1, 10, 40, 150])
                size = expected.get(page, size)
                tier.put(key(page), content(page, size))
                if page in expected or size <= 200 - taken:
                    expected[page] = size
                    expected.move_to_end(page)
                else:
                    below[page] = size
            case 2:
                page = random_.randrange(30)
                found = tier.get(key(page))
                assert (found is not None) == (page in expected)
                if found is not None:
                    assert torch.equal(found, content(page, expected[page]))
                    expected.move_to_end(page)
            case 3 if aside and random_.random() < 0.5:
                taken -= aside.pop(random_.randrange(len(aside))).num_bytes
            case 3:
                size = random_.choice([0, 20, 60])
                if taken + size <= 200:
                    aside.append(tier.set_aside(size))
                    taken += size
                else:
                    with pytest.raises(OutOfPagesError, match="not taken by rows"):
                        tier.set_aside(size)
        while sum(expected.values()) + taken > 200:
            page, size = expected.popitem(last=False)
            below[page] = size
        assert [key(page) for page in expected] == list(tier._contents)
        assert (tier.num_bytes, tier.set_aside_bytes) == (sum(expected.values()), taken)
        assert set(tier.next_tier.contents) == {key(page) for page in below}


@pytest.mark.usefixtures("restless_threads")
def test_threads_find_what_belongs_to_a_key_and_keep_within_the_bound():
    tier = HostTier(100, HostTier(200))
    start = threading.Barrier(4)

    def work(seed):
        random_ = random.Random(seed)
        start.wait()
        for _ in range(150):
            number = random_.randrange(40)
            match random_.randrange(3):
                case 0:
                    tier.put(key(number), content(number))
                case 1:
                    found = tier.get(key(number))
                    assert found is None or torch.equal(found, content(number))
                case 2:
                    kept = tier.set_aside(random_.randrange(20))
                    assert kept.num_bytes + tier.num_bytes <= 100
                    del kept

    with ThreadPoolExecutor(4) as executor:
        for future in [executor.submit(work, seed) for seed in range(4)]:
            future.result()
    for held in (tier, tier.next_tier):
        assert held.set_aside_bytes == 0
        assert held.num_bytes == 10 * held.num_pages <= held.max_bytes
