"""A process of its own, for what the process before it would spoil: peaks of memory, and starts from nothing."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from transformers.utils.logging import disable_progress_bar


def in_new_process(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Call a function in a new process, and return what it does; or `error`, why there is nothing."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=disable_progress_bar) as process:
        try:
            return process.submit(function, *arguments).result()
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
