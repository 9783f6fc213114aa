"""One row whose context grows from point to point, the cache being kept."""

from collections.abc import Sequence
from typing import Any

import torch

from hf_paged.tools.bench.baselines import line_up
from hf_paged.tools.bench.race import Lap, Race, summarize, warm_up
from hf_paged.tools.bench.settings import Settings
from hf_paged.tools.lab.memory import PeakMemory
from hf_paged.tools.lab.progress import progress
from hf_paged.tools.lab.subject import Subject, random_llama


def grow(
    subject: Subject, settings: Settings, title: str, contexts: Sequence[int], chunk_size: int | None
) -> list[dict[str, Any]]:
    """Let the context of a row grow, and decode at each point.

    Args:
        subject: whose prompt is long enough for all contexts.
        settings: as given.
        title: of the progress bar.
        contexts: tokens before each point's new tokens, in ascending order.
        chunk_size: tokens that are run at a time between two points; None: all.

    Returns:
        A row for each context and baseline: what `summarize` gives, `first_token_s` counting from the last point,
        and `resident_bytes`, what the process, all baselines together, holds more than at the beginning, at most.
    """
    ids = subject.prompt(contexts[-1])
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
    with line_up(subject.model, settings.baselines or ("dynamic", "paged"), settings.page_size) as baselines:
        warm_up(baselines, subject)
        for _ in progress(range(settings.rounds), title):
            memory = PeakMemory(subject.device)
            race = Race(baselines, contexts[-1] + settings.max_new_tokens)
            for point, piece in enumerate(progress(pieces[: len(contexts)], subject.name)):
                laps[point].append(race.lap(piece, settings.max_new_tokens, chunk_size))
                peaks[point] = max(peaks[point], memory.bytes)
            race.end()
    return [
        {"model": subject.name, "context": context} | row | {"resident_bytes": peak}
        for context, at_point, peak in zip(contexts, laps, peaks, strict=True)
        for row in summarize(at_point)
    ]


def subjects(subject: Subject, settings: Settings, default: Sequence[int]) -> list[tuple[Subject, list[int]]]:
    """The model as far as its positions go; beyond them, a tiny one with random weights for all contexts."""
    asked = sorted(settings.contexts or default)
    chosen = [(subject, subject.contexts(settings.contexts, default, settings.max_new_tokens))]
    if len(chosen[0][1]) < len(asked):
        tiny = random_llama(settings.dtype, settings.device)
        chosen.append((tiny, tiny.contexts(settings.contexts, default, settings.max_new_tokens)))
    return [(model, contexts) for model, contexts in chosen if contexts]
