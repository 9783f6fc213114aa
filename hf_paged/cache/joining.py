"""Caches joined into one batch, and a batch taken apart."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_paged.batch.known_ids import KnownIds
from hf_paged.batch.padding import Columns
from hf_paged.batch.sequences import Sequences

if TYPE_CHECKING:
    from hf_paged.cache.paged import PagedCache


def join(caches: Sequence["PagedCache"]) -> "PagedCache":
    """Make a cache of the rows of others, which keep them; no token is copied.

    Args:
        caches: on one pool, at least one.

    Raises:
        UnclearPassError: if one of them is in the middle of a forward pass.
        ValueError: if there are none, or they don't belong together.
    """
    from hf_paged.cache.paged import PagedCache  # which needs this module

    caches = list(caches)
    if not caches:
        raise ValueError("concatenate() was given no caches, but a cache is of some pool. Pass at least one.")
    for cache in caches:
        if not isinstance(cache, PagedCache):
            raise ValueError(
                f"concatenate() was given a {type(cache).__name__}, but it joins caches over pages: pass PagedCaches "
                "of one pool."
            )
    if any(cache.pool is not caches[0].pool for cache in caches):
        raise ValueError(
            "concatenate() was given caches of different pools, whose pages can't stand in one batch. Make them by "
            "PagedCache(pool=pool) or by fork(), or compute the prompts in one cache."
        )
    if len({cache._sequences.salt for cache in caches}) > 1:
        raise ValueError(
            "concatenate() was given caches with different salts, which keep apart what they have computed. Join "
            "caches with one salt."
        )
    forks = [cache.fork() for cache in caches]
    try:
        _join(forks[0]._sequences, [fork._sequences for fork in forks[1:]])
        return forks.pop(0)
    finally:
        for fork in forks:
            fork._sequences.clear()


def take_over(cache: "PagedCache", other: "PagedCache") -> None:
    """Let the rows of another cache follow those of a cache, which stays what it is: what was captured of it counts.

    Args:
        cache: between two passes.
        other: on the same pool, of the same model and salt; is empty afterwards.

    Raises:
        OutOfPagesError: if the other is in memory of the host, and the pool has too few pages; nothing has changed.
    """
    first, second = cache._sequences, other._sequences
    for sequences in (first, second):
        sequences.end_step()
    rows, added = first.rows, second.rows
    tables, num_rows, num_added = added.tables, rows.count if rows.columns.count else 0, added.count
    for table, part in zip(rows.tables, tables, strict=True):
        if num_rows:
            table.select([*range(num_rows), *[0] * num_added])
            table.release(range(num_rows, num_rows + num_added))
        else:
            table.open_rows(num_added)
        for row in range(num_added):
            pages = part.row_pages(row)
            table.group.allocator.retain(pages)
            table.adopt(num_rows + row, pages, int(part.starts[row]), int(part.lengths[row]))
    parts = [(each, count) for each, count in ((rows, num_rows), (added, num_added)) if count]
    known = KnownIds()
    known.join([(each.known_ids, each.columns, count) for each, count in parts])
    rows.columns, rows.known_ids = Columns.joined([(each.columns, count) for each, count in parts]), known
    rows.states.join([each.states for each, _ in parts])
    rows.absent = added.absent
    rows.origin = added.origin if all(each.origin == added.origin for each, _ in parts) else None
    rows.is_plain = all(each.is_plain for each, _ in parts)
    second.clear()


def _join(first: Sequences, others: Sequence[Sequences]) -> None:
    parts = [sequences for sequences in (first, *others) if sequences.rows.columns.count]
    if not parts:
        return
    if len({sequences.rows.absent for sequences in parts}) > 1:
        raise ValueError(
            "concatenate() was given caches that hold different layers, as their models pass over some. Join caches "
            "that one model has filled."
        )
    joined = Sequences(first.pool)
    joined.rows.join([sequences.rows for sequences in parts])
    first.exchange(joined)
    joined.clear()
    first.records_past = all(sequences.records_past for sequences in parts)


def take_apart(cache: "PagedCache") -> list["PagedCache"]:
    """Make a cache of each row; columns before its first token are left out. No token is copied.

    Raises:
        UnclearPassError: if the cache is in the middle of a forward pass.
    """
    cache._sequences.end_step()
    parts = []
    for row in range(cache._sequences.rows.num_committed):
        part = cache.fork()
        part._sequences.select([row])
        if part.lengths[0]:
            part._sequences.rows.drop_padding()
        else:
            part.reset()
        parts.append(part)
    return parts
