import random
from array import array

import pytest

from hf_paged.errors import OutOfPagesError
from hf_paged.pages.group import PageGroup
from hf_paged.pages.prefix_index import PrefixIndex

PAGE_SIZE = 16


def tokens(*values):
    """The tokens of pages that are full of one number each."""
    return array("i", [value for value in values for _ in range(PAGE_SIZE)]).tobytes()


def groups(*windows, num_pages=8):
    return [PageGroup([index], window, num_pages, num_pages, PAGE_SIZE, 0) for index, window in enumerate(windows)]


def fill(index, pool, origin, row):
    """Compute a row that nobody has: one page for each of its numbers, in each group; return the pages."""
    pages = [group.take(len(row)) for group in pool]
    for group, taken in zip(pool, pages, strict=True):
        group.place(taken, range(len(row)))
    index.add(origin, tokens(*row), [dict(enumerate(taken)) for taken in pages])
    return pages


def release(pool, pages):
    for group, taken in zip(pool, pages, strict=True):
        group.allocator.release(taken)


def check(index, pool, holders=()):
    for place, group in enumerate(pool):
        held = [page for pages in holders for page in pages[place]]
        group.allocator.check_integrity({page: held.count(page) for page in held}, index.places(place))


def found(index, pool, origin, row):
    """How many pages of a row are found; none is held afterwards."""
    prefix = index.match(origin, tokens(*row))
    release(pool, prefix.pages)
    return prefix.num_pages


def test_pages_are_found_as_far_as_their_tokens_are_the_same():
    pool = groups(None)
    index = PrefixIndex(pool)
    (pages,) = fill(index, pool, "model", [1, 2, 3])
    prefix = index.match("model", tokens(1, 2, 4, 5))
    assert (prefix.num_pages, prefix.pages, prefix.starts) == (2, [pages[:2]], [0])
    check(index, pool, [[pages], prefix.pages])
    release(pool, prefix.pages)
    assert found(index, pool, "model", [1, 2, 3]) == 3
    assert found(index, pool, "model", [2, 3]) == 0
    assert index.match("model", tokens(1, 2)[:-4]).num_pages == 1  # not a full page


def test_another_origin_finds_nothing():
    pool = groups(None)
    index = PrefixIndex(pool)
    fill(index, pool, ("model", "one tenant"), [1, 2])
    assert found(index, pool, ("model", "another"), [1, 2]) == 0
    assert found(index, pool, ("other model", "one tenant"), [1, 2]) == 0


def test_what_nobody_holds_is_cached_and_found_again():
    pool = groups(None)
    index = PrefixIndex(pool)
    pages = fill(index, pool, "model", [1, 2, 3])
    release(pool, pages)
    allocator = pool[0].allocator
    assert (allocator.num_free, allocator.num_active, allocator.num_cached) == (5, 0, 3)
    check(index, pool)
    prefix = index.match("model", tokens(1, 2))
    assert (allocator.num_free, allocator.num_active, allocator.num_cached) == (5, 2, 1)
    check(index, pool, [prefix.pages])


def test_the_oldest_row_is_evicted_first_and_its_end_before_its_beginning():
    pool = groups(None)
    index = PrefixIndex(pool)
    first, second = fill(index, pool, "model", [1, 2, 3]), fill(index, pool, "model", [4, 5, 6])
    release(pool, first)
    release(pool, second)
    taken = pool[0].take(4)  # two are free
    assert found(index, pool, "model", [1, 2, 3]) == 1
    assert found(index, pool, "model", [4, 5, 6]) == 3
    assert index.num_evicted_pages == 2
    check(index, pool, [[taken]])
    taken += pool[0].take(2)
    assert found(index, pool, "model", [1, 2, 3]) == 0
    assert found(index, pool, "model", [4, 5, 6]) == 2
    check(index, pool, [[taken]])


def test_held_pages_are_never_evicted():
    pool = groups(None)
    index = PrefixIndex(pool)
    pages = fill(index, pool, "model", [1, 2, 3])
    with pytest.raises(OutOfPagesError, match="needs 6 more pages, but 5 of 8 are free"):
        pool[0].take(6)
    assert found(index, pool, "model", [1, 2, 3]) == 3
    check(index, pool, [pages])


def test_nothing_is_evicted_for_a_request_that_will_not_fit():
    pool = groups(None)
    index = PrefixIndex(pool)
    release(pool, fill(index, pool, "model", [1, 2, 3]))
    with pytest.raises(OutOfPagesError, match="needs 9 more pages, but 5 of 8 are free and 3 can be evicted"):
        pool[0].take(9)
    assert found(index, pool, "model", [1, 2, 3]) == 3


def test_rows_that_part_share_what_is_before():
    pool = groups(None)
    index = PrefixIndex(pool)
    fill(index, pool, "model", [1, 2])
    shared = index.match("model", tokens(1, 7))
    (page,) = pool[0].take(1)
    pool[0].place([page], [1])
    index.add("model", tokens(1, 7), [{1: page}])
    assert found(index, pool, "model", [1, 2]) == found(index, pool, "model", [1, 7]) == 2
    assert shared.num_pages == 1


def test_tokens_that_are_indexed_stay_with_the_first_page():
    pool = groups(None)
    index = PrefixIndex(pool)
    first, second = fill(index, pool, "model", [1, 2]), fill(index, pool, "model", [1, 2])
    assert index.match("model", tokens(1, 2)).pages == first
    assert pool[0].allocator.ref_count(second[0][0]) == 1
    release(pool, second)
    assert pool[0].allocator.num_free == 6


@pytest.mark.parametrize(
    ("window", "last_pages", "start"), [(1, 0, 48), (2, 1, 47), (16, 1, 33), (17, 1, 32), (18, 2, 31), (64, 3, 0)]
)
def test_a_group_with_a_window_needs_what_the_next_query_sees(window, last_pages, start):
    pool = groups(None, window)
    index = PrefixIndex(pool)
    pages = fill(index, pool, "model", [1, 2, 3])
    prefix = index.match("model", tokens(1, 2, 3))
    assert prefix.starts == [0, start]
    assert prefix.pages == [pages[0], pages[1][3 - last_pages :]]


def test_a_prefix_ends_where_every_group_has_what_is_seen():
    pool = groups(None, 17)  # the next query sees the page before it
    index = PrefixIndex(pool)
    pages = [group.take(4) for group in pool]
    for group, taken in zip(pool, pages, strict=True):
        group.place(taken, range(4))
    index.add("model", tokens(1, 2, 3, 4), [dict(enumerate(pages[0])), {1: pages[1][1]}])
    prefix = index.match("model", tokens(1, 2, 3, 4))
    assert (prefix.num_pages, prefix.starts) == (2, [0, 16])
    assert prefix.pages == [pages[0][:2], [pages[1][1]]]


def test_only_windows_are_found_behind_pages_that_are_gone():
    pool = groups(17)
    index = PrefixIndex(pool)
    pages = fill(index, pool, "model", [1, 2, 3])
    pool[0].allocator.release(pages[0][:2])
    taken = pool[0].take(7)
    assert index.num_evicted_pages == 2
    prefix = index.match("model", tokens(1, 2, 3))
    assert (prefix.num_pages, prefix.pages) == (3, [[pages[0][2]]])
    check(index, pool, [[pages[0][2:]], prefix.pages, [taken]])


def test_forgetting_frees_what_nobody_holds():
    pool = groups(None)
    index = PrefixIndex(pool)
    held = fill(index, pool, "model", [1, 2])
    release(pool, fill(index, pool, "model", [3, 4]))
    index.clear()
    assert found(index, pool, "model", [1, 2]) == found(index, pool, "model", [3, 4]) == 0
    assert pool[0].allocator.num_free == 6
    check(index, pool, [held])


def test_growing_and_shrinking_keep_what_can_be_found():
    group = PageGroup([0], None, 0, 100, PAGE_SIZE, 0)
    index = PrefixIndex([group])
    pages = fill(index, [group], "model", [1, 2, 3])
    release([group], pages)
    group.trim()
    assert found(index, [group], "model", [1, 2, 3]) == 3
    taken = group.take(50)  # grows before it evicts
    assert found(index, [group], "model", [1, 2, 3]) == 3
    check(index, [group], [[taken]])


@pytest.mark.parametrize("seed", range(20))
def test_random_rows_are_found_as_in_a_plain_list(seed):
    """Rows of up to five numbers in two groups; what is found must be what was computed, and no page gets lost."""
    chance = random.Random(seed)
    pool = groups(None, 18, num_pages=12)
    index = PrefixIndex(pool)
    content = [{} for _ in pool]  # of pages: the numbers up to theirs
    held = []
    for _ in range(300):
        if held and chance.random() < 0.5:
            release(pool, held.pop(chance.randrange(len(held))))
            continue
        row = [chance.randrange(2) for _ in range(chance.randrange(1, 6))]
        prefix = index.match("model", tokens(*row))
        for pages, known, start in zip(prefix.pages, content, prefix.starts, strict=True):
            first = start // PAGE_SIZE
            assert [known[page] for page in pages] == [row[: first + i + 1] for i in range(len(pages))]
        held.append(prefix.pages)
        new = []
        try:
            for group in pool:
                new.append(group.take(len(row) - prefix.num_pages))
        except OutOfPagesError:
            release(pool[: len(new)], new)
            release(pool, held.pop())
            continue
        for group, pages, known in zip(pool, new, content, strict=True):
            group.place(pages, range(prefix.num_pages, len(row)))
            known.update({page: row[: prefix.num_pages + i + 1] for i, page in enumerate(pages)})
        index.add("model", tokens(*row), [dict(enumerate(pages, prefix.num_pages)) for pages in new])
        held[-1] = [one + other for one, other in zip(held[-1], new, strict=True)]
        check(index, pool, held)
    for pages in held:
        release(pool, pages)
    check(index, pool)
