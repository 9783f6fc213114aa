"""What keys and values are made by, as a prefix index knows it."""

import hashlib
from collections.abc import Hashable
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from hf_paged._transformers import CACHE
from hf_paged.batch.sequences import Sequences
from hf_paged.cache.layer import layers_over
from hf_paged.cache.prompt.fingerprint import fingerprint
from hf_paged.cache.weights_digest import model_digest
from hf_paged.pages.pool import PagePool


def origin_of_prompt(model: PreTrainedModel, sequences: Sequences) -> Hashable | None:
    """Tell apart what a model is about to compute from all else; None if it is not to be found later.

    Args:
        model: that computes the prompt.
        sequences: the rows.

    Raises:
        ValueError: if there is a store, and weights aren't in memory.
    """
    pool = sequences.pool
    if pool.prefix_index is None or model.training:  # dropout makes no two passes alike
        return None
    if pool.store is not None:
        _open_storage(model, pool)
    return origin_of(model, sequences)


def origin_of(model: Any, sequences: Sequences) -> Hashable:
    """Tell apart what a model computes from all else: in this process, or where there is a store, in any.

    Args:
        model: that computes the rows.
        sequences: the rows.

    Raises:
        ValueError: if there is a store, and weights aren't in memory.
    """
    salt = sequences.salt
    if sequences.pool.store is None:
        return fingerprint(model), salt
    # In the files of the store it is not to be read.
    secret = None if salt is None else hashlib.sha256(salt.encode()).hexdigest()
    return model_digest(model).whole, _autocast(model), secret


def _autocast(model: torch.nn.Module) -> tuple[tuple[str, str], ...]:
    kinds = sorted({"cpu", *(parameter.device.type for parameter in model.parameters())})
    return tuple((kind, str(torch.get_autocast_dtype(kind))) for kind in kinds if torch.is_autocast_enabled(kind))


def _open_storage(model: PreTrainedModel, pool: PagePool) -> None:
    """Let all layers have storage before the first prompt, as it says what there is in the store for them."""
    if all(pool.storage(layer) is not None for layer in pool.group_of_layer):
        return
    trial = Sequences(pool)
    token = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
    try:
        with torch.no_grad():
            model(token, **{CACHE: Cache(layers=layers_over(trial))}, use_cache=True)
    finally:
        trial.clear()
