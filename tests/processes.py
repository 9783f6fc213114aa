"""Processes that begin at once: each is forked from one that has imported what they need and done nothing else."""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.cache.test_saved", "tests.pages.tiers.test_store"])


def kill_after(seconds: float, awaited: Path | None, target: Callable[..., None], sign: Path, *arguments) -> None:
    """Let a process run, and kill it (SIGKILL).

    Args:
        seconds: to wait before.
        awaited: a folder, in which a file shall be unfinished then; None for any moment.
        target: makes a file `sign` when it is under way.
        sign: first argument of `target`.
        *arguments: the others.
    """
    sign.unlink(missing_ok=True)
    process = PROCESSES.Process(target=target, args=(sign, *arguments), daemon=True)
    process.start()
    while not sign.exists():
        assert process.is_alive()
        time.sleep(0.001)
    time.sleep(seconds)
    while awaited is not None and not any(awaited.rglob(".*.unfinished")):
        assert process.is_alive()
    process.kill()
    process.join()
    assert process.exitcode == -9
