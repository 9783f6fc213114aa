import gc

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hf_paged import OutOfPagesError
from hf_paged.pages.block_table import BlockTable
from tests.reference import (
    EDGES,
    append_ids,
    count_holders,
    numbered_table,
    open_pool,
    read_ids,
    rows_of,
    write_ids,
)

pytestmark = pytest.mark.usefixtures("quick_collection")


def counts(*numbers):
    return np.array(numbers, dtype=np.int64)


def state(table):
    """Everything that a failed operation must leave as it was."""
    pages = [table.row_pages(row) for row in range(table.num_rows)]
    allocator = table.group.allocator
    return (
        (pages, table.lengths.tolist(), read_ids(table)),
        (allocator.num_pages, allocator.num_free, allocator.num_active, allocator.num_shared),
    )


@pytest.fixture
def copies(monkeypatch):
    """Record the page copies of every pool, each as (sources, targets)."""
    recorded = []

    def watch(pool):
        copy_pages = pool.groups[0].copy_pages

        def copy_and_record(sources, targets):
            recorded.append((list(sources), list(targets)))
            copy_pages(sources, targets)

        monkeypatch.setattr(pool.groups[0], "copy_pages", copy_and_record)
        return recorded

    return watch


@pytest.mark.parametrize("length", [0, *EDGES])
def test_a_row_holds_just_the_pages_that_its_tokens_need(length):
    pool = open_pool()
    table = numbered_table(pool, length, 5)
    assert [len(table.row_pages(row)) for row in (0, 1)] == [-(-length // 16), 1]
    assert read_ids(table) == rows_of(length, 5)
    pool.check_integrity()


def test_tokens_added_one_by_one_take_a_page_at_each_edge():
    pool = open_pool()
    table = numbered_table(pool, 1)
    expected = rows_of(40)
    for number in expected[0][1:]:
        append_ids(table, [[number]])
        assert pool.groups[0].allocator.num_active == number // 16 + 1
    assert read_ids(table) == expected


def test_held_pages_counts_the_used_slots_of_each_page():
    table = numbered_table(open_pool(), 33, 0, 16)
    table.reserve(counts(16, 0, 0))
    first, _, third = (table.row_pages(row) for row in range(3))
    assert list(table.held_pages()) == [*zip(first, range(4), [16, 16, 1, 0], strict=True), (third[0], 0, 16)]


def test_reserved_tokens_count_only_once_they_are_committed():
    table = numbered_table(open_pool(), 15, 20)
    table.reserve(counts(2, 0))
    assert table.lengths.tolist() == [15, 20]
    assert [len(table.row_pages(row)) for row in (0, 1)] == [2, 2]
    table.commit(counts(2, 0))
    assert table.lengths.tolist() == [17, 20]


def test_reserving_within_the_last_page_takes_nothing_and_keeps_the_version():
    pool = open_pool()
    table = numbered_table(pool, 10)
    before, version = state(table), table.version
    table.reserve(counts(6))
    assert state(table) == before
    assert table.version == version


@pytest.mark.parametrize("more", EDGES)
def test_rolling_back_gives_the_reserved_pages_back(more):
    pool = open_pool()
    table = numbered_table(pool, 15, 16)
    before = state(table)
    table.reserve(counts(more, more))
    table.roll_back()
    assert state(table)[0] == before[0]
    assert pool.groups[0].allocator.num_active == 2
    pool.check_integrity()


def test_a_rolled_back_copy_leaves_the_tokens_as_they_were():
    pool = open_pool()
    table = numbered_table(pool, 10)
    fork = table.fork()
    table.reserve(counts(20))
    write_ids(table, 0, 10, range(500, 520))
    table.roll_back()
    assert read_ids(table) == read_ids(fork) == rows_of(10)
    pool.check_integrity()


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 32, 33])
def test_truncating_releases_the_pages_behind(length):
    pool = open_pool()
    table = numbered_table(pool, 33, 20)
    table.truncate(counts(length, 20))
    assert pool.groups[0].allocator.num_active == -(-length // 16) + 2
    assert read_ids(table) == rows_of(length, 20)
    append_ids(table, [list(range(length, 40)), [1020]])
    assert read_ids(table) == rows_of(40, 21)
    pool.check_integrity()


@pytest.mark.parametrize("indices", [[2, 0, 1], [0, 0, 0], [1, 1, 2], [2], [0, 1, 2, 0, 1], [0, 1, 2], []])
def test_selecting_rows_moves_no_token_and_counts_the_holders(indices, copies):
    pool = open_pool()
    recorded = copies(pool)
    table = numbered_table(pool, 33, 5, 16)
    pages = [table.row_pages(row) for row in range(3)]
    table.select(indices)
    assert recorded == []
    assert [table.row_pages(row) for row in range(table.num_rows)] == [pages[index] for index in indices]
    assert read_ids(table) == [rows_of(33, 5, 16)[index] for index in indices]
    holders = count_holders(table)
    assert pool.groups[0].allocator.num_active == len(holders)
    assert pool.groups[0].allocator.num_shared == sum(count > 1 for count in holders.values())
    pool.check_integrity()


@pytest.mark.parametrize("indices", [[0, 0, 1], [1, 0], [0, 0]])
def test_selected_rows_go_their_own_ways(indices):
    pool = open_pool()
    table = numbered_table(pool, 17, 30)
    table.select(indices)
    expected = [rows_of(17, 30)[index] for index in indices]
    for number in range(5000, 5020):
        new = [[number + 100 * row] for row in range(len(indices))]
        append_ids(table, new)
        expected = [old + added for old, added in zip(expected, new, strict=True)]
    assert read_ids(table) == expected
    pool.check_integrity()


def test_a_fork_shares_every_page(copies):
    pool = open_pool()
    recorded = copies(pool)
    table = numbered_table(pool, 33, 5)
    fork = table.fork()
    assert recorded == []
    assert [fork.row_pages(row) for row in (0, 1)] == [table.row_pages(row) for row in (0, 1)]
    assert read_ids(fork) == rows_of(33, 5)
    assert (pool.groups[0].allocator.num_active, pool.groups[0].allocator.num_shared) == (4, 4)
    pool.check_integrity()


@pytest.mark.parametrize("which", ["parent", "fork"])
@pytest.mark.parametrize("length", [1, 15, 17, 31, 33])
def test_writing_to_shared_rows_copies_only_the_partial_last_page(length, which, copies):
    pool = open_pool()
    recorded = copies(pool)
    table = numbered_table(pool, length)
    tables = {"parent": table, "fork": table.fork()}
    shared = table.row_pages(0)
    append_ids(tables[which], [[7777]])
    [(sources, targets)] = recorded
    assert sources == shared[-1:]
    assert len(targets) == 1
    assert tables[which].row_pages(0) == [*shared[:-1], *targets]
    other = "fork" if which == "parent" else "parent"
    assert tables[other].row_pages(0) == shared
    assert read_ids(tables[which]) == [[*range(length), 7777]]
    assert read_ids(tables[other]) == rows_of(length)
    assert pool.groups[0].allocator.num_shared == len(shared) - 1
    append_ids(tables[which], [[7778]])
    append_ids(tables[other], [[8888]])
    assert len(recorded) == 1, "both have a last page of their own by now"
    assert read_ids(tables[other]) == [[*range(length), 8888]]
    pool.check_integrity()


@pytest.mark.parametrize("length", [16, 32])
def test_full_shared_pages_are_never_copied(length, copies):
    pool = open_pool()
    recorded = copies(pool)
    table = numbered_table(pool, length)
    fork = table.fork()
    append_ids(table, [[7777]])
    append_ids(fork, [[8888]])
    assert recorded == []
    assert (read_ids(table), read_ids(fork)) == ([[*range(length), 7777]], [[*range(length), 8888]])
    assert pool.groups[0].allocator.num_shared == length // 16


@pytest.mark.parametrize("num_rows", [2, 3, 8])
@pytest.mark.parametrize("is_held_elsewhere", [False, True])
def test_rows_that_share_a_last_page_leave_it_to_one_of_them(num_rows, is_held_elsewhere, copies):
    pool = open_pool()
    recorded = copies(pool)
    table = numbered_table(pool, 20)
    fork = table.fork() if is_held_elsewhere else None
    table.select([0] * num_rows)
    append_ids(table, [[2000 + row] for row in range(num_rows)])
    [(sources, targets)] = recorded
    assert len(sources) == len(set(targets)) == num_rows - (not is_held_elsewhere)
    assert len({table.row_pages(row)[1] for row in range(num_rows)}) == num_rows
    assert len({table.row_pages(row)[0] for row in range(num_rows)}) == 1
    assert read_ids(table) == [[*range(20), 2000 + row] for row in range(num_rows)]
    assert fork is None or read_ids(fork) == rows_of(20)
    pool.check_integrity()


def test_only_rows_that_write_get_a_copy(copies):
    pool = open_pool()
    recorded = copies(pool)
    table = numbered_table(pool, 20, 5)
    fork = table.fork()
    pages = [table.row_pages(row) for row in (0, 1)]
    append_ids(table, [[], [7777]])
    assert [sources for sources, _ in recorded] == [pages[1]]
    append_ids(table, [[7777], []])
    assert [sources for sources, _ in recorded] == [pages[1], pages[0][1:]]
    assert read_ids(table) == [[*range(20), 7777], [*range(1000, 1005), 7777]]
    assert read_ids(fork) == rows_of(20, 5)


def test_a_row_shortened_into_a_shared_page_copies_it_before_writing(copies):
    pool = open_pool()
    recorded = copies(pool)
    table = numbered_table(pool, 33)
    fork = table.fork()
    append_ids(table, [[7777]])
    table.truncate(counts(20))
    append_ids(table, [[8888]])
    assert [sources for sources, _ in recorded] == [fork.row_pages(0)[2:], fork.row_pages(0)[1:2]]
    assert read_ids(table) == [[*range(20), 8888]]
    assert read_ids(fork) == rows_of(33)


@pytest.mark.parametrize("let_go", [BlockTable.clear, None], ids=["cleared", "deleted"])
def test_the_last_holder_writes_in_place(let_go, copies):
    pool = open_pool(num_pages=1)
    recorded = copies(pool)
    table = numbered_table(pool, 5)
    fork = table.fork()
    if let_go is not None:
        let_go(fork)
    del fork
    gc.collect()
    append_ids(table, [[5]])
    assert recorded == []
    assert read_ids(table) == rows_of(6)


@pytest.mark.parametrize("ends", ["written", "given_up"])
def test_a_table_that_supersedes_another_writes_behind_its_tokens(ends, copies):
    pool = open_pool(num_pages=2)
    recorded = copies(pool)
    table = numbered_table(pool, 5, 7)
    successor = table.fork()
    successor.supersede(table)
    append_ids(successor, [[5], [1007]])
    assert recorded == []
    assert read_ids(successor) == rows_of(6, 8)
    assert read_ids(table) == rows_of(5, 7)
    pool.check_integrity()
    (table if ends == "written" else successor).clear()
    kept = successor if ends == "written" else table
    append_ids(kept, [[8000], [8001]])
    assert recorded == []
    pool.check_integrity()


def test_a_table_that_supersedes_another_copies_what_others_or_several_rows_hold(copies):
    pool = open_pool()
    recorded = copies(pool)
    table = numbered_table(pool, 5, 7)
    other = table.fork()
    other.select([0])
    successor = table.fork()
    successor.supersede(table)
    successor.select([0, 1, 1])
    shared = [table.row_pages(row)[0] for row in range(2)]
    append_ids(successor, [[5], [1007], [8000]])
    [(sources, _)] = recorded
    assert sources == shared
    assert read_ids(successor) == [*rows_of(6, 8), [*rows_of(5, 7)[1], 8000]]
    assert (read_ids(table), read_ids(other)) == (rows_of(5, 7), rows_of(5))
    table.clear()
    fork = successor.fork()
    append_ids(successor, [[6], [1008], [8001]])
    assert len(recorded[1][0]) == 3, "what was superseded counts no longer"
    assert read_ids(fork)[0] == list(range(6))
    pool.check_integrity()


@pytest.mark.parametrize(
    ("more", "needed"),
    [
        ((1, 0), 1),  # the copy of a shared last page
        ((13, 0), 2),  # that and a new page
        ((0, 17), 2),  # a full page needs no copy
        ((1, 1), 2),
    ],
)
def test_too_large_a_reservation_leaves_everything_as_it_was(more, needed, copies):
    pool = open_pool(num_pages=5)
    recorded = copies(pool)
    table = numbered_table(pool, 20, 16)
    fork = table.fork()
    blocker = numbered_table(pool, 16 * (3 - needed))  # one page less than needed is left
    before, version = state(table), table.version
    with pytest.raises(OutOfPagesError, match=f"needs {needed} more pages, but {needed - 1} of 5 are free"):
        table.reserve(counts(*more))
    assert state(table) == before
    assert table.version == version
    assert recorded == []
    assert read_ids(fork) == rows_of(20, 16)
    pool.check_integrity()
    blocker.clear()
    append_ids(table, [[7000 + at for at in range(count)] for count in more])
    assert table.lengths.tolist() == [20 + more[0], 16 + more[1]]
    pool.check_integrity()


def test_new_rows_leave_the_watermark_but_running_rows_may_use_it():
    pool = open_pool(num_pages=3, watermark=1)
    table = BlockTable(pool.groups[0])
    table.open_rows(1)
    with pytest.raises(OutOfPagesError, match=r"needs 3 more pages, but 3 of 3 are free \(1 of them held back"):
        table.reserve(counts(33))
    append_ids(table, rows_of(32))
    other = BlockTable(pool.groups[0])
    other.open_rows(1)
    with pytest.raises(OutOfPagesError, match=r"needs 1 more pages, but 1 of 3 are free \(1 of them held back"):
        other.reserve(counts(1))
    append_ids(table, [[32]])
    assert read_ids(table) == rows_of(33)


def test_opening_rows_starts_over():
    pool = open_pool()
    table = numbered_table(pool, 33, 5)
    table.open_rows(3)
    assert pool.groups[0].allocator.num_active == 0
    assert table.lengths.tolist() == [0, 0, 0]
    append_ids(table, rows_of(1, 16, 17))
    assert read_ids(table) == rows_of(1, 16, 17)


def test_clearing_releases_every_page_and_leaves_no_row():
    pool = open_pool()
    table = numbered_table(pool, 33, 5)
    fork = table.fork()
    table.clear()
    assert (table.num_rows, table.lengths.tolist()) == (0, [])
    assert (pool.groups[0].allocator.num_active, pool.groups[0].allocator.num_shared) == (4, 0)
    assert read_ids(fork) == rows_of(33, 5)
    fork.clear()
    assert pool.groups[0].allocator.num_active == 0
    pool.check_integrity()


def test_a_deleted_table_frees_its_pages():
    pool = open_pool()
    table, other = numbered_table(pool, 33, 5), numbered_table(pool, 20)
    fork = table.fork()
    del table
    gc.collect()
    assert (pool.groups[0].allocator.num_active, pool.groups[0].allocator.num_shared) == (6, 0)
    del fork
    gc.collect()
    assert pool.groups[0].allocator.num_active == 2
    assert read_ids(other) == rows_of(20)
    pool.check_integrity()


@pytest.mark.timeout(30)
def test_a_table_may_die_while_the_allocator_is_busy():
    pool = open_pool()
    table = numbered_table(pool, 33)
    with pool.groups[0].allocator._lock:
        del table
        gc.collect()
    assert pool.groups[0].allocator.num_active == 0
    pool.check_integrity()


def test_the_block_table_stays_in_place_until_it_must_grow():
    table = numbered_table(open_pool(), 1, 1)
    block_table = table.block_table
    append_ids(table, [list(range(1, 16 * 16)), []])
    assert table.block_table is block_table
    append_ids(table, [[16 * 16], []])
    assert table.block_table.shape[1] > block_table.shape[1]
    assert read_ids(table) == rows_of(16 * 16 + 1, 1)


def test_the_version_changes_with_the_block_table():
    table = numbered_table(open_pool(), 20, 5)
    changes = [
        lambda: table.reserve(counts(20, 0)),
        table.roll_back,
        lambda: table.select([1, 0]),
        lambda: table.truncate(counts(2, 2)),
        table.clear,
        lambda: table.open_rows(1),
    ]
    for change in changes:
        version = table.version
        change()
        assert table.version != version


class TableMachine(RuleBasedStateMachine):
    """Tables on one pool beside lists of numbers."""

    @initialize(num_pages=st.sampled_from([None, 6, 12]), num_rows=st.integers(1, 3))
    def build(self, num_pages, num_rows):
        self.pool = open_pool(num_pages)
        table = BlockTable(self.pool.groups[0])
        table.open_rows(num_rows)
        self.tables = [(table, [[] for _ in range(num_rows)])]
        self.next_id = 0

    def pick(self, which):
        return self.tables[which % len(self.tables)]

    @rule(which=st.integers(0, 3), data=st.data())
    def append(self, which, data):
        table, rows = self.pick(which)
        sizes = [data.draw(st.sampled_from([0, 1, 2, 15, 16, 17])) for _ in rows]
        new = []
        for size in sizes:
            new.append(list(range(self.next_id, self.next_id + size)))
            self.next_id += size
        try:
            append_ids(table, new)
        except OutOfPagesError:
            assert self.pool.max_pages is not None
            return
        for row, ids in zip(rows, new, strict=True):
            row += ids

    @rule(which=st.integers(0, 3), data=st.data())
    def write_and_roll_back(self, which, data):
        table, rows = self.pick(which)
        more = data.draw(st.lists(st.integers(0, 17), min_size=len(rows), max_size=len(rows)))
        try:
            table.reserve(counts(*more))
        except OutOfPagesError:
            return
        for row, (ids, count) in enumerate(zip(rows, more, strict=True)):
            if count:
                write_ids(table, row, len(ids), [-1] * count)
        table.roll_back()

    @rule(which=st.integers(0, 3), data=st.data())
    def truncate(self, which, data):
        table, rows = self.pick(which)
        lengths = [data.draw(st.integers(0, len(ids))) for ids in rows]
        table.truncate(counts(*lengths))
        rows[:] = [ids[:length] for ids, length in zip(rows, lengths, strict=True)]

    @rule(which=st.integers(0, 3), data=st.data())
    def select(self, which, data):
        table, rows = self.pick(which)
        indices = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=4))
        table.select(indices)
        rows[:] = [list(rows[index]) for index in indices]

    @rule(which=st.integers(0, 3))
    def fork(self, which):
        if len(self.tables) < 4:
            table, rows = self.pick(which)
            self.tables.append((table.fork(), [list(ids) for ids in rows]))

    @rule(which=st.integers(0, 3))
    def drop(self, which):
        if len(self.tables) > 1:
            self.tables.pop(which % len(self.tables))

    @rule()
    def trim(self):
        self.pool.trim()

    @invariant()
    def tables_hold_what_the_lists_hold(self):
        for table, rows in self.tables:
            assert table.lengths.tolist() == [len(ids) for ids in rows]
            assert read_ids(table) == rows
            assert [len(table.row_pages(row)) for row in range(len(rows))] == [-(-len(ids) // 16) for ids in rows]

    @invariant()
    def books_balance(self):
        self.pool.check_integrity()
        holders = count_holders(*(table for table, _ in self.tables))
        allocator = self.pool.groups[0].allocator
        assert allocator.num_active == len(holders)
        assert allocator.num_shared == sum(count > 1 for count in holders.values())
        assert all(allocator.ref_count(page) == holders.get(page, 0) for page in range(allocator.num_pages))


TestTablesAgainstLists = TableMachine.TestCase
TestTablesAgainstLists.settings = settings(
    max_examples=50, stateful_step_count=30, deadline=None, derandomize=True, database=None
)
