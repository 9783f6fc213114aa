"""Memory statistics as a short table, for people."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_paged.pages.stats import MemoryStats

_MIB = 2**20


def report(stats: "MemoryStats") -> str:
    """Lay statistics out: MiB, per cent of the pages held, and what it is.

    4 pages of 1 MiB whose slots are 3/4 full read `pages held  4.00 MiB  100.0 %`, `tokens  3.00 MiB  75.0 %` and
    `empty slots  1.00 MiB  25.0 %`.
    """
    cached = f", {stats.num_cached_pages:,} cached" if stats.num_cached_pages else ""
    lines = (
        (
            "pages held",
            stats.active_bytes,
            f"{stats.num_active_pages:,} pages of {stats.page_size} tokens, {stats.num_shared_pages:,} shared",
        ),
        ("  tokens", stats.live_bytes, f"{stats.num_tokens:,} in all rows, {stats.num_unique_tokens:,} stored"),
        ("  empty slots", stats.wasted_bytes, ""),
        ("without pages", stats.padded_bytes, "every row as wide as the longest, nothing shared"),
        ("whole pool", stats.reserved_bytes, f"{stats.num_pages:,} pages, {stats.num_free_pages:,} free{cached}"),
    )
    held = stats.active_bytes
    shown = [
        f"{name:13} {num_bytes / _MIB:10,.2f} MiB {_per_cent(num_bytes, held):>10}   {words}".rstrip()
        for name, num_bytes, words in lines
    ]
    if stats.state_bytes:
        shown.append(f"states        {stats.state_bytes / _MIB:10,.2f} MiB{'':14}of recurrent layers, in no page")
    if asked := stats.num_looked_up_tokens:
        found = f"{stats.num_hit_tokens:,} of {asked:,} tokens, {_per_cent(stats.num_hit_tokens, asked)}"
        shown.append(f"found again   {found}")
    return "\n".join(shown)


def _per_cent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}".replace("%", " %") if whole else ""
