"""What of a cache later prompts may find: rows that one model has computed, of known tokens and of these alone."""

from typing import Any

from torch import Tensor

from hf_paged.batch.prompt.prefixes import is_findable, let_be_found
from hf_paged.batch.sequences import Sequences
from hf_paged.cache.prompt.checks import ends_in_padding
from hf_paged.cache.prompt.origin import origin_of
from hf_paged.cache.prompt.packable import check_model, check_prompt
from hf_paged.errors import NotPackable


def goes_on_alike(sequences: Sequences, model: Any, input_ids: Any, inputs: dict[str, Any]) -> bool:
    """Whether `generate()` goes on with what has computed the rows so far, and with nothing but ids and padding.

    Behind padding at the end of a prompt it gives the next tokens other positions than their places.

    Args:
        sequences: the rows.
        model: that generates.
        input_ids: `(num_rows, num_columns)`.
        inputs: its other inputs.
    """
    from hf_paged.cache.layer import layers_over

    if ends_in_padding(inputs):
        return False
    try:
        check_model(model)
        check_prompt(model, layers_over(sequences), input_ids, inputs, sequences.rows.columns.count)
    except NotPackable:
        return False
    return sequences.rows.origin == origin_of(model, sequences)


def commit(sequences: Sequences, ids: Tensor) -> None:
    """Let the full pages of rows be found by their tokens.

    Args:
        sequences: the rows.
        ids: `(num_rows, at least num_columns)`.

    Raises:
        ValueError: if that can't be, or they hold other tokens.
    """
    index = sequences.pool.prefix_index
    if index is None:
        raise ValueError(
            "commit() was called on a cache whose pool has no prefix cache. Make the pool by "
            "PagePool.from_model(model, num_pages=..., prefix_cache=True) and the cache by PagedCache(pool=pool)."
        )
    sequences.end_step()
    rows = sequences.rows
    num_rows, num_columns = rows.num_committed, rows.columns.count
    if not isinstance(ids, Tensor) or ids.ndim != 2 or len(ids) != num_rows or ids.shape[1] < num_columns:
        found = f"ids of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else f"a {type(ids).__name__}"
        raise ValueError(
            f"commit() was given {found}, but the cache holds {num_rows} rows of {num_columns} columns. Pass what "
            "generate() returned."
        )
    if not is_findable(rows):
        raise ValueError(
            "commit() was called on a cache that may hold more than a model makes of these ids by themselves: it was "
            "not filled by cache.prefill() and generate() alone, or with another model, adapter, mask or positions in "
            "between, or was edited. Compute such a prompt by cache.prefill() in a new cache, or leave out commit()."
        )
    rows.known_ids.compare(ids, None, rows.columns)
    let_be_found(rows, ids)
