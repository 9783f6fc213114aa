"""Which layers a step has written, and whether it is over."""

import threading
from collections.abc import Callable, Collection, Iterable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from hf_paged.errors import UnclearPassError

P = ParamSpec("P")
R = TypeVar("R")


def in_turn(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Let one thread at a time begin a pass, by a method of what has a `progress`."""

    @wraps(method)
    def run(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.progress.lock:
            return method(self, *args, **kwargs)

    return run


def too_deep(num_layers: int, num_held: int) -> ValueError:
    """Say that a model has more layers than the one that a cache was made for."""
    return ValueError(
        f"A model of {num_layers} layers was given a PagedCache that was made for a model of {num_held} layers. Make "
        "a PagedCache for this model."
    )


def another_thread() -> UnclearPassError:
    """Say that a cache is used by two threads at once."""
    return UnclearPassError(
        "Another thread is in a pass over this cache, or generates with it, but a cache serves one thread at a time. "
        "Give each thread a cache of its own (PagedCache(pool=cache.pool) shares the memory), or let this one wait. "
        "If the other one has failed in mid-pass, call cache.roll_back()."
    )


class Progress:
    """The way of a step through the layers of a model.

    A step is complete when each layer that holds tokens was written. In the first one nothing says yet which do: the
    model may have been cut or changed. There the last layer ends it, and those that it has passed over are absent.

    Args:
        layers: indices of the layers that may hold tokens.
        recurrent: indices of those that may keep a state of them.
        num_layers: layers that the model has; more may be counted by its configuration.
    """

    def __init__(self, layers: Iterable[int], recurrent: Iterable[int], num_layers: int) -> None:
        self._layers = sorted(layers)
        self._recurrent = set(recurrent)
        self.num_layers = num_layers
        self.missing: set[int] = set()
        """Layers that are still to be written."""
        self.last = -1
        """The last layer that was written; -1 for none."""
        self.touched = -1
        """The last layer that has asked for its state; -1 for none."""
        self._last_awaited = -1
        self.lock = threading.RLock()
        self._thread: int | None = None  # that makes the pass under way
        self._announced: dict[int, int] = {}  # by thread, columns before the pass that it is about to make

    def begin(self, absent: frozenset[int], num_layers: int | None) -> None:
        """Begin a step.

        Args:
            absent: layers that hold nothing.
            num_layers: in the first step, layers that the model has by its configuration; else None.
        """
        self.missing = set(self._layers) - absent
        end = self.num_layers if num_layers is None else min(num_layers, self.num_layers)
        awaited = self.missing | (self._recurrent - absent)
        self._last_awaited = max((layer for layer in awaited if layer < end), default=self._layers[-1])
        self.last = -1

    def end(self) -> None:
        """Take note that the step is over."""
        self.missing.clear()
        self.touched = -1
        self._thread = None
        self._announced.pop(threading.get_ident(), None)

    def announce(self, count: int) -> None:
        """Let the pass be of this thread that comes behind so many columns; one that no layer has written is over."""
        self._thread = thread = threading.get_ident()
        self._announced[thread] = count

    def own(self, count: int | None = None) -> None:
        """Let the pass under way be that of this thread.

        Args:
            count: columns before it, if it begins.

        Raises:
            UnclearPassError: if it is another thread's, or would come behind other columns than was announced.
        """
        thread = threading.get_ident()
        is_elsewhere = count is not None and count != self._announced.get(thread, count)
        if self._thread not in (None, thread) or is_elsewhere:
            raise another_thread()
        self._thread = thread

    @property
    def is_of_another_thread(self) -> bool:
        """Whether another thread, which has not come to its end, has begun the pass."""
        thread = self._thread
        if thread is None or thread == threading.get_ident():
            return False
        return any(other.ident == thread for other in threading.enumerate())

    def is_unclear(self, masks: Collection[object]) -> bool:
        """Whether it can't be told that a step is over: one with these masks (`Step.masks`) that is not complete."""
        return self.has_begun or (bool(masks) and self.is_of_another_thread)

    @property
    def has_begun(self) -> bool:
        """Whether keys and values of a layer were written."""
        return self.last >= 0

    @property
    def has_reached_the_end(self) -> bool:
        """Whether the last layer was written, whichever were passed over."""
        end = self._last_awaited
        return self.last >= end or (self.touched >= end and end not in self.missing)

    def unclear(self, num_layers: int) -> UnclearPassError:
        """Return what is raised when another pass begins and the step is not complete.

        Args:
            num_layers: layers that the cache was made for.
        """
        if self.is_of_another_thread:
            return another_thread()
        if self.has_reached_the_end and not self.missing:
            return UnclearPassError(
                f"The forward pass before left out the states of some layers, or ended within layer {self.touched}. "
                "Call cache.roll_back() to forget that pass; when the layers of a model are changed, use a new "
                "PagedCache, or reset() this one."
            )
        if self.has_reached_the_end:
            return UnclearPassError(
                f"The forward pass before left out layers {sorted(self.missing)}, which hold the tokens before it. "
                "Call cache.roll_back() to forget that pass; when the layers of a model are changed, use a new "
                "PagedCache, or reset() this one."
            )
        return UnclearPassError(
            f"The forward pass before went through layer {max(self.last, self.touched)} and no further, but this "
            f"cache was made for a model with {num_layers} layers. If that pass failed, call cache.roll_back() to "
            "forget it. If the model ends there, make its cache by PagedCache.from_model(model) after its layers are "
            "cut off."
        )

    def updated_twice(self, layer: int) -> UnclearPassError:
        """Return what is raised when a layer is written again and the step is not complete."""
        return UnclearPassError(
            f"Layer {layer} was updated twice in one forward pass, but layers {sorted(self.missing)} not yet. Update "
            "every layer once per pass; after a pass that failed, call cache.roll_back() first. What an encoder says "
            "needs a cache of its own: use PagedEncoderDecoderCache."
        )

    def left_out(self, layer: int) -> ValueError:
        """Say that a layer is written which the passes before left out."""
        return ValueError(
            f"Layer {layer} was given new tokens, but it holds none of those that are cached: the passes before "
            "left it out. When the layers of a model are changed, use a new PagedCache, or reset() this one."
        )

    def other_shape(self, layer: int, given: tuple[int, int], reserved: tuple[int, int]) -> ValueError:
        """Say that a layer is given other rows or columns, `(num_rows, num_new)`, than were reserved."""
        return ValueError(
            f"Layer {layer} was given {given[1]} tokens in {given[0]} rows, but this forward pass was reserved for "
            f"{reserved[1]} tokens in {reserved[0]} rows."
        )
