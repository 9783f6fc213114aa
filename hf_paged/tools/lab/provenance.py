"""Where a figure comes from: command, code, machine and versions."""

import json
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils import collect_env

import hf_paged


def provenance() -> dict[str, Any]:
    """What whoever runs this again has to know; `num_threads` is torch's at this moment."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": _commit(),
        "machine": ", ".join([_processor(), f"{os.cpu_count()} cores", *gpus]),
        "num_threads": torch.get_num_threads(),
        "versions": {"hf-paged": hf_paged.__version__}
        | {name: version(name) for name in ("transformers", "torch")}
        | {"python": platform.python_version()},
    }


def write_results(path: str | Path, results: dict[str, Any]) -> None:
    """Write figures as JSON that shows in a diff what has changed; the file is replaced by a whole one."""
    path = Path(path).resolve()
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def _processor() -> str:
    told = collect_env.get_cpu_info(collect_env.run)  # type: ignore[no-untyped-call]
    found = re.search(r"Model name:\s*(.+)", told or "")
    return found[1] if found else platform.processor() or platform.machine()


def _commit() -> str:
    """The commit that the code is at, marked if the code has changed since."""
    git = ["git", "-C", str(Path(__file__).parents[3])]
    try:
        head, changes = (
            subprocess.run([*git, *words.split()], capture_output=True, text=True, check=True).stdout
            for words in ("rev-parse --short HEAD", "status --porcelain hf_paged examples")
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.strip() + ("-dirty" if changes else "")
