"""Prompts of models with recurrent layers: row by row, each from where the prefix index has pages and states of it.

The states behind a prefix are those of one place. So they are kept where a prompt parts from an earlier one, where it
ends, both rounded down to a page, and between chunks; a row begins at the last such place that it has in common with
an earlier one. Behind padding a state would be another one, so that rows are computed without any, and joined.
"""

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hf_paged._transformers import CACHE
from hf_paged.batch.padding import Columns
from hf_paged.batch.prompt.prefixes import RowPrefixes
from hf_paged.batch.sequences import Sequences
from hf_paged.cache.layer import layers_over
from hf_paged.cache.prompt.origin import origin_of_prompt
from hf_paged.cache.prompt.packable import check_model, check_prompt
from hf_paged.errors import NotPackable

if TYPE_CHECKING:
    from hf_paged.cache.paged import PagedCache

_FIRST, _SECOND = 4, 2  # tokens of a trial
_TOLERANCE = 0.02  # of what a state loses that begins anew, which was a twentieth at least in all models tried
_ROUNDING = 1e-5  # of a state

_going_on: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()


def compute_by_row(
    model: PreTrainedModel,
    sequences: Sequences,
    filled: Sequences,
    input_ids: Tensor,
    inputs: dict[str, Any],
    max_tokens: int,
    *,
    is_new: bool,
) -> None:
    """Compute all columns of a prompt but the last one, and let `filled` hold them.

    Args:
        model: that generates.
        sequences: of the cache.
        filled: what is to hold the prompt.
        input_ids: `(num_rows, num_columns)`.
        inputs: what else `generate()` has prepared for the model.
        max_tokens: tokens of a chunk, a page at least.
        is_new: whether nothing of what is cached is to stay.

    Raises:
        NotPackable: if the rows are not what the decoder makes of each by itself, or can't go on from a state.
        OutOfPagesError: if the pool has too few pages.
    """
    from hf_paged.cache.paged import PagedCache  # which needs this module

    if sequences.rows.columns.count and not is_new:
        raise NotPackable("it goes on from states")
    decoder = check_model(model, packs=False)
    check_prompt(model, layers_over(filled), input_ids, inputs, 0)
    origin = origin_of_prompt(model, sequences)
    rows = _rows_of(input_ids, inputs.get("attention_mask"))
    if origin is None:
        raise NotPackable("a model in training mode makes no two passes alike, so that nothing is to be found")
    if not _goes_on(model, decoder):
        raise NotPackable("its recurrent layers begin anew where several tokens come behind others")
    parts: dict[bytes, PagedCache] = {}
    try:
        for row in rows:
            key = row.cpu().numpy().tobytes()
            if key not in parts:
                part = parts[key] = PagedCache(pool=sequences.pool, salt=sequences.salt)
                _compute_row(decoder, part, row, origin, max_tokens)
        joined = Sequences(sequences.pool)
        joined.rows.join([parts[row.cpu().numpy().tobytes()]._sequences.rows for row in rows])
        filled.exchange(joined)
        joined.clear()
    finally:
        for part in parts.values():
            part._sequences.clear()


def _rows_of(input_ids: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
    """The tokens of each row but the last."""
    ids = input_ids[:, :-1]
    if attention_mask is None:
        return list(ids)
    mask = attention_mask[:, :-1].bool()
    lengths = mask.sum(1)
    is_padded_left = mask == (torch.arange(ids.shape[1], device=ids.device) >= ids.shape[1] - lengths[:, None])
    if not is_padded_left.all() or not lengths.all() or lengths.max() < ids.shape[1]:
        raise NotPackable("its rows have padding elsewhere than on the left of all but the longest, or nothing else")
    return [row[len(row) - length :] for row, length in zip(ids, lengths.tolist(), strict=True)]


@torch.no_grad()
def _compute_row(decoder: torch.nn.Module, cache: "PagedCache", ids: Tensor, origin: Any, max_tokens: int) -> None:
    """Compute the tokens of one row, `(num_tokens,)`, behind those that are found, and let them be found."""
    sequences, rows, num_tokens = cache._sequences, cache._sequences.rows, len(ids)
    page_size = sequences.pool.page_size
    prefixes = RowPrefixes(sequences.pool, origin, ids.cpu().numpy()[None], Columns(num_tokens))
    for table in rows.tables:
        table.open_rows(1)
    prefixes.adopt(rows.tables, [0])
    begin = int(rows.lengths[0])
    if begin:
        rows.states, rows.columns = prefixes.found[0].states.fork(sequences.pool), Columns(begin)
    chunk = max(1, max_tokens // page_size) * page_size
    kept = prefixes.found[0].num_alike * page_size, num_tokens // page_size * page_size
    ends = {*range(begin + chunk, num_tokens, chunk), *kept, num_tokens}
    for end in sorted(end for end in ends if end > begin):
        positions = torch.arange(begin, end, device=ids.device)[None]
        decoder(input_ids=ids[None, begin:end], position_ids=positions, use_cache=True, **{CACHE: cache})
        sequences.end_step()
        if rows.columns.count != end or rows.absent:
            raise NotPackable("it passed over layers that its configuration has")
        if end % page_size == 0:
            prefixes.add(rows.tables)
            prefixes.keep(0, end, rows.states.fork(sequences.pool))
        begin = end
    rows.known_ids.note(ids[None].clone(), 0, num_tokens)
    rows.origin, rows.is_plain = origin, True


@torch.no_grad()
def _goes_on(model: PreTrainedModel, decoder: torch.nn.Module) -> bool:
    """Whether several tokens go on from the states of those before; in some models they begin anew."""
    if model not in _going_on:
        ids = torch.arange(_FIRST + _SECOND, device=model.device)[None] + 1
        whole, parts, second = (
            _states_after(model, decoder, [ids[:, slice(*each)] for each in pieces])
            for pieces in ([(None,)], [(_FIRST,), (_FIRST, None)], [(_FIRST, None)])
        )
        _going_on[model] = all(
            bool(
                (part - state).abs().max() <= _TOLERANCE * (alone - state).abs().max() + _ROUNDING * state.abs().max()
            )
            for state, part, alone in zip(whole, parts, second, strict=True)
        )
    return _going_on[model]


def _states_after(model: PreTrainedModel, decoder: torch.nn.Module, pieces: list[Tensor]) -> list[Tensor]:
    cache: Any = DynamicCache(config=model.config.get_text_config(decoder=True))
    for ids in pieces:
        decoder(input_ids=ids, position_ids=ids - 1, use_cache=True, **{CACHE: cache})
    states = (layer.recurrent_states.values() for layer in cache.layers if hasattr(layer, "recurrent_states"))
    return [state.float() for layer in states for state in layer if state is not None]
