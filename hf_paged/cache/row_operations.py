"""What is done to the rows of a cache between two passes."""

from collections.abc import Sequence
from operator import index
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

from hf_paged.batch.prompt.prefixes import let_finished_be_found
from hf_paged.batch.sequences import Sequences
from hf_paged.batch.steps.ragged import cut
from hf_paged.cache.joining import join, take_apart

if TYPE_CHECKING:
    from hf_paged.cache.paged import PagedCache


class RowOperations(Cache):
    """A cache whose rows can be shortened, chosen, repeated, released, joined, split and swapped out."""

    _sequences: Sequences

    def roll_back(self) -> None:
        """Forget a forward pass that failed in mid-way; the cache is as it was before.

        A pass that hf-paged itself refuses is forgotten at once. Where anything else fails (a layer, a hook, memory,
        an interrupt), nothing tells the cache so, and the next pass is refused until this is called.
        """
        self._sequences.roll_back()

    def reset(self) -> None:
        """Release all pages; the cache is as new."""
        self._sequences.clear()

    def crop(self, tokens_to_remove: int | Sequence[int] | Tensor) -> None:
        """Remove the last columns, or the last tokens of each row.

        Args:
            tokens_to_remove: 0 or negative, minus the number of columns. Or `(num_rows,)` such numbers, minus the
                tokens of each row, whose places are padding afterwards as long as another row is longer.

        Raises:
            TypeError: for what is no whole number; nothing has changed.
            ValueError: for a positive number, one that is larger than what is cached, one that needs tokens which
                have left a sliding window, or which a recurrent layer can't forget, or other rows than are cached;
                nothing has changed.
        """
        self._sequences.end_step()
        if isinstance(tokens_to_remove, Sequence) or (isinstance(tokens_to_remove, Tensor) and tokens_to_remove.ndim):
            self._crop_rows([index(number) for number in tokens_to_remove])
            return
        held, tokens_to_remove = self._sequences.rows.columns.count, index(tokens_to_remove)
        if tokens_to_remove > 0 or held + tokens_to_remove < 0:
            raise ValueError(
                f"crop({tokens_to_remove}) was called on a cache of {held} tokens. Give 0 or a negative number, not "
                f"below {-held}: minus the number of tokens to remove. To keep n tokens, as a positive number did in "
                "earlier versions of Transformers, call crop(n - cache.get_seq_length())."
            )
        self._sequences.truncate(held + tokens_to_remove)

    def _crop_rows(self, tokens_to_remove: list[int]) -> None:
        lengths = self._sequences.lengths
        fits = len(tokens_to_remove) == len(lengths)
        if not fits or any(not -held <= number <= 0 for number, held in zip(tokens_to_remove, lengths, strict=True)):
            raise ValueError(
                f"crop({tokens_to_remove}) was called on a cache whose rows hold {lengths.tolist()} tokens. Give a "
                "number for each row, 0 or negative: minus the number of its tokens to remove."
            )
        if not len(lengths):
            return
        kept = lengths + np.array(tokens_to_remove, dtype=np.int64)
        cut(self._sequences, self._sequences.rows.columns.ends_of(kept))
        self._sequences.rows.drop_past()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row `i` be what row `beam_idx[i]` was; no token is copied.

        Args:
            beam_idx: `(num_rows,)` int64, indices of rows; as many as the next pass has.

        Raises:
            ValueError: if a row does not exist; nothing has changed.
        """
        self._sequences.select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows; those that are left out give their pages back.

        Args:
            indices: `(num_kept,)` int64, in the order wanted, or a bool mask over all rows.

        Raises:
            ValueError: if a row does not exist, or the mask has another length; nothing has changed.
        """
        self._sequences.select(self._indices(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row, sharing its pages; the copies of a row follow one another.

        Args:
            repeats: how often each row is there afterwards.
        """
        self._sequences.select(np.repeat(np.arange(len(self._sequences.lengths)), repeats).tolist())

    def release(self, rows: Sequence[int] | Tensor) -> None:
        """Give back the pages of rows that are finished, at once.

        The rows stay in the batch and `generate()` may go on filling them up, but they store nothing and attend to
        nothing any more; what the model computes for them means nothing. The other rows are not affected. Where the
        pool has a prefix index that may have these rows, their full pages stay cached, to be found. States of
        recurrent layers have a place for them until they are left out by `batch_select_indices`.

        Args:
            rows: their indices, or a bool mask over all rows.

        Raises:
            ValueError: if a row does not exist, or the mask has another length; nothing has changed.
        """
        self._sequences.end_step()
        indices = self._sequences.rows.existing(self._indices(rows))
        let_finished_be_found(self._sequences.rows, indices)
        self._sequences.release(indices)

    def activate_past_recording(self) -> None:
        """Keep what leaves a sliding window, or a convolution, until the next `crop`, so that `crop` can be exact.

        Assisted decoding calls this by itself.
        """
        self._sequences.records_past = True

    @classmethod
    def concatenate(cls, caches: Sequence["PagedCache"]) -> "PagedCache":
        """Return a cache of the rows of others, which keep them, and with which it shares every page.

        Caches with fewer columns are padded on the left: what they hold ends in the last column.

        Args:
            caches: forks of each other, or caches of one pool; those without rows add none.

        Raises:
            UnclearPassError: if one of them is in the middle of a forward pass.
            ValueError: if there are none, or they are of different pools, salts or layers.
        """
        return join(caches)

    def split(self) -> list["PagedCache"]:
        """Return a cache for each row, which shares its pages; this one keeps them, too.

        Columns of padding before the first token of a row are left out. A row that was released makes an empty cache.

        Raises:
            UnclearPassError: if the cache is in the middle of a forward pass.
        """
        return take_apart(self)  # type: ignore[arg-type]

    def swap_out(self) -> None:
        """Move the content of all pages to memory of the host, so that others may have the pages.

        The next use brings it back, into other pages; `lengths`, `stats()` and `reset()` do without it. Pages that
        forks hold too are copied, and stay theirs. The memory of a pool that grows is given back by `pool.trim()`.
        States of recurrent layers are in no page, and stay where they are.

        Raises:
            OutOfPagesError: if the `host_bytes` of the pool have too little room; nothing has changed.
            ValueError: if it has none, or a forward pass is under way; nothing has changed.
        """
        if not self._sequences.rows.are_out:
            self._sequences.end_step()
        self._sequences.rows.swap_out()

    def set_idle(self) -> None:
        """Let the pool swap this cache out once its pages run short, before `OutOfPagesError`.

        Until its next use, that is, which waits if it is being swapped out just then, and brings it back. So it is
        safe between threads, as nobody can use what is idle. Caches that were idle first are swapped out first, as
        long as the `host_bytes` of the pool have room.

        Raises:
            ValueError: if the pool has none, or a forward pass is under way; nothing has changed.
        """
        if not self._sequences.rows.are_out:
            self._sequences.end_step()
        self._sequences.rows.set_idle()

    def swap_in(self) -> None:
        """Bring back what was swapped out, ahead of its next use.

        Raises:
            OutOfPagesError: if the pool has too few pages; nothing has changed.
        """
        self._sequences.rows.swap_in()

    def _indices(self, rows: Sequence[int] | Tensor) -> list[int]:
        given = torch.as_tensor(rows)
        if given.dtype == torch.bool:
            num_rows = len(self._sequences.lengths)
            if num_rows and len(given) != num_rows:
                raise ValueError(f"A mask over {len(given)} rows was given, but this cache holds {num_rows} rows.")
            given = given.nonzero().flatten()
        indices: list[int] = given.tolist()
        return indices
