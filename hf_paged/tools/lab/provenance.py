"""Where a figure comes from: command, code, machine and versions."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def provenance() -> dict[str, Any]:
    """What whoever runs this again has to know; `num_threads` is torch's at this moment."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": _commit(),
        "machine": ", ".join([_processor(), f"{os.cpu_count()} cores", *_gpus()]),
        "num_threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("hf-paged", "transformers", "torch")}
        | {"python": platform.python_version()},
    }


def write_results(path: str | Path, results: dict[str, Any]) -> None:
    """Write figures as JSON that shows in a diff what has changed."""
    Path(path).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _commit() -> str:
    """The commit that the code is at, marked if the code has changed since."""
    folder = Path(__file__).parents[3]
    commands = (["git", "rev-parse", "--short", "HEAD"], ["git", "status", "--porcelain", "hf_paged", "examples"])
    try:
        head, changes = (
            subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout
            for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.strip() + ("-dirty" if changes else "")
