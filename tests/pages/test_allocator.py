import random
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hf_paged import OutOfPagesError
from hf_paged.pages import allocator as allocator_module
from hf_paged.pages.allocator import PageAllocator


def counts(allocator: PageAllocator) -> tuple[int, int, int, int]:
    return allocator.num_pages, allocator.num_free, allocator.num_active, allocator.num_shared


@pytest.mark.parametrize("num_pages", [0, 1, 7])
def test_a_new_allocator_has_every_page_free(num_pages):
    assert counts(PageAllocator(num_pages)) == (num_pages, num_pages, 0, 0)


@pytest.mark.parametrize("arguments", [(-1, 0), (4, -1)])
def test_negative_sizes_are_refused(arguments):
    with pytest.raises(ValueError, match="both must be >= 0"):
        PageAllocator(*arguments)


def test_allocated_pages_are_distinct_and_have_one_holder():
    allocator = PageAllocator(10)
    pages = allocator.allocate(4) + allocator.allocate(6)
    assert sorted(pages) == list(range(10))
    assert [allocator.ref_count(page) for page in pages] == [1] * 10
    assert counts(allocator) == (10, 0, 10, 0)


def test_released_pages_are_handed_out_again_before_untouched_ones():
    allocator = PageAllocator(10)
    pages = allocator.allocate(4)
    allocator.release(pages[1:3])
    assert set(allocator.allocate(2)) == set(pages[1:3])
    assert allocator.num_free == 6


def test_a_request_may_mix_released_and_untouched_pages():
    allocator = PageAllocator(5)
    first = allocator.allocate(3)
    allocator.release(first[:1])
    assert sorted(allocator.allocate(3) + first[1:]) == list(range(5))


def test_allocating_nothing_takes_nothing():
    allocator = PageAllocator(0)
    assert allocator.allocate(0) == []
    assert counts(allocator) == (0, 0, 0, 0)


def test_a_page_is_free_only_when_its_last_holder_lets_go():
    allocator = PageAllocator(2)
    [page] = allocator.allocate(1)
    allocator.retain([page], times=2)
    for num_holders in (3, 2):
        assert allocator.ref_count(page) == num_holders
        assert counts(allocator) == (2, 1, 1, 1)
        allocator.release([page])
    assert counts(allocator) == (2, 1, 1, 0)
    allocator.release([page])
    assert counts(allocator) == (2, 2, 0, 0)


def test_a_page_named_twice_is_retained_and_released_twice():
    allocator = PageAllocator(1)
    [page] = allocator.allocate(1)
    allocator.retain([page, page])
    assert (allocator.ref_count(page), allocator.num_shared) == (3, 1)
    allocator.release([page, page, page])
    assert counts(allocator) == (1, 1, 0, 0)
    allocator.check_integrity({})


def test_retaining_an_unheld_page_raises_and_retains_nothing():
    allocator = PageAllocator(3)
    [page] = allocator.allocate(1)
    with pytest.raises(ValueError, match="has no holder, so it can't be shared"):
        allocator.retain([page, 2])
    allocator.check_integrity({page: 1})


@pytest.mark.parametrize(
    "choose",
    [
        pytest.param(lambda single, shared, unheld: [unheld], id="unheld"),
        pytest.param(lambda single, shared, unheld: [single, shared, unheld], id="after held ones"),
        pytest.param(lambda single, shared, unheld: [single, single], id="more often than held"),
        pytest.param(lambda single, shared, unheld: [shared, single, shared, shared], id="shared too often"),
    ],
)
def test_releasing_an_unheld_page_raises_and_releases_nothing(choose):
    allocator = PageAllocator(3)
    single, shared = allocator.allocate(2)
    allocator.retain([shared])
    before = counts(allocator)
    with pytest.raises(ValueError, match="was released more often than it was held"):
        allocator.release(choose(single, shared, 2))
    assert counts(allocator) == before
    allocator.check_integrity({single: 1, shared: 2})


def test_releasing_a_page_that_does_not_exist_raises_and_releases_nothing():
    allocator = PageAllocator(3)
    [page] = allocator.allocate(1)
    with pytest.raises(ValueError, match="Page 99 "):
        allocator.release([page, 99])
    allocator.check_integrity({page: 1})


def test_retaining_zero_times_raises_and_changes_nothing():
    allocator = PageAllocator(1)
    pages = allocator.allocate(1)
    with pytest.raises(ValueError, match="at least 1 is needed"):
        allocator.retain(pages, times=0)
    assert counts(allocator) == (1, 0, 1, 0)


def test_too_large_a_request_says_needed_free_and_total_and_what_to_do_and_takes_nothing():
    allocator = PageAllocator(7)
    held = allocator.allocate(4)
    with pytest.raises(OutOfPagesError, match=r"needs 5 more pages, but 3 of 7 are free\. Raise num_pages, or free"):
        allocator.allocate(5)
    assert counts(allocator) == (7, 3, 4, 0)
    allocator.check_integrity(dict.fromkeys(held, 1))
    assert len(allocator.allocate(3)) == 3


def test_new_rows_leave_the_watermark_to_running_ones():
    allocator = PageAllocator(5, watermark=2)
    with pytest.raises(OutOfPagesError, match=r"5 of 5 are free \(2 of them held back for running rows\)"):
        allocator.allocate(4, admit=True)
    assert allocator.num_free == 5
    assert len(allocator.allocate(3, admit=True)) == 3
    with pytest.raises(OutOfPagesError, match=r"needs 1 more pages, but 2 of 5 are free \(2 of them held back"):
        allocator.allocate(1, admit=True)
    assert len(allocator.allocate(2)) == 2


def test_a_later_release_is_collected_by_the_next_operation():
    allocator = PageAllocator(3)
    pages = allocator.allocate(3)
    allocator.retain(pages[:1])
    allocator.release_later(pages[:1])
    allocator.release_later(pages[1:])
    assert counts(allocator) == (3, 2, 1, 0)


@pytest.mark.parametrize("count", [1, 3])
def test_a_later_release_makes_room_for_the_allocation_that_collects_it(count):
    allocator = PageAllocator(3)
    allocator.release_later(allocator.allocate(3))
    assert len(allocator.allocate(count)) == count


@pytest.mark.timeout(30)
def test_a_later_release_does_not_wait_for_the_lock():
    allocator = PageAllocator(2)
    pages = allocator.allocate(2)
    with allocator._lock:  # as a finaliser finds it that runs in the middle of another operation
        allocator.release_later(pages)
    assert allocator.num_free == 2


def test_growing_adds_free_pages_and_keeps_what_is_held():
    allocator = PageAllocator(2)
    held = allocator.allocate(2)
    allocator.grow(5)
    assert counts(allocator) == (5, 3, 2, 0)
    assert sorted(held + allocator.allocate(3)) == list(range(5))


def test_growing_to_fewer_pages_changes_nothing():
    allocator = PageAllocator(4)
    allocator.grow(2)
    assert allocator.num_pages == 4


def test_shrinking_drops_the_free_pages_behind_the_last_held_one():
    allocator = PageAllocator(10)
    pages = allocator.allocate(6)
    held = {pages[1]: 1, pages[3]: 1}
    allocator.release([page for page in pages if page not in held])
    last = max(held)
    assert allocator.shrink() == last + 1
    assert counts(allocator) == (last + 1, last + 1 - 2, 2, 0)
    allocator.check_integrity(held)
    assert sorted([*allocator.allocate(last - 1), *held]) == list(range(last + 1))


def test_shrinking_without_holders_leaves_nothing_and_growing_starts_over():
    allocator = PageAllocator(8)
    allocator.release_later(allocator.allocate(5))
    assert allocator.shrink() == 0
    assert counts(allocator) == (0, 0, 0, 0)
    allocator.grow(3)
    assert sorted(allocator.allocate(3)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("cook", "message"),
    [
        (lambda allocator: allocator._ref_counts.__setitem__(0, 2), r"differ from the holders at pages \[0\]"),
        (lambda allocator: allocator._free.append(0), "free, 2 held and 0 cached pages don't make 4 pages"),
        (lambda allocator: allocator._free.append(2), "free, 2 held and 0 cached pages don't make 4 pages"),
        (
            lambda allocator: setattr(allocator, "_num_touched", 3),
            "free, 2 held and 0 cached pages don't make 4 pages",
        ),
        (lambda allocator: setattr(allocator, "_num_shared", 1), "1 pages are said to be shared, which is not so"),
    ],
    ids=["count", "held page is free", "page free twice", "page lost", "shared"],
)
def test_cooked_books_are_noticed(cook, message):
    allocator = PageAllocator(4)
    allocator.allocate(2)
    allocator.check_integrity({0: 1, 1: 1})
    cook(allocator)
    with pytest.raises(RuntimeError, match=message):
        allocator.check_integrity({0: 1, 1: 1})


def test_a_holder_that_the_books_do_not_know_is_noticed():
    allocator = PageAllocator(4)
    with pytest.raises(RuntimeError, match=r"differ from the holders at pages \[3\]"):
        allocator.check_integrity({3: 1})


def lines_and_bytes(num_pages: int) -> tuple[int, int]:
    """Lines that the allocator runs, and the most memory it takes, for the same work in a pool of `num_pages`."""
    allocator = PageAllocator(num_pages)
    # Ids small enough that CPython has them ready: the memory for larger ints is not the allocator's.
    allocator.release(allocator.allocate(8)[::-1])
    num_lines = 0

    def count(frame, event, argument):
        nonlocal num_lines
        if frame.f_code.co_filename != allocator_module.__file__:
            return None
        num_lines += event == "line"
        return count

    def work():
        pages = allocator.allocate(8)
        allocator.retain(pages)
        allocator.release(pages + pages)
        assert allocator.num_free == num_pages
        assert (allocator.num_active, allocator.num_shared) == (0, 0)

    previous = sys.gettrace()
    sys.settrace(count)
    try:
        work()
    finally:
        sys.settrace(previous)
    tracemalloc.start()
    try:
        work()
        return num_lines, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_work_of_an_operation_does_not_depend_on_the_size_of_the_pool():
    few_lines, few_bytes = lines_and_bytes(10)
    many_lines, many_bytes = lines_and_bytes(1_000_000)
    assert many_lines == few_lines > 0
    assert many_bytes < few_bytes + 1_000


def test_a_large_pool_is_not_made_of_a_list_of_pages():
    allocator = PageAllocator(1_000_000)
    sizes = {name: sys.getsizeof(value) for name, value in vars(allocator).items()}
    assert sum(sizes.values()) < 6_000_000  # an array of 32-bit counts; a list of a million takes 8 MB alone


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("restless_threads")
def test_eight_threads_leave_balanced_books():
    num_threads, num_pages = 8, 60
    allocator = PageAllocator(num_pages)
    start = threading.Barrier(num_threads)

    def hammer(seed: int) -> list[int]:
        random_ = random.Random(seed)
        held: list[int] = []
        start.wait()
        for _ in range(600):
            match random_.randrange(6):
                case 0:
                    try:
                        held += allocator.allocate(random_.randrange(1, 6))
                    except OutOfPagesError:
                        continue
                case 1 if held:
                    chosen = random_.choices(held, k=2)
                    allocator.retain(chosen)
                    held += chosen
                case 2 if held:
                    random_.shuffle(held)
                    count = random_.randrange(1, 1 + min(6, len(held)))
                    held, released = held[count:], held[:count]
                    allocator.release(released)
                case 3 if held:
                    allocator.release_later([held.pop()])
                case 4:
                    allocator.shrink(num_pages // 2)
                    allocator.grow(num_pages)
                case 5:
                    try:
                        allocator.release(allocator.allocate(1))
                    except OutOfPagesError:
                        continue
        return held

    with ThreadPoolExecutor(num_threads) as executor:
        held_by = list(executor.map(hammer, range(num_threads)))
    owners = [set(held) for held in held_by]
    assert sum(map(len, owners)) == len(set().union(*owners)), "two threads were given the same page"
    holders = {page: held.count(page) for held in held_by for page in held}
    assert holders, "the threads are meant to end with pages in their hands"
    allocator.check_integrity(holders)
    assert counts(allocator) == (
        num_pages,
        num_pages - len(holders),
        len(holders),
        sum(count > 1 for count in holders.values()),
    )


class AllocatorMachine(RuleBasedStateMachine):
    """Random operations beside a dict of page to number of holders."""

    @initialize(num_pages=st.integers(0, 6), watermark=st.integers(0, 3))
    def build(self, num_pages, watermark):
        self.allocator = PageAllocator(num_pages, watermark)
        self.num_pages = num_pages
        self.watermark = watermark
        self.holders: dict[int, int] = {}

    def hands(self) -> list[int]:
        return [page for page, count in sorted(self.holders.items()) for _ in range(count)]

    def let_go(self, pages):
        for page in pages:
            self.holders[page] -= 1
            if self.holders[page] == 0:
                del self.holders[page]

    @rule(count=st.integers(0, 5), admit=st.booleans())
    def allocate(self, count, admit):
        num_free = self.num_pages - len(self.holders)
        if count > num_free - (self.watermark if admit else 0):
            with pytest.raises(OutOfPagesError, match=f"needs {count} more pages, but {num_free} of {self.num_pages}"):
                self.allocator.allocate(count, admit=admit)
            return
        pages = self.allocator.allocate(count, admit=admit)
        assert len(set(pages)) == count
        assert all(0 <= page < self.num_pages and page not in self.holders for page in pages)
        self.holders.update(dict.fromkeys(pages, 1))

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), times=st.integers(1, 3))
    def retain(self, data, times):
        pages = data.draw(st.lists(st.sampled_from(sorted(self.holders)), max_size=4))
        self.allocator.retain(pages, times)
        for page in pages:
            self.holders[page] += times

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), later=st.booleans())
    def release(self, data, later):
        pages = data.draw(st.permutations(self.hands()))[: data.draw(st.integers(1, 6))]
        (self.allocator.release_later if later else self.allocator.release)(pages)
        self.let_go(pages)

    @precondition(lambda self: self.num_pages)
    @rule(data=st.data())
    def release_too_often(self, data):
        page = data.draw(st.integers(0, self.num_pages - 1))
        pages = [*self.hands(), page]
        with pytest.raises(ValueError, match="was released more often than it was held"):
            self.allocator.release(data.draw(st.permutations(pages)))

    @rule(more=st.integers(0, 4))
    def grow(self, more):
        self.num_pages += more
        self.allocator.grow(self.num_pages)

    @rule()
    def shrink(self):
        self.num_pages = 1 + max(self.holders, default=-1)
        assert self.allocator.shrink() == self.num_pages

    @invariant()
    def books_balance(self):
        assert counts(self.allocator) == (
            self.num_pages,
            self.num_pages - len(self.holders),
            len(self.holders),
            sum(count > 1 for count in self.holders.values()),
        )
        assert all(self.allocator.ref_count(page) == self.holders.get(page, 0) for page in range(self.num_pages))
        self.allocator.check_integrity(self.holders)


TestAllocatorAgainstADict = AllocatorMachine.TestCase
TestAllocatorAgainstADict.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
