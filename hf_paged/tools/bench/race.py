"""Baselines that take turns step by step, so that whatever slows the machine down slows all of them down."""

import itertools
import logging
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_paged.cache.prompt.prefill import usual_chunk
from hf_paged.tools.bench.settings import Settings
from hf_paged.tools.bench.whole import Generated
from hf_paged.tools.lab.baseline import Baseline
from hf_paged.tools.lab.baselines import WithoutCudnn
from hf_paged.tools.lab.memory import kv_bytes
from hf_paged.tools.lab.model import MeasuredModel
from hf_paged.tools.progress import progress

logger = logging.getLogger(__name__)

REFERENCES = WithoutCudnn.name, Baseline.name
"""What others are compared with: the first of these that is there."""

_STRIDE = 7  # orders from where one race begins to where the next one does: after that another baseline is first
_races = itertools.count()
_NUM_PROFILED = 16  # tokens
_WARM_UP_STEPS = 2  # of each lap, which are not counted: a graph may be compiled for its length


@dataclass
class Lap:
    """One baseline's way from a prompt through its new tokens.

    Attributes:
        first_token_s: seconds to the first token.
        step_s: seconds of each step after that.
        tokens: `(num_rows, num_new)`.
        kv_bytes: keys and values in the cache at the end.
        figures: what the baseline has measured by itself.
        error: why there is nothing; None where it went well.
    """

    first_token_s: float = 0.0
    step_s: list[float] = field(default_factory=list)
    tokens: Tensor = field(default_factory=lambda: torch.empty(0))
    kv_bytes: int = 0
    figures: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def total_s(self) -> float:
        """Seconds for everything."""
        return self.first_token_s + sum(self.step_s)

    @property
    def counted_s(self) -> list[float]:
        """Seconds of the steps after the warm-up, or of all if there are no more."""
        return self.step_s[_WARM_UP_STEPS:] or self.step_s


class Race:
    """One prompt, or one batch of prompts, that all baselines decode in turns.

    A baseline that raises is out, and its error is kept; the others go on.

    Args:
        baselines: in each turn in another order, so that nobody always comes after the same one; nor does anybody
            always come first with a prompt, of a length that a library may not have seen yet, race after race.
        max_length: columns that will be used at most.
        mask: `(num_rows, num_columns)` of the prompts, 0 for padding; None without padding.
        after_steps: called whenever all have made a step.
    """

    def __init__(
        self,
        baselines: Sequence[Baseline],
        max_length: int,
        mask: Tensor | None = None,
        after_steps: Callable[[], None] = lambda: None,
    ) -> None:
        self._baselines = list(baselines)
        self._after_steps = after_steps
        orders = itertools.cycle(itertools.permutations(self._baselines))
        self._orders = itertools.islice(orders, _STRIDE * next(_races), None)
        self._errors: dict[str, str] = {}
        self._turn(lambda baseline: baseline.begin(max_length, mask))

    def lap(self, ids: Tensor, num_new_tokens: int, chunk_size: int | None = None) -> dict[str, Lap]:
        """Run a prompt, or more of it, in chunks of so many columns (None: at once), and decode."""
        laps = {baseline.name: Lap() for baseline in self._baselines}

        def feed(baseline: Baseline) -> None:
            laps[baseline.name].first_token_s = baseline.feed(ids, num_new_tokens, chunk_size)

        def step(baseline: Baseline) -> None:
            laps[baseline.name].step_s.append(baseline.step())

        def finish(baseline: Baseline) -> None:
            laps[baseline.name].tokens = torch.tensor(baseline.tokens[-num_new_tokens:]).T
            laps[baseline.name].kv_bytes = kv_bytes(baseline.cache)
            laps[baseline.name].figures = baseline.figures

        self._turn(feed)
        for _ in range(num_new_tokens - 1):
            self._turn(step)
            self._after_steps()
        self._turn(finish)
        return laps | {name: Lap(error=error) for name, error in self._errors.items()}

    def profile(self, laps: dict[str, Lap]) -> None:
        """Let whole runs go on under a profiler, for the figures of their laps."""

        def look(baseline: Baseline) -> None:
            if isinstance(baseline, Generated):
                laps[baseline.name].figures |= baseline.profile(_NUM_PROFILED)

        self._turn(look)

    def end(self) -> None:
        """Drop the caches."""
        for baseline in self._baselines:
            baseline.cache = None

    def _turn(self, action: Callable[[Baseline], None]) -> None:
        for baseline in next(self._orders):
            if baseline.name in self._errors:
                continue
            try:
                action(baseline)
            except Exception as error:
                logger.info("%s is out: %s", baseline.name, error)
                self._errors[baseline.name] = f"{type(error).__name__}: {error}"
                baseline.cache = None


def race_once(
    baselines: Sequence[Baseline],
    ids: Tensor,
    mask: Tensor | None,
    num_new_tokens: int,
    after_steps: Callable[[], None] = lambda: None,
) -> dict[str, Lap]:
    """One lap from nothing, as `Race.lap`."""
    race = Race(baselines, ids.shape[1] + num_new_tokens, mask, after_steps)
    laps = race.lap(ids, num_new_tokens)
    race.end()
    return laps


def laps_of(
    settings: Settings, baselines: Sequence[Baseline], ids: Tensor, mask: Tensor | None, after: Callable[[], None]
) -> list[dict[str, Lap]]:
    """Run a prompt or a batch as often as the settings say, each time from nothing.

    Whole runs are made once more before that: what is compiled for them is not in their times. Who is out stays out.
    """
    laps: list[dict[str, Lap]] = []
    failed: dict[str, Lap] = {}
    max_length = ids.shape[1] + settings.max_new_tokens + settings.whole * _NUM_PROFILED
    for number in progress(range(settings.whole + settings.rounds), f"{len(ids)} rows"):
        racing = [baseline for baseline in baselines if baseline.name not in failed]
        race = Race(racing, max_length, mask, after)
        own = race.lap(ids, settings.max_new_tokens)
        if settings.whole and number == settings.rounds:
            race.profile(own)
        race.end()
        failed |= {name: lap for name, lap in own.items() if lap.error is not None}
        laps.append({baseline.name: (own | failed)[baseline.name] for baseline in baselines})
    return laps[settings.whole :]


def warm_up(baselines: Sequence[Baseline], model: MeasuredModel, num_rows: int = 1) -> None:
    """Let everyone compile what it needs, with short prompts, then with one of several pages among them.

    A single row is given more after its first tokens. Several rows are so many tokens that, packed, they are worth a
    compiled chunk.
    """
    several_pages = 2 * max(baseline.page_size for baseline in baselines) + 1
    short = 24 if num_rows == 1 else max(24, usual_chunk(model.device) // (2 * num_rows) + 2)
    for first, last in ((short, short + num_rows), (40, several_pages)):
        ids, mask = model.padded([*range(first, first + num_rows - 1), last])
        race = Race(baselines, 2 * ids.shape[1] + 6, mask if num_rows > 1 else None)
        race.lap(ids, 3)
        if num_rows == 1:
            race.lap(ids, 3)
        race.end()


def summarize(laps: Sequence[dict[str, Lap]]) -> list[dict[str, Any]]:
    """Medians over laps of the same prompt, a row for each baseline.

    Returns:
        For each baseline its name and either `error`, or `first_token_s`, `ms_per_step`, `kv_bytes` where there is
        a cache to look into, what the baseline has measured by itself, and if the first of `REFERENCES` ran: `ratio`
        (of the median of the steps to its median), `paired_ratio` (the median of the ratios step by step),
        `ratio_interval` (where that median is with a probability of 95 %) and `same_tokens`.
    """
    name = next((name for name in REFERENCES if name in laps[0]), "")
    reference = [lap[name] for lap in laps if name in lap and lap[name].error is None]
    return [_summarize(name, [lap[name] for lap in laps], reference) for name in laps[0]]


def _summarize(name: str, own: Sequence[Lap], reference: Sequence[Lap]) -> dict[str, Any]:
    row: dict[str, Any] = {"baseline": name}
    if errors := [lap.error for lap in own if lap.error is not None]:
        return row | {"error": errors[0]}
    steps, theirs = ([seconds for lap in laps for seconds in lap.counted_s] for laps in (own, reference))
    row["first_token_s"] = statistics.median(lap.first_token_s for lap in own)
    row["ms_per_step"] = 1e3 * statistics.median(steps)
    if held := max(lap.kv_bytes for lap in own):
        row["kv_bytes"] = held
    row |= own[-1].figures
    if len(reference) == len(own):
        row["ratio"] = statistics.median(steps) / statistics.median(theirs)
        ratios = sorted(ours / other for ours, other in zip(steps, theirs, strict=True))
        row["paired_ratio"] = statistics.median(ratios)
        row["ratio_interval"] = _interval_of_median(ratios)
        row["same_tokens"] = all(torch.equal(a.tokens, b.tokens) for a, b in zip(own, reference, strict=True))
    return row


def _interval_of_median(ordered: Sequence[float]) -> list[float]:
    """Of a sample in order: the two of it between which the median is in 95 of 100 cases, or all lie.

    Of 100 values it is the 40th to the 61st: how many lie below the median is binomial.
    """
    last = len(ordered) - 1
    reach = 0.98 * len(ordered) ** 0.5
    return [ordered[max(0, math.floor(last / 2 - reach))], ordered[min(last, math.ceil(last / 2 + reach))]]
