"""Where the memory of a run goes, forward pass by forward pass, and whether the system says the same."""

import logging
import statistics
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hf_paged._torch.dynamo import outside_of_graphs
from hf_paged._transformers import decoder_of
from hf_paged.cache.paged import PagedCache
from hf_paged.pages.stats import MemoryStats
from hf_paged.tools.evaluation.contiguous import padded_bytes, static_bytes
from hf_paged.tools.evaluation.residence import Residence, ResidenceWatch
from hf_paged.tools.lab.memory import PeakMemory
from hf_paged.tools.lab.table import table

logger = logging.getLogger(__name__)

PASS, OTHER_PASS = "pass", "other pass"

_PEAKS = ("live", "active", "wasted", "shared", "reserved", "resident", "padded", "static")


@dataclass(frozen=True)
class AuditStep:
    """What was held at one moment.

    Attributes:
        event: `"pass"` after a forward pass with the audited cache; `"other pass"` after one with another cache, such
            as that which `cache.prefill()` fills; otherwise what `observe` was told.
        num_rows: of the cache.
        num_columns: of the cache, padding included.
        cache: what the cache holds.
        pool: what everyone on its pool holds.
        padded_bytes: what a `DynamicCache` would hold: every row as wide as the widest, and nothing shared.
        static_bytes: what a `StaticCache` of the maximum length would hold; None without a maximum, or beyond it.
        residence: the memory behind the pool.
        process_bytes: what the process holds beyond what it held at the beginning (on CUDA: what torch allocated).
        disagreements: where memory and accounting disagree, in words.
    """

    event: str
    num_rows: int
    num_columns: int
    cache: MemoryStats
    pool: MemoryStats
    padded_bytes: int
    static_bytes: int | None
    residence: Residence
    process_bytes: int
    disagreements: tuple[str, ...]

    @property
    def agrees(self) -> bool | None:
        """Whether memory and accounting agree; None if no disagreement is known, but not all could be checked."""
        if self.disagreements:
            return False
        return None if self.residence.resident_bytes is None else True

    @property
    def overheads(self) -> dict[str, float]:
        """Bytes beyond the minimum, as a fraction of it; 0 when nothing is held.

        `active`: of the pages that the cache holds. `reserved`: of the pool's storage, beyond the minimum for all on
        the pool. `padded` and `static`: of the contiguous caches in the place of this one.
        """
        minimum, pool = self.cache.minimum_bytes, self.pool
        held = {"padded": self.padded_bytes, "static": self.static_bytes}
        return {
            "active": self.cache.overhead,
            "reserved": _overhead(pool.reserved_bytes, pool.minimum_bytes),
            **{kind: _overhead(num_bytes, minimum) for kind, num_bytes in held.items() if num_bytes is not None},
        }

    def row(self) -> dict[str, Any]:
        """All figures by name, for a table or JSON."""
        held = ("minimum", "live", "active", "wasted", "shared")
        behind = ("least", "resident", "most")
        return {
            "event": self.event,
            "rows": self.num_rows,
            "columns": self.num_columns,
            "tokens": self.cache.num_tokens,
            **{f"{name}_bytes": getattr(self.cache, f"{name}_bytes") for name in held},
            "overhead": self.cache.overhead,
            "padded_bytes": self.padded_bytes,
            "static_bytes": self.static_bytes,
            "pool_live_bytes": self.pool.live_bytes,
            "pool_active_bytes": self.pool.active_bytes,
            "reserved_bytes": self.pool.reserved_bytes,
            **{f"{name}_bytes": getattr(self.residence, f"{name}_bytes") for name in behind},
            "process_bytes": self.process_bytes,
            "agrees": self.agrees,
        }


class MemoryAudit:
    """Accounts for a cache after each forward pass of a model, as long as the context is open.

    ```python
    with MemoryAudit(model, cache) as audit:
        model.generate(**inputs, past_key_values=cache)
    print(audit.report())
    ```

    It looks after the decoder's passes by a forward hook, and changes no result.

    Args:
        model: runs uncompiled: a hook is no part of a graph.
        cache: is looked at; others on its pool count as the pool's.
        max_length: columns of the `StaticCache` to compare with; None: leave it out.

    Raises:
        ValueError: for a maximum length below 1.
    """

    steps: list[AuditStep]
    """What was held after each pass, in order."""

    def __init__(self, model: PreTrainedModel, cache: PagedCache, max_length: int | None = None) -> None:
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length={max_length} was asked for; a StaticCache has room for 1 column at least.")
        self.steps = []
        self._model = model
        self._cache = cache
        self._max_length = max_length
        self._watch = ResidenceWatch(cache.pool)
        self._memory: PeakMemory | None = None
        self._peak_process_bytes = 0
        self._num_columns = 0
        self._handle: RemovableHandle | None = None

    def __enter__(self) -> "MemoryAudit":
        """Begin.

        Raises:
            ValueError: if the audit has begun before, or the model is within `compiled()`.
        """
        settings: Any = self._model.generation_config
        if getattr(settings, "compile_config", None) is not None:
            raise ValueError(
                "MemoryAudit was given a model that generate() compiles, and a compiled graph has no room for its "
                "hook. Leave compiled(model): without it the same pages are held."
            )
        if self._memory is not None:
            raise ValueError("This MemoryAudit has been used before. Make a new one for each run.")
        decoder = decoder_of(self._model)
        self._num_columns = int(self._cache.get_seq_length())
        self._memory = PeakMemory(self._model.device)
        self._handle = decoder.register_forward_hook(self._note_pass, with_kwargs=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._handle is not None
        assert self._memory is not None
        self._handle.remove()
        self._handle = None
        self._peak_process_bytes = self._memory.bytes
        num_missed = int(self._cache.get_seq_length()) - self._num_columns
        if kind is None and num_missed > 0:
            logger.warning(
                "%d columns were added in passes that this audit did not see: a graph that was compiled before it "
                "began has no hook.",
                num_missed,
            )

    def observe(self, event: str) -> AuditStep:
        """Account for what is held now, as after a pass.

        Args:
            event: what has happened, such as `"reset"`.

        Raises:
            ValueError: outside of the context.
        """
        if self._memory is None or self._handle is None:
            raise ValueError(f"observe({event!r}) was called outside of `with MemoryAudit(...)`. Call it within.")
        cache, pool = self._cache.stats(), self._cache.pool
        pool_stats = pool.stats()
        num_rows, num_columns = len(self._cache.lengths), int(self._cache.get_seq_length())
        fits = self._max_length is not None and num_columns <= self._max_length
        residence = self._watch.look()
        step = AuditStep(
            event=event,
            num_rows=num_rows,
            num_columns=num_columns,
            cache=cache,
            pool=pool_stats,
            padded_bytes=padded_bytes(pool, num_rows, num_columns),
            static_bytes=static_bytes(pool, num_rows, self._max_length) if fits and self._max_length else None,
            residence=residence,
            process_bytes=self._memory.held_bytes,
            disagreements=residence.disagreements(pool_stats),
        )
        self.steps.append(step)
        self._num_columns = num_columns
        return step

    def summary(self) -> dict[str, Any]:
        """Sum the run up.

        Returns:
            `num_steps`, and of these `num_passes` with this cache. `peak_X_bytes` over all steps; of the process
            beyond its beginning, also between the steps. `overheads`: how each kind of `AuditStep.overheads` went over
            the passes with this cache, from the `first` to the `last`, with `worst` and `mean`; empty without any.
            `agrees`, None if not all could be checked, and `disagreements`.
        """
        rows = [step.row() for step in self.steps]
        passes = [step.overheads for step in self.steps if step.event == PASS]
        peaks = {
            f"peak_{name}_bytes": max((row[f"{name}_bytes"] or 0 for row in rows), default=0)
            for name in _PEAKS
            if any(row[f"{name}_bytes"] is not None for row in rows)
        }
        found = [f"step {number}: {words}" for number, step in enumerate(self.steps) for words in step.disagreements]
        is_complete = bool(self.steps) and all(step.agrees is not None for step in self.steps)
        return {
            "num_steps": len(self.steps),
            "num_passes": len(passes),
            **peaks,
            "peak_process_bytes": self._memory.bytes if self._memory and self._handle else self._peak_process_bytes,
            "overheads": _courses(passes),
            "agrees": False if found else True if is_complete else None,
            "disagreements": found,
        }

    def report(self) -> str:
        """Lay out every step as a table, in MiB, and say what it comes to."""
        summary = self.summary()
        peaks = [{name: summary.get(f"peak_{name}_bytes") for name in (*_PEAKS, "process")}]
        parts = [
            table({"step": number} | step.row() for number, step in enumerate(self.steps)),
            "At the peak, MiB:",
            table({f"{name}_bytes": value for name, value in row.items() if value is not None} for row in peaks),
            table(overhead_rows(summary)),
            agreement(summary),
        ]
        return "\n\n".join(filter(None, parts))

    @outside_of_graphs
    def _note_pass(self, module: Any, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        if self._handle is None:  # a graph that was compiled meanwhile still calls it
            return
        given = (*arguments, *named.values())
        caches = (getattr(value, "self_attention_cache", value) for value in given)
        is_own = any(cache is self._cache for cache in caches)
        self.observe(PASS if is_own else OTHER_PASS)


def overhead_rows(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Lay the overheads of `MemoryAudit.summary` out, a row for each kind."""
    return [
        {"beyond_minimum": kind} | {moment: f"{100 * value:.2f} %" for moment, value in course.items()}
        for kind, course in summary["overheads"].items()
    ]


def agreement(summary: dict[str, Any]) -> str:
    """Say in a sentence, or a list, whether memory and accounting agreed."""
    if summary["disagreements"]:
        return "\n".join(["Memory and accounting DISAGREE:", *(f"  {line}" for line in summary["disagreements"])])
    if not summary["num_steps"]:
        return "Nothing was observed."
    if summary["agrees"] is None:
        return "This system does not tell what is resident: the accounting was checked against the storage alone."
    return "Resident memory and accounting agree in every step."


def _overhead(num_bytes: int, minimum: int) -> float:
    return num_bytes / minimum - 1 if minimum else 0.0


def _courses(passes: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """How each kind of overhead went that every pass has."""
    kinds = [kind for kind in (passes[0] if passes else ()) if all(kind in each for each in passes)]
    courses = {kind: [each[kind] for each in passes] for kind in kinds}
    return {
        kind: {"first": course[0], "worst": max(course), "mean": statistics.fmean(course), "last": course[-1]}
        for kind, course in courses.items()
    }
