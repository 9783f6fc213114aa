"""One row whose context grows from point to point, the cache being kept: a long sequence, and a conversation."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from hf_paged.tools.bench.race import Lap, Race, summarize, warm_up
from hf_paged.tools.bench.scenario import LAP, WHOLE, Scenario
from hf_paged.tools.bench.settings import Settings, line_up_for, load
from hf_paged.tools.lab.memory import PeakMemory, token_bytes
from hf_paged.tools.lab.model import MeasuredModel, random_model
from hf_paged.tools.progress import progress

_LONG = (1000, 4000, 8000, 16000, 32000, 64000, 100000)
_TURNS = (1000, *range(2000, 32001, 2000))


def measure(
    default: Sequence[int], is_chunked: bool, settings: Settings, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """Let the context grow; beyond the positions of the model, with a tiny random one.

    Args:
        default: contexts, where none are asked for.
        is_chunked: whether what lies between two points is run in chunks.
        settings: as given.
        rows: gets one for each model, context and baseline, as `grow` gives them.
    """
    chunk_size = settings.chunk_size if is_chunked else None
    models = reaching(load(settings), settings, default)
    for model, contexts in models:
        grow(model, settings, contexts, chunk_size, rows)
    return {}


def grow(
    model: MeasuredModel,
    settings: Settings,
    contexts: Sequence[int],
    chunk_size: int | None,
    rows: list[dict[str, Any]],
) -> None:
    """Let the context of a row grow, and decode at each point.

    Args:
        model: whose prompt is long enough for all contexts.
        settings: as given.
        contexts: tokens before each point's new tokens, in ascending order.
        chunk_size: tokens that are run at a time between two points; None: all.
        rows: gets one for each context and baseline: what `summarize` gives, `first_token_s` counting from the last
            point, `minimum_bytes`, keys and values of all tokens that are stored, and unless each baseline's peak is
            known, `resident_bytes`, what the process, all baselines together, holds more than at the beginning, at
            most. If it ends early, these are of the points that were reached.
    """
    ids = model.prompt(contexts[-1])
    lengths = [after - before for before, after in zip([0, *contexts], contexts, strict=False)]
    # The new tokens of one point are part of the context of the next.
    added = [lengths[0], *(length - settings.max_new_tokens for length in lengths[1:])]
    if min(added) < 1:
        raise ValueError(
            f"Contexts {list(contexts)} were asked for with {settings.max_new_tokens} new tokens at each, which is "
            "more than lies between two of them. Ask for fewer contexts or fewer new tokens."
        )
    pieces = torch.split(ids, [*added, ids.shape[1] - sum(added)], dim=1)
    laps: list[list[dict[str, Lap]]] = [[] for _ in contexts]
    peaks = [0] * len(contexts)
    bytes_per_token = token_bytes(model.model)
    with line_up_for(settings, model, ("dynamic", "paged")) as baselines:
        warm_up(baselines, model)
        try:
            for _ in range(settings.rounds):
                memory = PeakMemory(model.device)
                race = Race(baselines, contexts[-1] + settings.max_new_tokens)
                for point, piece in enumerate(progress(pieces[: len(contexts)], model.name)):
                    laps[point].append(race.lap(piece, settings.max_new_tokens, chunk_size))
                    peaks[point] = max(peaks[point], memory.bytes)
                race.end()
        finally:
            rows += [
                {"model": model.name, "context": context}
                | ({} if settings.whole else {"resident_bytes": peak})
                | {"minimum_bytes": (context + settings.max_new_tokens - 1) * bytes_per_token, **row}
                for context, at_point, peak in zip(contexts, laps, peaks, strict=True)
                if at_point
                for row in summarize(at_point)
            ]


def reaching(
    model: MeasuredModel, settings: Settings, default: Sequence[int]
) -> list[tuple[MeasuredModel, list[int]]]:
    """The model as far as its positions go; beyond them, a tiny one with random weights for all contexts."""
    chosen = sorted(set(settings.contexts or default))
    own = [context for context in chosen if context + settings.max_new_tokens <= model.max_length]
    reached = [(model, own)] if own else []
    if own != chosen:
        tiny = random_model(settings.dtype, settings.device)
        reached.append((tiny, tiny.contexts(chosen, (), settings.max_new_tokens)))
    return reached


_COLUMNS = (*LAP, "kv_bytes", *WHOLE, "peak_bytes", "same_tokens", "error")

SINGLE = Scenario(
    "single",
    "one long sequence, up to 100,000 tokens where the model allows, its prompt run in chunks",
    partial(measure, _LONG, True),
    _COLUMNS,
    ("ms_per_step", "kv_bytes"),
)
CHAT = Scenario(
    "chat",
    "a conversation that grows turn by turn, each turn adding to the cache of the last",
    partial(measure, _TURNS, False),
    _COLUMNS,
    ("first_token_s", "ms_per_step"),
)
