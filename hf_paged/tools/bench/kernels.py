"""How busy a GPU is while it decodes, and with what."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

_NUM_NAMED = 12


class Kernels:
    """What ran on a GPU under a profiler, copies included.

    Args:
        events: of the profiler; those of the host are left out.
    """

    def __init__(self, events: Iterable[Any]) -> None:
        own = [event for event in events if event.device_type.name == "CUDA"]
        self._runs = sorted((event.time_range.start, event.time_range.end, event.name) for event in own)

    def busy_us(self, since: float = 0.0) -> float:
        """Microseconds in which at least one ran, from a moment on."""
        busy, reached = 0.0, since
        for start, end, _ in self._runs:
            busy += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        return busy

    def figures(self, num_steps: int) -> dict[str, Any]:
        """Say what they make of so many steps.

        Returns:
            `kernel_ms` of a step; `busy_share` of the second half of the time, when whatever runs ahead does so; and
            `kernels`, milliseconds of a step by name, of those that take longest. Nothing without a GPU.
        """
        if not self._runs:
            return {}
        first, last = self._runs[0][0], max(end for _, end, _ in self._runs)
        middle = (first + last) / 2
        spent: Counter[str] = Counter()
        for start, end, name in self._runs:
            spent[name] += end - start
        return {
            "kernel_ms": self.busy_us() / 1e3 / num_steps,
            "busy_share": self.busy_us(middle) / (last - middle),
            "kernels": {name: us / 1e3 / num_steps for name, us in spent.most_common(_NUM_NAMED)},
        }
