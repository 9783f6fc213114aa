"""Compile: how long a process takes to its first tokens, with nothing compiled on disk and with everything."""

import os
import tempfile
from pathlib import Path
from typing import Any

from hf_paged.tools.bench import worker
from hf_paged.tools.bench.baselines import line_up
from hf_paged.tools.bench.race import race_once
from hf_paged.tools.bench.settings import Settings
from hf_paged.tools.lab.progress import progress
from hf_paged.tools.lab.subject import Subject

BASELINES = ("paged", "paged-compiled", "static-compiled")
PROMPT_LENGTH = 128


def measure(settings: Settings) -> dict[str, Any]:
    """Start each baseline twice, in processes of its own that share a new cache of compiled code.

    Returns:
        `rows` for each baseline and start, `"cold"` or `"warm"`, as `start_up` gives them, with `compiled_files`
        that lie in the cache afterwards.
    """
    rows = []
    for name in progress(settings.baselines or BASELINES, "compile"):
        with tempfile.TemporaryDirectory(prefix="hf-paged-bench-") as folder:
            for start in ("cold", "warm"):
                figures = worker.start("start_up", settings, name, TORCHINDUCTOR_CACHE_DIR=folder)
                files = sum(len(names) for _, _, names in os.walk(Path(folder)))
                rows.append({"baseline": name, "start": start} | figures | {"compiled_files": files})
    return {"rows": rows}


def start_up(subject: Subject, settings: Settings, name: str) -> dict[str, Any]:
    """Generate for the first time in this process.

    Returns:
        `first_token_s`, and `two_tokens_s`, with the first that decoding gives; both with all that is compiled for
        them. `ms_per_step` of the steps after the warm-up. Or `error`.
    """
    subject.token_bytes()  # reads the weights, which are not to be in the time
    ids = subject.prompt(PROMPT_LENGTH)
    with line_up(subject.model, [name], settings.page_size) as baselines:
        lap = race_once(baselines, ids, None, settings.max_new_tokens)[name]
    if lap.error is not None:
        return {"error": lap.error}
    counted = sorted(lap.counted_s)
    return {
        "first_token_s": lap.first_token_s,
        "two_tokens_s": lap.first_token_s + lap.step_s[0],
        "ms_per_step": 1e3 * counted[len(counted) // 2],
    }
