"""A process of its own, for what the process before it would spoil: peaks of memory, and starts from nothing."""

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from typing import Any

from transformers.utils.logging import disable_progress_bar


@contextmanager
def new_process(begin: Callable[..., None], *arguments: Any) -> Iterator[ProcessPoolExecutor]:
    """Start a process that begins with a call, and end it; at once, if this one is interrupted."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        # A terminal interrupts all processes at once, and this one is to say so. What is blocked here, as the process
        # is started, stays blocked there.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            process.submit(begin, *arguments)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        try:
            yield process
        except KeyboardInterrupt:
            for child in active_children():
                child.terminate()
            raise


def in_new_process(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Call a function in a new process, and return what it does; or `error`, why there is nothing."""
    with new_process(disable_progress_bar) as process:
        try:
            return process.submit(function, *arguments).result()
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
