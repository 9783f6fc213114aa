"""How long a process takes to its first tokens, with nothing compiled on disk and with everything."""

import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from hf_paged.tools.bench.race import race_once
from hf_paged.tools.bench.scenario import Scenario
from hf_paged.tools.bench.settings import Settings, load
from hf_paged.tools.bench.worker import in_new_process
from hf_paged.tools.lab.baselines import line_up
from hf_paged.tools.lab.memory import token_bytes
from hf_paged.tools.progress import progress

BASELINES = ("paged", "paged-compiled", "static-compiled")
PROMPT_LENGTH = 128


def measure(settings: Settings, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Start each baseline twice, in processes of its own that share a new cache of compiled code.

    Args:
        settings: as given.
        rows: gets one for each baseline and start, `"cold"` or `"warm"`, as `start_up` gives them, with
            `compiled_files` that lie in the cache afterwards.
    """
    for name in progress(settings.caches or BASELINES, "compile"):
        with tempfile.TemporaryDirectory(prefix="hf-paged-bench-") as folder:
            for start in ("cold", "warm"):
                figures = in_new_process(start_up, settings, name, folder)
                files = sum(path.is_file() for path in Path(folder).rglob("*"))
                rows.append({"baseline": name, "start": start} | figures | {"compiled_files": files})
    return {}


def start_up(settings: Settings, name: str, folder: str) -> dict[str, Any]:
    """Generate for the first time in this process, with a folder for what is compiled.

    Returns:
        `first_token_s`, and `two_tokens_s`, with the first that decoding gives; both with all that is compiled for
        them. `ms_per_step` of the steps after the warm-up. Or `error`.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    model = load(settings)
    token_bytes(model.model)  # reads the weights, which are not to be in the time
    with line_up(model.model, [name], settings.page_size) as baselines:
        lap = race_once(baselines, model.prompt(PROMPT_LENGTH), None, settings.max_new_tokens)[name]
    if lap.error is not None:
        return {"error": lap.error}
    return {
        "first_token_s": lap.first_token_s,
        "two_tokens_s": lap.first_token_s + lap.step_s[0],
        "ms_per_step": 1e3 * statistics.median(lap.counted_s),
    }


COMPILE = Scenario(
    "compile",
    "how long a process takes to its first tokens, with nothing compiled on disk and with everything",
    measure,
    ("baseline", "start", "first_token_s", "two_tokens_s", "ms_per_step", "error"),
)
