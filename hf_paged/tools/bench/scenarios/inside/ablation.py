"""What each trick brings: decoding with it and without it, in turns, in two processes."""

import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import torch

from hf_paged._torch.tricks import SWITCH, TRICKS
from hf_paged.tools.bench.race import race_once
from hf_paged.tools.bench.scenario import Scenario
from hf_paged.tools.bench.settings import Settings, load
from hf_paged.tools.bench.worker import new_process
from hf_paged.tools.lab.baselines import line_up
from hf_paged.tools.progress import progress

BASELINES = ("paged", "paged-compiled")
CONTEXTS = (128, 1024)
_ROWS = (1, 8)


def measure(settings: Settings, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Decode with everything on and with each trick off, round by round in turns.

    Args:
        settings: as given.
        rows: gets one for each trick, baseline, context and number of rows: `ms_per_step` with everything on and
            `ms_per_step_without`, and `ratio`, the median over the rounds of the second by the first; or `error`.
            Tricks that only work elsewhere are left out.
    """
    here = (None, torch.device(settings.device).type)
    tricks = [
        name
        for name, trick in TRICKS.items()
        if trick.can_be_switched_off and trick.device_type in here and trick.is_on
    ]
    with _process("") as everything:
        for trick in progress(tricks, "ablation"):
            with _process(trick) as without:
                for baseline in settings.caches or BASELINES:
                    for context in settings.contexts or CONTEXTS:
                        for num_rows in _ROWS:
                            case = baseline, context, num_rows
                            figures = _compare(everything, without, settings, *case)
                            names = ("baseline", "context", "num_rows")
                            rows.append({"without": trick} | dict(zip(names, case, strict=True)) | figures)
    return {}


def step_ms(settings: Settings, baseline: str, context: int, num_rows: int) -> float:
    """Milliseconds of a decoding step in this process, the median of a lap.

    Args:
        settings: say on which model, and how many tokens.
        baseline: name of what decodes.
        context: tokens of each row, which differ from row to row.
        num_rows: rows of the batch.
    """
    model = load(settings)
    model.check_room([context], settings.max_new_tokens)
    ids = torch.cat([model.prompt(context).roll(row, dims=1) for row in range(num_rows)])
    with line_up(model.model, [baseline], settings.page_size) as baselines:
        lap = race_once(baselines, ids, None, settings.max_new_tokens)[baseline]
    if lap.error is not None:
        raise RuntimeError(lap.error)
    return 1e3 * statistics.median(lap.counted_s)


def _process(trick: str) -> AbstractContextManager[ProcessPoolExecutor]:
    return new_process(_switch_off, trick)


def _switch_off(trick: str) -> None:
    os.environ[SWITCH] = trick


def _compare(
    everything: ProcessPoolExecutor, without: ProcessPoolExecutor, settings: Settings, *case: Any
) -> dict[str, Any]:
    times: dict[str, list[float]] = {"ms_per_step": [], "ms_per_step_without": []}
    try:
        for number in range(settings.rounds + 1):  # the first compiles, and is not counted
            turns = list(zip(times, (everything, without), strict=True))
            for name, process in turns[:: 1 if number % 2 else -1]:
                taken = process.submit(step_ms, settings, *case).result()
                if number:
                    times[name].append(taken)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    ratios = [off / on for on, off in zip(*times.values(), strict=True)]
    return {name: statistics.median(taken) for name, taken in times.items()} | {"ratio": statistics.median(ratios)}


ABLATION = Scenario(
    "ablation",
    "what each trick brings: decoding with it and without it, in turns",
    measure,
    ("without", "baseline", "context", "num_rows", "ms_per_step", "ms_per_step_without", "ratio", "error"),
)
