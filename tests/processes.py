"""Processes that begin at once: each is forked from one that has imported the package and done nothing else."""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["hf_paged"])


def kill_after(seconds: float, target: Callable[..., None], sign: Path, *arguments) -> None:
    """Let a process run that makes a file `sign` when it is under way, and kill it (SIGKILL) a while after that."""
    sign.unlink(missing_ok=True)
    process = PROCESSES.Process(target=target, args=(sign, *arguments), daemon=True)
    process.start()
    while not sign.exists():
        assert process.is_alive()
        time.sleep(0.001)
    time.sleep(seconds)
    process.kill()
    process.join()
    assert process.exitcode == -9
