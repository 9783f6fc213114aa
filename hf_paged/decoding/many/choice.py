"""The next tokens of rows, each as if it were alone."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_paged.decoding.many.row import Row


@torch.no_grad()
def choose(rows: Sequence[Row], scores: Tensor) -> list[int | Exception]:
    """Choose the next token of each row.

    Rows whose processors look at nothing but scores, and are alike, are processed together; any other is given its own
    ids, without padding. What fails for one row is the answer of that row.

    Args:
        rows: `len(scores)` of them.
        scores: `(num_rows, vocab_size)` float32; not changed.

    Returns:
        For each row its token, or what was raised.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault((index,) if row.likeness is None else (row.likeness, row.is_random), []).append(index)
    found: dict[int, Tensor | Exception] = {}
    for indices in groups.values():
        try:
            found |= zip(indices, _choose([rows[index] for index in indices], scores[indices]), strict=True)
        except Exception as error:
            found |= dict.fromkeys(indices, error)
    chosen = {index: token for index, token in found.items() if isinstance(token, Tensor)}
    on_host = torch.stack(list(chosen.values())).tolist() if chosen else []  # at once, as the host waits for them
    answers: dict[int, Any] = found | dict(zip(chosen, on_host, strict=True))
    return [answers[index] for index in range(len(rows))]


def _choose(rows: list[Row], scores: Tensor) -> list[Tensor | Exception]:
    first = rows[0]
    if first.processors:
        ids = torch.tensor([first.ids], device=scores.device)  # of which those of scores alone see nothing
        for processor in first.processors:
            scores = processor(ids, scores)
    if not first.is_random:
        return list(scores.argmax(dim=-1))
    return [_draw(own, row) for own, row in zip(torch.softmax(scores, dim=-1), rows, strict=True)]


def _draw(weights: Tensor, row: Row) -> Tensor | Exception:
    # From numbers of its own, so that they don't depend on what runs beside it.
    try:
        return torch.multinomial(weights, 1, generator=row.generator)[0]
    except RuntimeError as error:  # no weights at all
        return error
