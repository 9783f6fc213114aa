"""Errors that a caller may want to catch by name."""


class OutOfPagesError(RuntimeError):
    """A step needs more pages than the pool may hold.

    Raised before anything is written: the cache holds what it held and goes on working once pages are free.
    """


class UnclearPassError(ValueError):
    """A forward pass stopped before the last layer, and nothing says whether it failed or the model ends there.

    Nothing has changed. `PagedCache.roll_back()` forgets the pass.
    """


class NotPackable(ValueError):
    """Raised where a prompt can't be computed packed; it says why, as the end of a sentence."""
