"""One of many prompts, as it was given."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_OF_PROMPTS = ("input_ids", "attention_mask", "seed")


@dataclass(frozen=True)
class Prompt:
    """A prompt, and how it is to be answered.

    Attributes:
        index: its number among all.
        given: as it was given.
        ids: its tokens.
        seed: of its random numbers; None if it has none of its own.
        settings: other arguments of `generate()`, for it alone.
    """

    index: int
    given: Any
    ids: list[int]
    seed: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, index: int, given: Any) -> "Prompt":
        """Read what was given.

        Args:
            index: its number.
            given: token ids, a list or a tensor `(num_tokens,)` or `(1, num_tokens)`; or a mapping that has them as
                `input_ids`, maybe with an `attention_mask`, 0 for padding, a `seed`, and arguments of `generate()`.

        Raises:
            ValueError: if these are no tokens, or no seed, or what is for all prompts.
        """
        if not isinstance(given, Mapping):
            return cls(index, given, _tokens(given))
        if "input_ids" not in given:
            raise ValueError(
                f"A prompt was given as a {type(given).__name__} of {', '.join(map(str, given)) or 'nothing'}, but it "
                'needs its tokens: {"input_ids": [...]}.'
            )
        if "custom_generate" in given:
            raise ValueError(
                "custom_generate was given with a prompt, but all rows of a batch are drafted for in one way. Give it "
                "to generate_many()."
            )
        ids, mask, seed = _tokens(given["input_ids"]), given.get("attention_mask"), given.get("seed")
        if mask is not None:
            keep = torch.as_tensor(mask).flatten().bool().tolist()
            if len(keep) != len(ids):
                raise ValueError(f"A prompt of {len(ids)} tokens was given an attention_mask of {len(keep)}.")
            ids = [token for token, is_kept in zip(ids, keep, strict=True) if is_kept]
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise ValueError(f"seed={seed!r} was given with a prompt, but a whole number is needed.")
        settings = {name: value for name, value in given.items() if name not in _OF_PROMPTS}
        return cls(index, given, _checked(ids), seed, settings)


def _tokens(given: Any) -> list[int]:
    try:
        ids = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _not_tokens(given) from error
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise _not_tokens(given if ids.numel() else None)
    return _checked(ids.tolist())


def _checked(ids: list[int]) -> list[int]:
    if not ids:
        raise _not_tokens(None)
    return ids


def _not_tokens(given: Any) -> ValueError:
    match given:
        case None:
            found = "without any token"
        case Tensor():
            found = f"as a tensor {tuple(given.shape)} of {str(given.dtype).removeprefix('torch.')}"
        case _:
            found = f"as a {type(given).__name__}"
    return ValueError(
        f"A prompt was given {found}, but it is a list of token ids, or a tensor (num_tokens,) of them, such as "
        "tokenizer(text).input_ids."
    )
