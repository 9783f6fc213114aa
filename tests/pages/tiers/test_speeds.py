import math
from concurrent.futures import ThreadPoolExecutor

import pytest

from hf_paged.pages.tiers.speeds import Speeds

MIB = 2**20


def test_what_is_not_known_takes_no_time_to_move_and_for_ever_to_compute():
    speeds = Speeds()
    assert not speeds.knows("disk")
    assert speeds.seconds_to_move("disk", MIB) == 0
    assert speeds.seconds_to_compute(1) == math.inf


def test_ways_are_measured_by_themselves():
    speeds = Speeds()
    speeds.note_moved("disk", 10 * MIB, seconds=1)
    speeds.note_moved("host", 10 * MIB, seconds=0.1)
    assert speeds.seconds_to_move("disk", 5 * MIB) == pytest.approx(0.5)
    assert speeds.seconds_to_move("host", 5 * MIB) == pytest.approx(0.05)


def test_what_was_moved_last_counts_most():
    speeds = Speeds()
    speeds.note_moved("disk", 64 * MIB, seconds=100)
    speeds.note_moved("disk", 64 * MIB, seconds=1)
    assert speeds.seconds_to_move("disk", 64 * MIB) == pytest.approx(51 / 1.5)
    for _ in range(20):
        speeds.note_moved("disk", 64 * MIB, seconds=1)
    assert speeds.seconds_to_move("disk", 64 * MIB) == pytest.approx(1, rel=1e-3)


def test_what_compiling_took_does_not_count_nor_do_a_few_tokens():
    speeds = Speeds()
    speeds.note_computed(63, seconds=0.001)
    assert speeds.seconds_to_compute(100) == math.inf
    speeds.note_computed(100, seconds=30)
    speeds.note_computed(100, seconds=1)
    speeds.note_computed(100, seconds=2)
    assert speeds.seconds_to_compute(200) == pytest.approx(2)


def test_computing_that_was_fast_long_ago_is_forgotten():
    speeds = Speeds()
    for seconds in (1, *[2] * 16):
        speeds.note_computed(100, seconds)
    assert speeds.seconds_to_compute(100) == pytest.approx(2)


def test_a_way_that_was_slow_is_measured_again_after_a_while():
    speeds = Speeds()
    for way in ("disk", "host"):
        speeds.note_moved(way, MIB, seconds=1)
    for _ in range(99):
        speeds.note_passed_over("disk")
    assert speeds.knows("disk")
    speeds.note_passed_over("disk")
    assert (speeds.knows("disk"), speeds.knows("host")) == (False, True)
    speeds.note_passed_over("disk")
    speeds.note_moved("disk", MIB, seconds=1)
    for _ in range(99):
        speeds.note_passed_over("disk")
    assert speeds.knows("disk")


def test_threads_tear_no_measurement_apart():
    speeds = Speeds()
    with ThreadPoolExecutor(4) as executor:
        list(executor.map(lambda _: speeds.note_moved("disk", MIB, seconds=1), range(2000)))
        list(executor.map(lambda _: speeds.note_computed(100, seconds=1), range(2000)))
    assert speeds.seconds_to_move("disk", MIB) == pytest.approx(1)
    assert speeds.seconds_to_compute(100) == pytest.approx(1)
