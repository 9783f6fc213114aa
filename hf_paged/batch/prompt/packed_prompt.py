"""A prompt whose tokens are computed packed: one row after another, without padding, in chunks."""

from collections.abc import Hashable

import numpy as np
from torch import Tensor

from hf_paged.batch.padding import BoolMatrix, Columns, Counts
from hf_paged.batch.prompt.prefixes import RowPrefixes
from hf_paged.batch.sequences import Sequences
from hf_paged.batch.steps.duplicates import equal_rows
from hf_paged.batch.steps.packed import Chunk, PackedStep, Packing
from hf_paged.errors import NotPackable
from hf_paged.pages.block_table import BlockTable
from hf_paged.pages.tiers.arrivals import Arrivals
from hf_paged.pages.tiers.speeds import Speeds


class PackedPrompt:
    """New tokens of the rows of a cache, and a fork of these rows in which they are computed.

    If that fails, the cache is as it was. A row of the fork stands for all rows that get the same tokens. Rows are
    computed in waves: with a prefix index, those that begin alike wait for the first one, whose pages they share.

    Args:
        sequences: of the cache, which must not write as long as this does.
        ids: `(num_rows, num_columns)` what is in the columns, those that are cached included.
        attention_mask: like `ids`, 0 for padding; None without padding.
        max_tokens: tokens of a chunk.
        kept: `(num_rows,)` where the history has changed: first tokens of each row that stay, wherever they stand in
            `ids` now; the others are new. None: those in the columns that are cached stay.
        origin: what makes the keys and values. Where the pool has a prefix index, pages of the same origin are taken
            from it, and added to it. None: neither.

    Attributes:
        sequences: the fork. The model is given a cache over it.
        stand_ins: `(num_rows,)` for each row of the cache, which row of the fork stands for it.

    Raises:
        NotPackable: if the mask hides tokens that are cached.
        ValueError: if rows or mask don't fit what is cached.
    """

    def __init__(
        self,
        sequences: Sequences,
        ids: Tensor,
        attention_mask: Tensor | None,
        max_tokens: int,
        kept: Counts | None = None,
        origin: Hashable | None = None,
    ) -> None:
        self.sequences = Sequences(sequences.pool, begins_steps=False)
        self.sequences.become_fork_of(sequences)
        if kept is None:
            self.sequences.rows.supersede(sequences.rows)
        self._max_tokens = max_tokens
        self._packing: Packing
        self._next_columns: Columns
        self.stand_ins: Counts
        self._tokens: Counts  # of the fork
        self._is_new: BoolMatrix
        self._prefixes: RowPrefixes | None = None
        try:
            self._pack(ids.cpu().numpy(), attention_mask, kept, origin)
        except BaseException:
            self.sequences.clear()
            raise

    @property
    def longest(self) -> int:
        """Tokens of the longest row, the new ones included."""
        return int((self.sequences.rows.lengths + self._is_new.sum(axis=1)).max())

    @property
    def num_tokens(self) -> int:
        """New tokens of this wave."""
        return self._packing.num_tokens

    def next_wave(self) -> bool:
        """Take on rows whose tokens can be computed now; return whether there are any.

        Raises:
            OutOfPagesError: if the pool has too few pages. Of layers that drop pages on the way, as many as will be
                held at once are known to be free.
        """
        self._settle()
        rows = self.sequences.rows
        waiting = np.flatnonzero(self._is_new.any(axis=1)).tolist()
        if not waiting:
            return False
        if self._prefixes is not None and self._has_all_columns:
            waiting = self._prefixes.adopt(rows.tables, waiting)
        is_new = np.zeros_like(self._is_new)
        for row in waiting:
            new_columns = np.flatnonzero(self._is_new[row])
            is_new[row, new_columns[rows.lengths[row] if self._has_all_columns else 0 :]] = True
        self._is_new[waiting] = False
        lengths = rows.lengths.copy()
        columns = self._next_columns.selected(self._originals)
        self._packing = Packing(rows.columns, columns, lengths, self._tokens, is_new)
        self._reserve()
        return True

    def end_where_found(self) -> int | None:
        """Let the prompt of a single row end with what is found of it, if a chunk is enough for the rest.

        Whoever wants scores of the last column, too, then computes both in one pass.

        Returns:
            Columns that the prompt has now; None if it is to be computed in waves, as there are several rows, or
            padding, or more than a chunk is left, or pages are still on their way when a pass begins.
        """
        is_simple = len(self.stand_ins) == 1 and self._next_columns.real is None and self._has_all_columns
        if not is_simple or self._prefixes is None or self._arrivals is not None:
            return None
        self._prefixes.adopt(self.sequences.rows.tables, [0])
        num_found = int(self.sequences.rows.lengths[0])
        if self._is_new.shape[1] - num_found > self._max_tokens:
            return None
        self._next_columns = self._next_columns.truncated(num_found)
        self._is_new[:] = False
        return num_found

    def begin(self, first: int, num_queries: int) -> Chunk:
        """Begin the pass over the next tokens.

        Args:
            first: tokens that are done.
            num_queries: tokens that the model will be given. If fewer are left, the last ones belong to no row.

        Raises:
            OutOfPagesError: if other holders took the pages meanwhile that layers with a window need.
        """
        rows = self.sequences.rows
        chunk = self._packing.chunk(first, first + num_queries)
        step = PackedStep(rows.tables, rows.columns, self._packing, chunk, num_queries)
        step.arrivals = self._arrivals
        for table in filter(self._drops, rows.tables):
            assert table.group.window is not None
            table.drop(self._packing.starts(table.group.window, first))
            table.reserve(step.counts)
        self.sequences.begin(step)
        return chunk

    def end(self) -> None:
        """End a pass.

        Raises:
            NotPackable: if it did not go through all layers.
        """
        self.sequences.commit_first()
        if self.sequences.step is not None:
            missing = sorted(self.sequences.progress.missing)
            raise NotPackable(f"it passed over layers {missing}, which its configuration has")
        if self._prefixes is not None:
            self._prefixes.add(self.sequences.rows.tables)  # now, since some will be dropped as the next pass begins

    def unpack(self) -> None:
        """Let the rows of the fork be all rows, with the new columns."""
        self._settle()
        rows = self.sequences.rows
        for table in rows.tables:
            table.select(self.stand_ins.tolist())
        rows.columns = self._next_columns
        rows.origin = self._origin
        self.sequences.drop_past()

    def close(self) -> None:
        """Release what the fork still holds."""
        if self._arrivals is not None:
            self._arrivals.finish()
        self.sequences.clear()

    @property
    def speeds(self) -> Speeds | None:
        """What wants to know how long a wave took, as pages might be brought instead; None: nothing."""
        index = self.sequences.pool.prefix_index
        return None if index is None or index.tiers is None else index.tiers.speeds

    def _settle(self) -> None:
        """Let pages be found that were brought back, also if nothing was left to compute behind them."""
        if self._arrivals is not None and self._prefixes is not None:
            self._arrivals.finish()
            self._prefixes.add(self.sequences.rows.tables)

    @property
    def _arrivals(self) -> Arrivals | None:
        return None if self._prefixes is None else self._prefixes.arrivals

    def _pack(self, ids: Counts, attention_mask: Tensor | None, kept: Counts | None, origin: Hashable | None) -> None:
        rows = self.sequences.rows
        if kept is not None:
            rows.keep(kept, Columns())
        num_rows, num_cached = len(ids), rows.columns.count
        num_new = ids.shape[1] - num_cached
        mask = None if attention_mask is None else attention_mask.bool().cpu().numpy()
        columns, new, past_is_visible = rows.split(num_rows, num_new, mask)
        if not past_is_visible:
            raise NotPackable("attention_mask hides tokens that are cached")
        if kept is None:
            rows.admit(num_rows)
        rows.is_fanned_out = False  # for good
        self._next_columns = columns.extended(new, num_rows, num_new)
        is_new = np.ones((num_rows, num_new), dtype=bool) if new is None else new
        tokens = np.where(is_new, ids[:, num_cached:], 0)
        originals, self.stand_ins = np.unique(equal_rows(rows.tables, tokens, new), return_inverse=True)
        self._originals: list[int] = originals.tolist()
        for table in rows.tables:
            table.select(self._originals)
        rows.columns = columns.selected(self._originals)
        self._tokens, self._is_new = tokens[originals], is_new[originals]
        is_fresh = not rows.lengths.any()
        self._has_all_columns = is_fresh or kept is not None
        pool = self.sequences.pool
        is_known = is_fresh or (rows.origin == origin and (kept is not None or rows.known_ids.are_all(num_cached)))
        rows.is_plain |= is_fresh
        self._origin = origin if is_known else None
        if pool.prefix_index is not None and self._origin is not None:
            all_columns = self._next_columns.selected(self._originals)
            self._prefixes = RowPrefixes(pool, self._origin, ids[originals], all_columns)

    def _drops(self, table: BlockTable) -> bool:
        return table.group.window is not None and not self.sequences.records_past

    def _reserve(self) -> None:
        for table in filter(self._drops, self.sequences.rows.tables):
            num_pages = self._peak(table)
            table.group.allocator.release(table.group.take(num_pages, admit=not table.lengths.any()))
        counts = self._packing.lengths(self._packing.num_tokens) - self.sequences.rows.lengths
        for table in self.sequences.rows.tables:
            if not self._drops(table):
                held = [len(table.row_pages(row)) for row in range(table.num_rows)]
                table.reserve(counts)
                # Any of them may be the last of its row for a while.
                table.group.clear_values(
                    [page for row, num_held in enumerate(held) for page in table.row_pages(row)[num_held:]]
                )

    def _peak(self, table: BlockTable) -> int:
        """Pages that a table will hold at once, beside those that it holds now."""
        packing, page_size, window = self._packing, self.sequences.pool.page_size, table.group.window
        assert window is not None
        held = -(-table.lengths // page_size)
        peak = 0
        for done in range(0, packing.num_tokens, self._max_tokens):
            first = np.maximum(packing.starts(window, done) // page_size, held)
            end = -(-packing.lengths(done + self._max_tokens) // page_size)
            peak = max(peak, int(np.maximum(end - first, 0).sum()))
        return peak
