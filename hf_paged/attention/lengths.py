"""Lengths that say more than a number.

Transformers passes the length of a cache on as an `int`; neither the mask function nor the slicing of the prompt ever
sees the cache itself. An `int` with a memory is the way to reach it that patches nothing.
"""

from hf_paged.batch.sequences import Batch


class PlannedLength(int):
    """What `get_mask_sizes` returns as key/value length: it carries the rows to the mask function."""

    batch: Batch

    def __new__(cls, value: int, batch: Batch) -> "PlannedLength":
        """Make `value` carry `batch`."""
        length = super().__new__(cls, value)
        length.batch = batch
        return length


class PastLength(int):
    """What `get_seq_length` returns: it notices when `generate()` is given fewer tokens than are cached.

    `generate()` keeps the part of the prompt that is not cached with `input_ids[:, -(num_ids - past_length):]`, which
    silently takes the wrong tokens when `num_ids <= past_length`.
    """

    def __rsub__(self, other: int) -> "_Remainder":
        """Subtract from a length, remembering both."""
        remainder = _Remainder(int(other) - int(self))
        remainder.num_ids, remainder.num_cached = int(other), int(self)
        return remainder


class _Remainder(int):
    num_ids: int
    num_cached: int

    def __neg__(self) -> int:
        if self <= 0:
            raise ValueError(
                f"The cache holds {self.num_cached} tokens, but input_ids has {self.num_ids}, so no token is left to "
                "compute. Pass the whole conversation so far plus at least one new token, or call cache.crop(-n) to "
                "take tokens away, or cache.reset() to start over."
            )
        return -int(self)
