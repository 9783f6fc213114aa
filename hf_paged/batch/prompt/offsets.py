"""Offsets of the positions behind images, which a model keeps to itself.

Qwen-VL and its relatives count the places of an image otherwise than its tokens. By how much they keep with the model
(`rope_deltas`), of each row of the prompt that they computed last, and not with the cache. So a cache that goes on
after another prompt would be given the positions of that one.
"""

from collections.abc import Iterable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor

_UNSEEN = object()


class Offsets:
    """What a model kept when it computed the rows of a cache, and whether it still does."""

    def __init__(self) -> None:
        self._keeper: ref[torch.nn.Module] | None = None  # the part of the model that keeps them; None: there is none
        self._values: list[int] | None = None  # of each row, or one of all; None: unknown
        self._seen: Any = _UNSEEN  # what the model has, where that was compared already

    def fork(self) -> "Offsets":
        """Return a record of its own that says the same."""
        fork = Offsets()
        fork._keeper, fork._values, fork._seen = self._keeper, self._values, self._seen
        return fork

    def watch(self, model: torch.nn.Module) -> None:
        """Take note of which model computes the rows."""
        keeper = next((module for module in model.modules() if hasattr(module, "rope_deltas")), None)
        self._keeper = None if keeper is None else ref(keeper)

    def forget(self) -> None:
        """Know nothing: they are unknown, or about to be made anew."""
        self._values, self._seen = None, _UNSEEN

    def note(self) -> None:
        """Take note of those that a first pass was made with."""
        keeper = None if self._keeper is None else self._keeper()
        if keeper is not None and self._values is None:
            self._seen = keeper.rope_deltas
            self._values = _listed(self._seen)

    def check(self) -> None:
        """Raise ValueError if the model has those of another prompt by now."""
        keeper = None if self._keeper is None else self._keeper()
        if keeper is None or self._values is None or keeper.rope_deltas is self._seen:
            return
        found: Any = keeper.rope_deltas
        current = _listed(found)
        times, rest = divmod(len(self._values), len(current))
        if rest or self._values != [value for value in current for _ in range(times)]:
            raise ValueError(
                f"This cache goes on with positions that are offset by {self._values}, but {type(keeper).__name__} "
                f"has computed another prompt since, and keeps the offsets of that one: {current} (rope_deltas). Put "
                "them back before you go on with this cache (offsets = model.model.rope_deltas after its turn, "
                "model.model.rope_deltas = offsets before the next one), or compute its prompt anew."
            )
        self._seen = found

    def select(self, indices: Sequence[int]) -> None:
        """Let row `i` be what row `indices[i]` was."""
        if self._values is None or len(self._values) == 1:
            return
        if max(indices, default=0) >= len(self._values):
            self.forget()
            return
        chosen = _shortened([self._values[index] for index in indices])
        if chosen != self._values:
            self._values, self._seen = chosen, _UNSEEN

    def join(self, parts: Iterable[tuple["Offsets", int]]) -> None:
        """Know what is known of several batches, one below the other, each with its number of rows."""
        self.forget()
        values: list[int] = []
        for part, num_rows in parts:
            self._keeper = self._keeper or part._keeper
            if part._values is None:
                return
            values += part._values * num_rows if len(part._values) == 1 else part._values
        self._values = _shortened(values)


def _listed(offsets: Tensor | None) -> list[int]:
    return [0] if offsets is None else _shortened(offsets.flatten().tolist())


def _shortened(values: list[int]) -> list[int]:
    """One for all rows where they are the same."""
    return values[:1] if len(set(values)) == 1 else values
