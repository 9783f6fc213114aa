"""A prompt whose tokens are computed packed: one row after another, without padding, in chunks."""

import numpy as np
from torch import Tensor

from hf_paged.batch.padding import Columns, Counts
from hf_paged.batch.sequences import Sequences
from hf_paged.batch.steps.duplicates import equal_rows
from hf_paged.batch.steps.packed import Chunk, PackedStep, Packing
from hf_paged.errors import NotPackable
from hf_paged.pages.block_table import BlockTable


class PackedPrompt:
    """New tokens of the rows of a cache, and a fork of these rows in which they are computed.

    If that fails, the cache is as it was. A row of the fork stands for all rows that get the same tokens.

    Args:
        sequences: of the cache, which must not write as long as this does.
        ids: `(num_rows, num_new)` what is in the new columns.
        attention_mask: `(num_rows, num_columns)`, 0 for padding; None without padding.
        max_tokens: tokens of a chunk.

    Attributes:
        sequences: the fork. The model is given a cache over it.

    Raises:
        NotPackable: if the mask hides tokens that are cached.
        OutOfPagesError: if the pool has too few pages. Of layers that drop pages on the way, as many as will be held
            at once are known to be free.
        ValueError: if rows or mask don't fit what is cached.
    """

    def __init__(self, sequences: Sequences, ids: Tensor, attention_mask: Tensor | None, max_tokens: int) -> None:
        self.sequences = Sequences(sequences.pool, begins_steps=False)
        self.sequences.become_fork_of(sequences)
        self.sequences.rows.supersede(sequences.rows)
        self._packing: Packing
        self._next_columns: Columns
        self._followed: Counts  # for each row of the cache, which row of the fork stands for it
        try:
            self._pack(ids, attention_mask)
            self._reserve(max_tokens)
        except BaseException:
            self.sequences.clear()
            raise

    @property
    def longest(self) -> int:
        """Tokens of the longest row, the new ones included."""
        return int(self._packing.lengths(self._packing.num_tokens).max())

    @property
    def num_tokens(self) -> int:
        """New tokens of all rows."""
        return self._packing.num_tokens

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

    def unpack(self) -> None:
        """Let the rows of the fork be all rows, with the new columns."""
        rows = self.sequences.rows
        for table in rows.tables:
            table.select(self._followed.tolist())
        rows.columns = self._next_columns
        self.sequences.drop_past()

    def _pack(self, ids: Tensor, attention_mask: Tensor | None) -> None:
        num_rows, num_new = ids.shape
        rows = self.sequences.rows
        mask = None if attention_mask is None else attention_mask.bool().cpu().numpy()
        columns, new, past_is_visible = rows.split(num_rows, num_new, mask)
        if not past_is_visible:
            raise NotPackable("attention_mask hides tokens that are cached")
        rows.admit(num_rows)
        rows.is_fanned_out = False  # for good
        self._next_columns = columns.extended(new, num_rows, num_new)
        is_new = np.ones((num_rows, num_new), dtype=bool) if new is None else new
        tokens = np.where(is_new, ids.cpu().numpy(), 0)
        originals, self._followed = np.unique(equal_rows(rows.tables, tokens, new), return_inverse=True)
        for table in rows.tables:
            table.select(originals.tolist())
        rows.columns = columns.selected(originals.tolist())
        self._packing = Packing(
            columns,
            self._next_columns.selected(originals.tolist()),
            rows.lengths.copy(),
            tokens[originals],
            is_new[originals],
        )

    def _drops(self, table: BlockTable) -> bool:
        return table.group.window is not None and not self.sequences.records_past

    def _reserve(self, max_tokens: int) -> None:
        for table in filter(self._drops, self.sequences.rows.tables):
            num_pages = self._peak(table, max_tokens)
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

    def _peak(self, table: BlockTable, max_tokens: int) -> int:
        """Pages that a table will hold at once, beside those that it holds now."""
        packing, page_size, window = self._packing, self.sequences.pool.page_size, table.group.window
        assert window is not None
        held = -(-table.lengths // page_size)
        peak = 0
        for done in range(0, packing.num_tokens, max_tokens):
            first = np.maximum(packing.starts(window, done) // page_size, held)
            end = -(-packing.lengths(done + max_tokens) // page_size)
            peak = max(peak, int(np.maximum(end - first, 0).sum()))
        return peak
