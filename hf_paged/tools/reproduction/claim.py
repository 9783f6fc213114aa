"""What the paper or this package claims, and what the figures say to it."""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Results = Mapping[str, dict[str, Any]]
"""The contents of the results files, by stage."""

Judge = Callable[[Results], tuple[bool | None, str]]
"""Says whether a claim holds, None if it was not measured, and our figure in a sentence or two."""

HOLDS, FAILS, NOT_MEASURED = "holds", "does not hold", "not measured"
PAPER, PACKAGE = "paper", "package"

_SAME_FLOAT32, _SAME_BFLOAT16 = 1e-5, 1e-3
_CHUNK_SIZES = (256, 7, 1)
_LINEAR = 0.98
_TWOFOLD = 2.0
_FEW_PERCENT = 0.05
_SMALL = 0.25
_SPREAD = 0.2
_MIB = 2**20


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        source: who claims it: the paper, or this package.
        words: the claim.
        rule: when it holds.
        stages: whose figures it takes.
        judge: says what these come to.
    """

    source: str
    words: str
    rule: str
    stages: tuple[str, ...]
    judge: Judge

    def finding(self, results: Results) -> tuple[str, str]:
        """The verdict, and our figure in words; not measured if a stage is missing."""
        missing = [stage for stage in self.stages if stage not in results]
        if missing:
            return NOT_MEASURED, f"No results of {', '.join(missing)}."
        does_hold, words = self.judge(results)
        return NOT_MEASURED if does_hold is None else HOLDS if does_hold else FAILS, words


CLAIMS: list[Claim] = []
"""In the order of the page."""


def _claim(source: str, words: str, rule: str, *stages: str) -> Callable[[Judge], Judge]:
    """Note a claim that the function judges."""

    def note(judge: Judge) -> Judge:
        CLAIMS.append(Claim(source, words, rule, stages, judge))
        return judge

    return note


@_claim(
    PAPER,
    "Paging leaves the perplexity as it is (7.32 against 7.31).",
    "relative difference at most 1e-5 in every run in float32, 1e-3 in all together in bfloat16",
    *(f"perplexity-{chunk}{suffix}" for suffix in ("", "-bf16") for chunk in _CHUNK_SIZES),
)
def _perplexity(results: Results) -> tuple[bool, str]:
    exact = [_paged_perplexity(results[f"perplexity-{chunk}"]) for chunk in _CHUNK_SIZES]
    rounded = [_paged_perplexity(results[f"perplexity-{chunk}-bf16"]) for chunk in _CHUNK_SIZES]
    worst = max(abs(mean) for _, mean, _ in exact)
    # Rounding takes each token another way; what is more than noise shows in all runs together.
    num_tokens = sum(count for count, _, _ in rounded)
    pooled = abs(math.fsum(count * mean for count, mean, _ in rounded)) / num_tokens
    error = math.sqrt(math.fsum((count * error) ** 2 for count, _, error in rounded)) / num_tokens
    largest = max(abs(mean) for _, mean, _ in rounded)
    return (
        worst <= _SAME_FLOAT32 and pooled <= _SAME_BFLOAT16,
        f"SmolLM2-135M on English prose, by 256, 7 and 1 tokens at once. float32: they differ by {worst:.1e} of the "
        f"perplexity at most. bfloat16: by {pooled:.1e} over all {num_tokens:,} tokens (standard error {error:.1e}), "
        f"by {largest:.1e} in one run.",
    )


def _paged_perplexity(results: dict[str, Any]) -> tuple[int, float, float]:
    """Tokens of a run, the relative difference of the paged perplexity with its sign, and its standard error."""
    figures = {row["cache"]: row for row in results["figures"]["figures"]}
    difference = math.log(figures["paged"]["perplexity"] / figures["dynamic"]["perplexity"])
    return results["figures"]["num_tokens"], difference, figures["paged"]["standard_error"]


@_claim(
    PAPER,
    "With a cache, the time of a token grows linearly, about twofold from 128 to 2048 tokens.",
    "at most twofold",
    "latency",
)
def _growth(results: Results) -> tuple[bool, str]:
    fits = {row["baseline"]: row for row in results["latency"]["latency"]["fits"]}
    own = [fits[name] for name in ("paged", "paged-compiled")]
    words = [
        f"{fit['baseline']}: {fit['growth']:.2f} times from {fit['growth_from']} to {fit['growth_to']} tokens, R² of "
        f"a line {fit['r_squared']:.3f}"
        for fit in own
    ]
    scatter = ""
    if any(fit["r_squared"] < _LINEAR for fit in own):
        scatter = " How straight a line is can't be told where times scatter more than they grow."
    return all(fit["growth"] <= _TWOFOLD for fit in own), f"{'; '.join(words)}.{scatter}"


@_claim(
    PAPER,
    "Without a cache it grows exponentially.",
    "an exponential fits better than a power of the length",
    "no-cache",
)
def _no_cache(results: Results) -> tuple[bool, str]:
    times = _times(results["no-cache"]["latency"]["rows"], "no-cache")
    contexts, logs = list(times), [math.log(ms) for ms in times.values()]
    lengths = [math.log(context) for context in contexts]
    exponential = statistics.correlation(contexts, logs) ** 2
    power = statistics.correlation(lengths, logs) ** 2
    first, last = min(times), max(times)
    return (
        exponential > power,
        f"After {last} tokens one takes {times[last] / times[first]:.1f} times as long as after {first}: it goes by "
        f"the length to the power of {statistics.linear_regression(lengths, logs).slope:.2f} (R² {power:.3f}; "
        f"{exponential:.3f} for an exponential).",
    )


@_claim(
    PAPER,
    "Memory is within a few percent of the theoretical minimum, whatever the batch.",
    "at most 5 % beyond with pages of 16",
    "audit",
)
def _overhead(results: Results) -> tuple[bool, str]:
    courses = {part["page_size"]: part["summary"]["overheads"] for part in results["audit"]["audit"]}
    means = {size: course["active"]["mean"] for size, course in courses.items()}
    words = ", ".join(f"{100 * mean:.1f} % ({size})" for size, mean in means.items())
    contiguous = next(iter(courses.values()))["padded"]["mean"]
    return (
        means[16] <= _FEW_PERCENT,
        f"Pages held beyond the tokens alone, on average over the steps of the mixed batch, by page size: {words}. "
        f"DynamicCache holds {100 * contiguous:.0f} % more than the tokens need. About half a page per row is lost: a "
        "few percent take small pages or long rows.",
    )


@_claim(
    PAPER,
    "Weights and activations are the most of a single sequence's memory, which paging leaves as it is.",
    "pages take at most a quarter of the weights after 2048 tokens",
    "latency",
)
def _peak(results: Results) -> tuple[bool, str]:
    held, weights = _held(results), results["latency"]["latency"]["weight_bytes"]
    context = max(context for context in held if context <= 2048)
    return (
        held[context] / weights <= _SMALL,
        f"After {context} tokens the pages of one row take {held[context] / _MIB:.0f} MiB beside "
        f"{weights / _MIB:.0f} MiB of weights. In a batch keys and values are the larger part.",
    )


@_claim(
    PAPER,
    "More memory shows only beyond 2048 tokens, since caches are allocated in powers of two.",
    "the same bytes up to 2048 tokens",
    "latency",
)
def _power_of_two(results: Results) -> tuple[bool, str]:
    held = _held(results)
    words = ", ".join(f"{num_bytes / _MIB:.1f} MiB ({context})" for context, num_bytes in held.items())
    return (
        len({num_bytes for context, num_bytes in held.items() if context <= 2048}) == 1,
        f"Pages held, by context: {words}. Memory grows with every page; nothing is rounded to a power of two.",
    )


def _held(results: Results) -> dict[int, int]:
    """Bytes of the pages of one row, by context."""
    rows = results["latency"]["latency"]["rows"]
    return {row["context"]: row["kv_bytes"] for row in rows if row["baseline"] == "paged"}


def _last_point(stage: str, words: str, baseline: str = "paged") -> None:
    """Note a claim about a scenario, judged by its last point: the same tokens, not slower, and not more memory."""

    @_claim(PAPER, words, "same tokens, steps not slower, at most 5 % more keys and values than DynamicCache", stage)
    def judge(results: Results) -> tuple[bool, str]:
        rows = results[stage][stage]["rows"]
        last = max(row.get("context", 0) for row in rows)
        at_end = {row["baseline"]: row for row in rows if row.get("context", 0) == last}
        own, theirs = at_end[baseline], at_end["dynamic"]
        if "error" in own or "error" in theirs:
            return False, f"It failed: {own.get('error', theirs.get('error'))}"
        step = theirs["ms_per_step"] / own["ms_per_step"]
        share = own["kv_bytes"] / theirs["kv_bytes"]
        is_same = all(row.get("same_tokens", True) for row in rows if row["baseline"] == baseline)
        where = f"After {last:,} tokens" if last else "The whole batch"
        model = f" ({own['model']})" if "model" in own else ""
        return (
            is_same and step >= 1 and share <= 1 + _FEW_PERCENT,
            f"{where}{model}: {'the same' if is_same else 'other'} tokens, {step:.2f} times as fast per step as "
            f"DynamicCache, {100 * share:.0f} % of its keys and values.",
        )


_last_point("single", "One sequence of 100,000 tokens.")
_last_point("mixed", "A mixed batch of 16.", "paged-ragged")
_last_point("chat", "A chat from 1,000 to 32,000 tokens.")


@_claim(PAPER, "All this on an NVIDIA L4, or a T4.", "it was run there")
def _gpu(results: Results) -> tuple[None, str]:
    return None, "No GPU was at hand, neither a T4 nor an L4. Every figure here is of a CPU."


@_claim(
    PACKAGE,
    "Decoding is at least as fast as over the contiguous cache at every length.",
    "not slower at any context, compiled or not",
    "latency",
)
def _speed(results: Results) -> tuple[bool, str]:
    rows = results["latency"]["latency"]["rows"]
    theirs = _times(rows, "dynamic")
    words, is_faster = [], True
    for name in ("paged", "paged-compiled"):
        ratios = {context: theirs[context] / own for context, own in _times(rows, name).items()}
        is_faster = is_faster and min(ratios.values()) >= 1
        words.append(f"{name}: " + ", ".join(f"{ratio:.2f} ({context})" for context, ratio in ratios.items()))
    return is_faster, f"Times as fast as DynamicCache while decoding one row, by context: {'; '.join(words)}."


@_claim(
    PACKAGE,
    "The page size costs memory, not time.",
    "the slowest of 16 to 256 takes at most 20 % longer than the fastest",
    "page-size",
)
def _page_size(results: Results) -> tuple[bool, str]:
    rows = [row for row in results["page-size"]["page-size"]["rows"] if row["page_size"] is not None]
    fastest = min(rows, key=lambda row: row["ms_per_step"])
    words = ", ".join(f"{row['ms_per_step']:.0f} ms ({row['page_size']})" for row in rows)
    spread = max(row["ms_per_step"] for row in rows) / fastest["ms_per_step"]
    return (
        spread <= 1 + _SPREAD,
        f"A step of the batch takes {words}. {fastest['page_size']} is the fastest here.",
    )


@_claim(PACKAGE, "Long contexts are answered alike.", "the same tokens everywhere", "long-context")
def _answers(results: Results) -> tuple[bool, str]:
    rows = [row for row in results["long-context"]["rows"] if row["cache"] == "paged"]
    same = sum(row["same_answers"] for row in rows)
    return same == len(rows), f"The same answers, token for token, in {same} of {len(rows)} tasks and contexts."


def _times(rows: list[dict[str, Any]], baseline: str) -> dict[int, float]:
    return {row["context"]: row["ms_per_step"] for row in rows if row["baseline"] == baseline and "error" not in row}
