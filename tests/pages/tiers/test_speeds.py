from concurrent.futures import ThreadPoolExecutor

from hf_paged.pages.tiers.speeds import Speeds


def test_what_is_not_known_is_tried():
    speeds = Speeds()
    assert speeds.favors("host", 1, 1)
    speeds.note_computed(100, seconds=1)
    assert not speeds.knows("host")
    assert speeds.favors("host", 10**9, 1)


def test_pages_are_brought_only_from_a_tier_that_is_faster_than_computing():
    speeds = Speeds()
    speeds.note_computed(1000, seconds=10)
    speeds.note_brought("host", 10_000, seconds=1e-3)
    speeds.note_brought("disk", 10_000, seconds=1)
    assert speeds.knows("host")
    assert speeds.favors("host", num_bytes=1000, num_tokens=1)
    assert not speeds.favors("disk", num_bytes=1000, num_tokens=1)
    assert speeds.favors("disk", num_bytes=1000, num_tokens=11)


def test_as_fast_as_computing_is_not_faster():
    speeds = Speeds()
    speeds.note_computed(1, seconds=1)
    speeds.note_brought("disk", 1, seconds=1)
    assert not speeds.favors("disk", 1, 1)


def test_what_was_measured_last_counts_most():
    speeds = Speeds()
    speeds.note_computed(10, seconds=100)  # with all that is compiled on the way
    for _ in range(20):
        speeds.note_computed(10, seconds=1)
    speeds.note_brought("disk", 10, seconds=2)
    assert not speeds.favors("disk", 10, 10)


def test_a_tier_that_was_slow_is_measured_again_after_a_while():
    speeds = Speeds()
    speeds.note_computed(10, seconds=1)
    speeds.note_brought("disk", 10, seconds=2)
    speeds.note_brought("host", 10, seconds=2)
    assert [speeds.favors("disk", 10, 10) for _ in range(101)] == [False] * 100 + [True]
    assert not speeds.knows("disk")
    assert not speeds.favors("host", 10, 10)
    speeds.note_brought("disk", 10, seconds=2)
    assert [speeds.favors("disk", 10, 10) for _ in range(101)] == [False] * 100 + [True]


def test_threads_tear_no_measurement_apart():
    speeds = Speeds()
    with ThreadPoolExecutor(4) as executor:
        list(executor.map(lambda _: speeds.note_computed(10, seconds=1), range(2000)))
        list(executor.map(lambda _: speeds.note_brought("disk", 10, seconds=0.5), range(2000)))
    assert speeds.favors("disk", 19, 10)
    assert not speeds.favors("disk", 20, 10)
