"""Allocator: time to take and give back a page, in pools of any size, alone and among threads."""

import statistics
import threading
import time
from typing import Any

from hf_paged.pages.allocator import PageAllocator
from hf_paged.tools.bench.settings import Settings
from hf_paged.tools.lab.progress import progress

POOL_SIZES = (10**3, 10**4, 10**5, 10**6)
NUM_THREADS = (1, 8)
_PAGES_PER_THREAD = 100  # eight threads share a pool of a thousand
_REPEATS = 100


def measure(settings: Settings) -> dict[str, Any]:
    """Take pages one by one and give them back one by one.

    Returns:
        `rows` for each number of pages and threads, with `us_per_page`: time per page to take it and give it back,
        as all threads together got on.
    """
    rows = []
    for num_pages in progress(POOL_SIZES, "allocator"):
        for num_threads in NUM_THREADS:
            seconds = [churn(num_pages, num_threads) for _ in range(settings.rounds)]
            count = num_threads * _PAGES_PER_THREAD * _REPEATS
            us_per_page = 1e6 * statistics.median(seconds) / count
            rows.append({"num_pages": num_pages, "num_threads": num_threads, "us_per_page": us_per_page})
    return {"rows": rows}


def churn(num_pages: int, num_threads: int) -> float:
    """Let threads take and give back pages of one pool; return the seconds until the last is done."""
    pool = PageAllocator(num_pages)
    # All pages have been held once, so that they come from the list of the released ones, as in a pool long in use.
    pool.release(pool.allocate(num_pages))
    start = threading.Barrier(num_threads + 1)

    def run() -> None:
        start.wait()
        for _ in range(_REPEATS):
            held = [pool.allocate(1) for _ in range(_PAGES_PER_THREAD)]
            for pages in held:
                pool.release(pages)

    threads = [threading.Thread(target=run) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    start.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    pool.check_integrity({})
    return seconds
