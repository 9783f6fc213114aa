"""What a model is given in each decoding step."""

from typing import Any

from torch import Tensor

from hf_paged._transformers import CACHE, keeps_to
from hf_paged.attention.mask import PagedMask, next_mask, ragged_mask
from hf_paged.batch.sequences import Sequences
from hf_paged.batch.steps.ragged import RaggedStep

_PREPARED = {"input_ids", "attention_mask", "position_ids"}
_HANDED_ON = {CACHE, "use_cache", "logits_to_keep", "output_attentions", "output_hidden_states"}


class StepInputs:
    """The inputs of decoding steps, each made of those of the step before.

    Transformers looks at the model, its parameters and its configuration to prepare them. Nothing has changed there:
    new are the token, its position, and the pages that it sees.

    Args:
        sequences: the rows of the cache.
        prepared: what Transformers has prepared for the step before.
    """

    def __init__(self, sequences: Sequences, prepared: dict[str, Any]) -> None:
        self._sequences = sequences
        self._inputs = self._next = prepared

    def advance(self) -> None:
        """Go on from the inputs that `next` has returned, as their step was made and is wanted."""
        self._inputs = self._next

    @property
    def position_ids(self) -> Tensor | None:
        """`(..., num_rows, 1)` of the step before; None for a model that is given none."""
        return self._inputs.get("position_ids")

    def next(self, token: Tensor, attention_mask: Tensor | None) -> dict[str, Any] | None:
        """Reserve the next step and return its inputs; None if more is needed for them than is known here.

        It may be called again if that step fails.

        Args:
            token: `(num_rows, 1)`.
            attention_mask: `(num_rows, num_columns)`, 0 for padding; None without padding.

        Raises:
            OutOfPagesError: if the step does not fit into the pool.
        """
        self._sequences.begin_pass(0, 1)
        masks = self._inputs["attention_mask"]
        by_kind = masks if isinstance(masks, dict) else {None: masks}
        following = {kind: next_mask(mask, attention_mask) for kind, mask in by_kind.items()}
        if any(mask is None for mask in following.values()):
            return None
        self._next = self._inputs | {
            "input_ids": token,
            "attention_mask": following if isinstance(masks, dict) else following[None],
        }
        if self.position_ids is not None:
            self._next["position_ids"] = self.position_ids + 1
        return self._next

    def ragged(self, step: RaggedStep, tokens: Tensor, offsets: Tensor) -> dict[str, Any] | None:
        """Return the inputs of a pass in which each row goes on from a column of its own; None as for `next`.

        Args:
            step: of the pass, which is under way.
            tokens: `(num_rows, num_new)`.
            offsets: `(num_rows, num_new)` how many positions behind that of the step before.
        """
        masks = self._inputs["attention_mask"]
        by_kind = masks if isinstance(masks, dict) else {None: masks}
        following = {kind: ragged_mask(mask, step) for kind, mask in by_kind.items()}
        if self.position_ids is None or any(mask is None for mask in following.values()):
            return None
        inputs = self._inputs | {
            "input_ids": tokens,
            "attention_mask": following if isinstance(masks, dict) else following[None],
            "position_ids": self.position_ids + offsets,
        }
        return inputs | {"logits_to_keep": 0} if "logits_to_keep" in inputs else inputs


def inputs_after(
    model: Any, sequences: Sequences, given: dict[str, Any], prepared: dict[str, Any], token: Tensor
) -> StepInputs | None:
    """Go on from a step; None for a model that prepares its inputs in another way, or of more than is known here.

    Args:
        model: prepares them.
        sequences: the rows of its cache.
        given: what it has prepared them of, beside the ids.
        prepared: the result.
        token: `(num_rows, 1)` of that step.
    """
    is_own = not keeps_to(model, "prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
    if is_own or hasattr(model, "create_masks_for_generate") or model.config.is_encoder_decoder:
        return None
    masks = prepared.get("attention_mask")
    if not all(isinstance(mask, PagedMask) for mask in (masks.values() if isinstance(masks, dict) else [masks])):
        return None
    for name in prepared.keys() - _PREPARED:
        if prepared[name] is not given.get(name) or not (name in _HANDED_ON or prepared[name] is None):
            return None
    # Once, since a later version of Transformers may prepare them in another way.
    positions = given.get("position_ids")
    found = (prepared.get("input_ids"), prepared.get("position_ids"))
    expected = (token, None if positions is None else positions[..., -1:])
    return StepInputs(sequences, prepared) if all(map(_are_same, found, expected)) else None


def _are_same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and bool((one == other).all())
