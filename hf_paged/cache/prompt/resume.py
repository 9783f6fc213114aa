"""A used cache that goes on with another version of its history: each row keeps what both have in common."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_paged.attention.mask import NAME
from hf_paged.batch.known_ids import is_whole_prompt
from hf_paged.batch.padding import BoolMatrix, Counts
from hf_paged.batch.prompt.common_prefix import common_columns, common_lengths, is_continued
from hf_paged.batch.rows import Rows
from hf_paged.batch.sequences import Sequences
from hf_paged.cache.prompt.origin import origin_of

_SETTINGS = {"cache", "past_key_values", "use_cache", "logits_to_keep", "return_dict"}


def is_other_prompt(
    sequences: Sequences, input_ids: Tensor, attention_mask: Tensor | None, *, must_know: bool
) -> bool:
    """Whether a prompt is another one than what is cached, as far as that is known.

    Args:
        sequences: the rows, between two steps.
        input_ids: `(num_rows, num_columns)`.
        attention_mask: like `input_ids`, 0 for padding; None for what `generate()` makes of that.
        must_know: whether it is a mistake that it isn't known; else such rows are taken to be as the prompt says.

    Raises:
        ValueError: if that must be known and isn't, or if rows don't fit those that are cached.
    """
    rows = sequences.rows
    if rows.columns.count == 0:
        return False
    if not _is_known(rows):
        if must_know:
            raise ValueError(
                "resume() was called on a cache of which it isn't known that a model made it of these ids by "
                "themselves: there was a forward pass of your own, other inputs than ids, positions or a mask of your "
                "own, padding under another attention than paged_flex, or an edit. Take the tokens back yourself by "
                "cache.crop(-n), or compute the prompt anew after cache.reset()."
            )
        return False
    rows.check_shape(len(input_ids), 1)
    mask = None if attention_mask is None else _on_host(attention_mask)
    return not is_continued(rows, input_ids.cpu().numpy(), mask, may_hide=not must_know)


def is_other_than(
    sequences: Sequences, input_ids: Tensor, attention_mask: Tensor | None, generation_config: Any
) -> bool:
    """Whether what `generate()` is about to go on with is known to be another prompt than what is cached.

    Args:
        sequences: the rows, between two steps.
        input_ids: `(num_rows, num_columns)`, as it has prepared them.
        attention_mask: like `input_ids`, 0 for padding; None without padding.
        generation_config: of the call.

    Raises:
        ValueError: if rows don't fit those that are cached.
    """
    is_whole = is_whole_prompt(input_ids, attention_mask, generation_config)
    if not (is_whole and _is_known(sequences.rows)):
        return False
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    return is_other_prompt(sequences, input_ids, mask, must_know=True)


def kept_lengths(model: torch.nn.Module, sequences: Sequences, input_ids: Tensor, mask: Tensor | None) -> Counts:
    """Count the first tokens of each row that stay, of all but the last column of another prompt.

    Args:
        model: that goes on; if it is known not to be what has computed the rows, none stay.
        sequences: the rows.
        input_ids: `(num_rows, num_columns)`.
        mask: like `input_ids`, 0 for padding; None without padding.
    """
    rows = sequences.rows
    if rows.origin is not None and rows.origin != origin_of(model, sequences):
        return np.zeros(len(input_ids), dtype=np.int64)
    given = None if mask is None else _on_host(mask[:, :-1])
    return common_lengths(rows, input_ids[:, :-1].cpu().numpy(), given)


def keep_columns(sequences: Sequences, kept: Counts, input_ids: Tensor, mask: Tensor | None) -> None:
    """Keep the columns of another prompt of which all tokens stay, as a pass that isn't packed goes on from a column.

    Args:
        sequences: a fork of the rows, which is changed.
        kept: what `kept_lengths` has returned.
        input_ids: `(num_rows, num_columns)`.
        mask: like `input_ids`, 0 for padding; None without padding.
    """
    given = np.ones(input_ids.shape, dtype=bool) if mask is None else _on_host(mask)
    lengths, columns = common_columns(sequences.rows, kept, given[:, :-1])
    if not lengths.any():
        sequences.clear()
        return
    sequences.rows.keep(lengths, columns)
    sequences.rows.known_ids.note(input_ids.clone(), 0, columns.count)


def note_generating(sequences: Sequences, model: Any, input_ids: Any, inputs: dict[str, Any]) -> None:
    """Note whether rows will still be what a model makes of ids at their places by themselves.

    Args:
        sequences: the rows, which `generate()` is about to go on with.
        model: that generates.
        input_ids: `(num_rows, num_columns)`.
        inputs: its other inputs.
    """
    rows = sequences.rows
    rows.is_plain = (rows.is_plain or rows.columns.count == 0) and is_plain_prompt(model, input_ids, inputs)


def is_plain_prompt(model: Any, input_ids: Any, inputs: dict[str, Any]) -> bool:
    """Whether a model will be given ids at their places and nothing else.

    Args:
        model: that generates.
        input_ids: `(num_rows, num_columns)`.
        inputs: its other inputs, as `generate()` has prepared them.
    """
    attention = model.config.get_text_config(decoder=True)._attn_implementation
    given = {name: value for name, value in inputs.items() if not (value is None or value is False)}
    mask, positions = given.pop("attention_mask", None), given.pop("position_ids", None)
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or set(given) - _SETTINGS:
        return False
    if mask is not None and (mask.ndim != 2 or (attention != NAME and not mask.all())):
        return False
    if positions is None:
        return True
    if positions.ndim != 2:
        return False
    if mask is None:
        return bool((positions == torch.arange(positions.shape[1], device=positions.device)).all())
    places = mask.long().cumsum(1) - 1
    return positions.shape[1] == mask.shape[1] and not bool(((positions != places) & mask.bool()).any())


def _is_known(rows: Rows) -> bool:
    return rows.is_plain and rows.known_ids.are_all(rows.columns.count)


def _on_host(mask: Tensor) -> BoolMatrix:
    on_host: BoolMatrix = mask.bool().cpu().numpy()
    return on_host
