"""A process of its own, for what the process before it would spoil: peaks of memory, and starts from nothing.

How: `python -m hf_paged.tools.bench.worker TASK CONTENDER SETTINGS`, the settings as JSON. The figures are the last
line of its output.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from hf_paged.tools.bench.settings import Settings, load
from hf_paged.tools.lab.subject import Subject


def start(task: str, settings: Settings, baseline: str, **environment: str) -> dict[str, Any]:
    """Run a task in a new process.

    Args:
        task: `"peak"` of `mixed`, or `"start_up"` of `compile`.
        settings: from which the process loads its model.
        baseline: by name.
        **environment: variables beside those of this process.

    Returns:
        What the task gives, or `error`: the last line that the process wrote to its standard error.
    """
    arguments = [task, baseline, json.dumps(dataclasses.asdict(settings))]
    done = subprocess.run(
        [sys.executable, "-m", "hf_paged.tools.bench.worker", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"The process ended with {done.returncode}."]
        return {"error": lines[-1]}
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def perform(task: str, baseline: str, settings: Settings) -> dict[str, Any]:
    """Run a task in this process."""
    # Not above: these modules start workers.
    from hf_paged.tools.bench.compile import start_up
    from hf_paged.tools.bench.mixed import peak

    tasks: dict[str, Callable[[Subject, Settings, str], dict[str, Any]]] = {"peak": peak, "start_up": start_up}
    return tasks[task](load(settings), settings, baseline)


def read_settings(text: str) -> Settings:
    """Settings from JSON, whose lists are tuples here."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(text).items()
    }
    return Settings(**values)


if __name__ == "__main__":
    print(json.dumps(perform(sys.argv[1], sys.argv[2], read_settings(sys.argv[3]))))
