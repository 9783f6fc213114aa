"""The pages of a pool as a picture in text."""

from hf_paged.page_table import PageTable
from hf_paged.pool import PagePool

_LEGEND = "# full   1-9 tenths full   S shared   o held by another cache   . free"


def draw(pool: PagePool, table: PageTable, width: int) -> str:
    """Draw what `table` holds of `pool`.

    Args:
        pool: the pages.
        table: the rows to show.
        width: pages on a line.
    """
    used: dict[int, int] = {}
    for page, num_tokens in table.pages_with_tokens():
        used[page] = max(num_tokens, used.get(page, 0))
    marks = "".join(_mark(page, used.get(page), pool) for page in range(pool.num_pages))
    lines = [f"{pool.num_pages} pages of {pool.page_size} tokens: {_LEGEND}"]
    lines += [f"{start:6} {marks[start : start + width]}" for start in range(0, len(marks), width)]
    for row, length in enumerate(table.lengths):
        pages = " ".join(map(str, table.row_pages(row)))
        lines.append(f"row {row}: {length} tokens in pages {pages or '-'}")
    return "\n".join(lines)


def _mark(page: int, num_tokens: int | None, pool: PagePool) -> str:
    num_holders = pool.allocator.ref_count(page)
    if num_tokens is None:
        return "." if num_holders == 0 else "o"
    if num_holders > 1:
        return "S"
    if num_tokens == pool.page_size:
        return "#"
    return str(max(1, 10 * num_tokens // pool.page_size))
