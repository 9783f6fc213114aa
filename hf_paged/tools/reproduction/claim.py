"""What the paper or this package claims, and what the figures say to it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hf_paged.tools.bench.fit import fit_line

Results = Mapping[str, dict[str, Any]]
"""The contents of the results files, by stage."""

HOLDS, FAILS, NOT_MEASURED = "holds", "does not hold", "not measured"

_SAME_FLOAT32, _SAME_BFLOAT16 = 1e-5, 1e-3
_CHUNK_SIZES = (256, 7, 1)
_LINEAR = 0.98
_TWOFOLD = 2.0
_FEW_PERCENT = 0.05
_SMALL = 0.25
_SPREAD = 0.2
_MIB = 2**20


@dataclass(frozen=True)
class Finding:
    """What the figures say.

    Attributes:
        verdict: `HOLDS`, `FAILS` or `NOT_MEASURED`.
        words: our figure, in a sentence or two.
    """

    verdict: str
    words: str


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
    judge: Callable[[Results], Finding]

    def finding(self, results: Results) -> Finding:
        """What the figures say; not measured if a stage is missing."""
        missing = [stage for stage in self.stages if stage not in results]
        if missing:
            return Finding(NOT_MEASURED, f"No results of {', '.join(missing)}.")
        return self.judge(results)


def _perplexity(results: Results) -> Finding:
    exact = [_paged_perplexity(results[f"perplexity-{chunk}"]) for chunk in _CHUNK_SIZES]
    rounded = [_paged_perplexity(results[f"perplexity-{chunk}-bf16"]) for chunk in _CHUNK_SIZES]
    worst = max(abs(mean) for _, mean, _ in exact)
    # Rounding takes each token another way; what is more than noise shows in all runs together.
    num_tokens = sum(count for count, _, _ in rounded)
    pooled = abs(math.fsum(count * mean for count, mean, _ in rounded)) / num_tokens
    error = math.sqrt(math.fsum((count * error) ** 2 for count, _, error in rounded)) / num_tokens
    largest = max(abs(mean) for _, mean, _ in rounded)
    return Finding(
        HOLDS if worst <= _SAME_FLOAT32 and pooled <= _SAME_BFLOAT16 else FAILS,
        f"SmolLM2-135M on English prose, by 256, 7 and 1 tokens at once. float32: they differ by {worst:.1e} of the "
        f"perplexity at most. bfloat16: by {pooled:.1e} over all {num_tokens:,} tokens (standard error {error:.1e}), "
        f"by {largest:.1e} in one run.",
    )


def _paged_perplexity(results: dict[str, Any]) -> tuple[int, float, float]:
    """Tokens of a run, the relative difference of the paged perplexity with its sign, and its standard error."""
    figures = {row["cache"]: row for row in results["figures"]["figures"]}
    difference = math.log(figures["paged"]["perplexity"] / figures["dynamic"]["perplexity"])
    return results["figures"]["num_tokens"], difference, figures["paged"]["standard_error"]


def _growth(results: Results) -> Finding:
    fits = {row["baseline"]: row for row in results["latency"]["latency"]["fits"]}
    own = [fits[name] for name in ("paged", "paged-compiled")]
    words = [
        f"{fit['baseline']}: {fit['growth']:.2f} times from {fit['growth_from']} to {fit['growth_to']} tokens, R² of "
        f"a line {fit['r_squared']:.3f}"
        for fit in own
    ]
    does_hold = all(fit["growth"] <= _TWOFOLD for fit in own)
    scatter = ""
    if any(fit["r_squared"] < _LINEAR for fit in own):
        scatter = " How straight a line is can't be told where times scatter more than they grow."
    return Finding(HOLDS if does_hold else FAILS, f"{'; '.join(words)}.{scatter}")


def _no_cache(results: Results) -> Finding:
    times = _times(results["no-cache"]["no-cache"]["rows"], "no-cache")
    logs = [math.log(ms) for ms in times.values()]
    exponential = fit_line(list(times), logs)
    power = fit_line([math.log(context) for context in times], logs)
    first, last = min(times), max(times)
    return Finding(
        HOLDS if exponential.r_squared > power.r_squared else FAILS,
        f"After {last} tokens one takes {times[last] / times[first]:.1f} times as long as after {first}: it goes by "
        f"the length to the power of {power.slope:.2f} (R² {power.r_squared:.3f}; {exponential.r_squared:.3f} for an "
        "exponential).",
    )


def _speed(results: Results) -> Finding:
    rows = results["latency"]["latency"]["rows"]
    theirs = _times(rows, "dynamic")
    words, is_faster = [], True
    for name in ("paged", "paged-compiled"):
        own = _times(rows, name)
        ratios = {context: theirs[context] / own[context] for context in own}
        is_faster = is_faster and min(ratios.values()) >= 1
        words.append(f"{name}: " + ", ".join(f"{ratio:.2f} ({context})" for context, ratio in ratios.items()))
    return Finding(
        HOLDS if is_faster else FAILS,
        f"Times as fast as DynamicCache while decoding one row, by context: {'; '.join(words)}.",
    )


def _overhead(results: Results) -> Finding:
    courses = {part["page_size"]: part["summary"]["overheads"] for part in results["audit"]["audit"]}
    means = {size: course["active"]["mean"] for size, course in courses.items()}
    words = ", ".join(f"{100 * mean:.1f} % ({size})" for size, mean in means.items())
    contiguous = next(iter(courses.values()))["padded"]["mean"]
    return Finding(
        HOLDS if means[16] <= _FEW_PERCENT else FAILS,
        f"Pages held beyond the tokens alone, on average over the steps of the mixed batch, by page size: {words}. "
        f"DynamicCache holds {100 * contiguous:.0f} % more than the tokens need. About half a page per row is lost: a "
        "few percent take small pages or long rows.",
    )


def _peak(results: Results) -> Finding:
    rows = {row["context"]: row for row in results["latency"]["latency"]["rows"] if row["baseline"] == "paged"}
    context = max(context for context in rows if context <= 2048)
    weights = results["latency"]["latency"]["weight_bytes"]
    share = rows[context]["kv_bytes"] / weights
    return Finding(
        HOLDS if share <= _SMALL else FAILS,
        f"After {context} tokens the pages of one row take {rows[context]['kv_bytes'] / _MIB:.0f} MiB beside "
        f"{weights / _MIB:.0f} MiB of weights. In a batch keys and values are the larger part.",
    )


def _power_of_two(results: Results) -> Finding:
    rows = results["latency"]["latency"]["rows"]
    held = {row["context"]: row["kv_bytes"] for row in rows if row["baseline"] == "paged"}
    short = [num_bytes for context, num_bytes in held.items() if context <= 2048]
    words = ", ".join(f"{num_bytes / _MIB:.1f} MiB ({context})" for context, num_bytes in held.items())
    return Finding(
        HOLDS if len(set(short)) == 1 else FAILS,
        f"Pages held, by context: {words}. Memory grows with every page; nothing is rounded to a power of two.",
    )


def _scenario(stage: str, baseline: str = "paged") -> Callable[[Results], Finding]:
    """Judge a scenario by its last point: the same tokens, not slower, and not more memory."""

    def judge(results: Results) -> Finding:
        rows = results[stage][stage]["rows"]
        last = max(row.get("context", 0) for row in rows)
        at_end = {row["baseline"]: row for row in rows if row.get("context", 0) == last}
        own, theirs = at_end[baseline], at_end["dynamic"]
        if "error" in own or "error" in theirs:
            return Finding(FAILS, f"It failed: {own.get('error', theirs.get('error'))}")
        step = theirs["ms_per_step"] / own["ms_per_step"]
        share = own["kv_bytes"] / theirs["kv_bytes"]
        is_same = all(row.get("same_tokens", True) for row in rows if row["baseline"] == baseline)
        where = f"After {last:,} tokens" if last else "The whole batch"
        model = f" ({own['model']})" if "model" in own else ""
        tokens = "the same tokens" if is_same else "other tokens"
        return Finding(
            HOLDS if is_same and step >= 1 and share <= 1 + _FEW_PERCENT else FAILS,
            f"{where}{model}: {tokens}, {step:.2f} times as fast per step as DynamicCache, {100 * share:.0f} % of its "
            "keys and values.",
        )

    return judge


def _page_size(results: Results) -> Finding:
    rows = [row for row in results["page-size"]["page-size"]["rows"] if row["page_size"] is not None]
    fastest = min(rows, key=lambda row: row["ms_per_step"])
    words = ", ".join(f"{row['ms_per_step']:.0f} ms ({row['page_size']})" for row in rows)
    spread = max(row["ms_per_step"] for row in rows) / fastest["ms_per_step"]
    return Finding(
        HOLDS if spread <= 1 + _SPREAD else FAILS,
        f"A step of the batch takes {words}. {fastest['page_size']} is the fastest here.",
    )


def _answers(results: Results) -> Finding:
    rows = [row for row in results["long-context"]["rows"] if row["cache"] == "paged"]
    same = sum(row["same_answers"] for row in rows)
    return Finding(
        HOLDS if same == len(rows) else FAILS,
        f"The same answers, token for token, in {same} of {len(rows)} tasks and contexts.",
    )


def _gpu(results: Results) -> Finding:
    return Finding(NOT_MEASURED, "No GPU was at hand, neither a T4 nor an L4. Every figure here is of a CPU.")


def _times(rows: list[dict[str, Any]], baseline: str) -> dict[int, float]:
    return {row["context"]: row["ms_per_step"] for row in rows if row["baseline"] == baseline and "error" not in row}


PAPER, PACKAGE = "paper", "package"

_TOKENS_TIME_MEMORY = "same tokens, steps not slower, at most 5 % more keys and values than DynamicCache"

CLAIMS = (
    Claim(
        PAPER,
        "Paging leaves the perplexity as it is (7.32 against 7.31).",
        "relative difference at most 1e-5 in every run in float32, 1e-3 in all together in bfloat16",
        tuple(f"perplexity-{chunk}{suffix}" for suffix in ("", "-bf16") for chunk in _CHUNK_SIZES),
        _perplexity,
    ),
    Claim(
        PAPER,
        "With a cache, the time of a token grows linearly, about twofold from 128 to 2048 tokens.",
        "at most twofold",
        ("latency",),
        _growth,
    ),
    Claim(
        PAPER,
        "Without a cache it grows exponentially.",
        "an exponential fits better than a power of the length",
        ("no-cache",),
        _no_cache,
    ),
    Claim(
        PAPER,
        "Memory is within a few percent of the theoretical minimum, whatever the batch.",
        "at most 5 % beyond with pages of 16",
        ("audit",),
        _overhead,
    ),
    Claim(
        PAPER,
        "Weights and activations are the most of a single sequence's memory, which paging leaves as it is.",
        "pages take at most a quarter of the weights after 2048 tokens",
        ("latency",),
        _peak,
    ),
    Claim(
        PAPER,
        "More memory shows only beyond 2048 tokens, since caches are allocated in powers of two.",
        "the same bytes up to 2048 tokens",
        ("latency",),
        _power_of_two,
    ),
    Claim(PAPER, "One sequence of 100,000 tokens.", _TOKENS_TIME_MEMORY, ("single",), _scenario("single")),
    Claim(PAPER, "A mixed batch of 16.", _TOKENS_TIME_MEMORY, ("mixed",), _scenario("mixed", "paged-ragged")),
    Claim(PAPER, "A chat from 1,000 to 32,000 tokens.", _TOKENS_TIME_MEMORY, ("chat",), _scenario("chat")),
    Claim(PAPER, "All this on an NVIDIA L4, or a T4.", "it was run there", (), _gpu),
    Claim(
        PACKAGE,
        "Decoding is at least as fast as over the contiguous cache at every length.",
        "not slower at any context, compiled or not",
        ("latency",),
        _speed,
    ),
    Claim(
        PACKAGE,
        "The page size costs memory, not time.",
        "the slowest of 16 to 256 takes at most 20 % longer than the fastest",
        ("page-size",),
        _page_size,
    ),
    Claim(PACKAGE, "Long contexts are answered alike.", "the same tokens everywhere", ("long-context",), _answers),
)
