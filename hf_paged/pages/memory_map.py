"""The pages of a pool as a picture in text."""

from collections.abc import Sequence

from hf_paged.pages.block_table import BlockTable
from hf_paged.pages.group import PageGroup

_LEGEND = "# full   1-9 tenths full   S shared   o held by another cache   c cached   . free"


def draw(tables: Sequence[BlockTable], width: int) -> str:
    """Draw what the rows of a cache hold in each group of layers.

    Args:
        tables: the rows to show, for each group.
        width: pages on a line.
    """
    return "\n".join(line for table in tables for line in _lines(table, width, names_group=len(tables) > 1))


def _lines(table: BlockTable, width: int, names_group: bool) -> list[str]:
    group = table.group
    used: dict[int, int] = {}
    for page, _, num_tokens in table.held_pages():
        used[page] = max(num_tokens, used.get(page, 0))
    marks = "".join(_mark(page, used.get(page), group) for page in range(group.num_pages))
    kind = f" for layers with {'no window' if group.window is None else f'a window of {group.window}'}"
    lines = [f"{group.num_pages} pages of {group.page_size} tokens{kind if names_group else ''}: {_LEGEND}"]
    lines += [f"{start:6} {marks[start : start + width]}" for start in range(0, len(marks), width)]
    for row, length in enumerate(table.lengths):
        pages = " ".join(map(str, table.row_pages(row)))
        lines.append(f"row {row}: {length} tokens in pages {pages or '-'}")
    return lines


def _mark(page: int, num_tokens: int | None, group: PageGroup) -> str:
    num_holders = group.allocator.num_holders(page)
    if num_tokens is None:
        return "o" if num_holders else "c" if group.allocator.ref_count(page) else "."
    if num_holders > 1:
        return "S"
    if num_tokens == group.page_size:
        return "#"
    return str(max(1, 10 * num_tokens // group.page_size))
