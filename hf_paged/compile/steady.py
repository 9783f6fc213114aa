"""Steps of a compiled model between which nothing but their inputs can change.

Before each call dynamo looks at every module, weight and setting that a graph was made of. In a loop that lets nobody
else do anything between two steps, the first ones show what it would find before all others.
"""

import threading
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

from hf_paged._torch.dynamo import unguarded

_local = threading.local()


class SteadySteps:
    """Calls of a compiled model, in one loop, with inputs of the same kinds and sizes.

    The first ones are made as ever. Once two in a row were the same graph, the others call what dynamo has made of the
    model without its guards. What changes about the model meanwhile counts from the next loop on.

    Args:
        model: whose steps they are.
        forward: calls it compiled.

    Attributes:
        weights: what a graph knows of those that it reads, by the graph; empty as long as they may change.
    """

    def __init__(self, model: Any, forward: Callable[..., Any]) -> None:
        self.weights: dict[Any, Any] = {}
        self._model = model
        self._forward = forward
        self._before: FunctionType | None = None  # what called the graph of the step before the last one
        self._seen: FunctionType | None = None  # and that of the last one
        self._repeated: FunctionType | None = None

    def __call__(self, **inputs: Any) -> Any:
        """Return what the model returns."""
        outer, _local.steps = under_way(), self
        try:
            if self._repeated is not None:
                return self._repeated(self._model, **inputs)
            self.weights.clear()
            self._before, self._seen = self._seen, None
            outputs = self._forward(**inputs)
            self._compare()
            return outputs
        finally:
            _local.steps = outer

    def see(self) -> None:
        """From within a graph that can be called without guards, note what called it."""
        if self._repeated is None and isinstance(self._model.forward, MethodType):
            self._seen = unguarded(self._model.forward)

    def _compare(self) -> None:
        if self._before is not None and self._seen is not None and self._before.__code__ is self._seen.__code__:
            self._repeated = self._seen


class SteadyGraph:
    """A graph that may be called without guards.

    Args:
        run: the graph.
    """

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run

    def __call__(self, *inputs: Any) -> Any:
        """Run it."""
        steps = under_way()
        if steps is not None:
            steps.see()
        return self._run(*inputs)


def under_way() -> SteadySteps | None:
    """The steps of which this thread is making one."""
    return getattr(_local, "steps", None)
