"""Whether the rows of a prompt can be computed packed: one after another, without padding.

A decoder over packed rows is told the positions and rows of its tokens, no more. So nothing else may tell rows or
columns apart: no other inputs, no position but the place in a row, nothing that the model around the decoder does, no
hook, no adapter of a row.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as torch_module
from transformers import Cache, PreTrainedModel

from hf_paged._transformers import CACHE, decoder_of, mixes_tokens, recurrent_layer
from hf_paged.attention.mask import NAME
from hf_paged.errors import NotPackable

# Whose hooks look at no rows and columns: they move weights, or note outputs.
_TRUSTED = ("accelerate.", "hf_paged.", "torch.", "transformers.")

_SETTINGS = {"use_cache", "logits_to_keep", "return_dict"}


class _Rows(Cache):
    """Rows whose number and lengths are looked at, while no pass over them is under way.

    Args:
        layers: of the cache.
        num_columns: that it is to be taken to hold.
    """

    is_compileable = False

    def __init__(self, layers: list[Any], num_columns: int) -> None:
        super().__init__(layers=layers)
        self._num_columns = num_columns

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that are cached."""
        return self._num_columns


def check_model(model: PreTrainedModel, *, packs: bool = True) -> torch.nn.Module:
    """Return the decoder of a model whose prompts are what its decoder makes of ids, positions and causality.

    Args:
        model: that generates.
        packs: whether one row is to follow another.

    Raises:
        NotPackable: if anything else may take part.
    """
    attention = model.config.get_text_config(decoder=True)._attn_implementation
    if attention != NAME:
        raise NotPackable(f"attn_implementation={attention!r} can't tell packed rows apart, as {NAME!r} can")
    layer = recurrent_layer(model.config)
    if packs and layer is not None:
        raise NotPackable(f"{layer}, and what it makes of one row would go on in the next")
    if mixes_tokens(model):
        raise NotPackable("its quantised layers round a token by what else is in a pass")
    decoder = decoder_of(model)
    if decoder is not model.base_model:
        raise NotPackable(f"its {type(decoder).__name__} is within a {type(model.base_model).__name__}")
    for part in (model, decoder):
        if "position_ids" not in inspect.signature(type(part).forward).parameters:
            raise NotPackable(f"{type(part).__name__} takes no position_ids")
    if type(model).forward.__module__ != type(decoder).forward.__module__:
        raise NotPackable(f"its forward is that of {type(model).forward.__module__}")
    if packs and hasattr(model, "create_masks_for_generate"):  # else the decoder makes those of a row
        raise NotPackable("it makes masks of its own")
    for hook in (*torch_module._global_forward_pre_hooks.values(), *torch_module._global_forward_hooks.values()):
        _check_hook("all modules", hook)
    for name, module in model.named_modules():
        _check_module(name or type(module).__name__, module)
    return decoder


def check_prompt(
    model: PreTrainedModel,
    layers: list[Any],
    input_ids: Tensor,
    inputs: dict[str, Any],
    num_cached: int,
) -> None:
    """Look whether `generate()` is about to give a model no more than ids, their places as positions, and padding.

    Args:
        model: that generates.
        layers: of the cache.
        input_ids: `(num_rows, num_columns)`, those that are cached included.
        inputs: as it prepared them.
        num_cached: columns that are cached.

    Raises:
        NotPackable: if there is anything else.
    """
    # Now, and when `generate()` goes on from the last column.
    for begin in (num_cached, input_ids.shape[1] - 1):
        _check_step(model, _Rows(layers, begin), input_ids, inputs, begin)


def _check_step(model: PreTrainedModel, rows: _Rows, input_ids: Tensor, inputs: dict[str, Any], begin: int) -> None:
    mask, new = inputs.get("attention_mask"), input_ids[:, begin:]
    given: dict[str, Any] = model.prepare_inputs_for_generation(  # type: ignore[operator]
        input_ids, next_sequence_length=new.shape[1], is_first_iteration=True, **(inputs | {CACHE: rows})
    )
    given = {
        name: value for name, value in given.items() if not (value is None or value is False or name in _SETTINGS)
    }
    if given.pop(CACHE, None) is not rows:
        raise NotPackable("it sets the cache aside")
    if not _is_same(given.pop("input_ids", None), new):
        raise NotPackable("it is given other ids than those of the prompt")
    if not _is_same(given.pop("attention_mask", mask), mask):
        raise NotPackable("it makes an attention_mask of its own")
    positions: Tensor | None = given.pop("position_ids", None)
    if given:
        raise NotPackable(f"it is given {', '.join(sorted(given))}")
    if mask is None:
        places = torch.arange(begin, input_ids.shape[1], device=new.device)[None]
        is_token = torch.ones_like(places, dtype=torch.bool)
    else:
        is_token = mask[:, begin:].bool()
        places = mask.long().cumsum(1)[:, begin:] - 1
    if positions is None or positions.ndim != 2 or bool(((positions != places) & is_token).any()):
        raise NotPackable("its positions are not the places of the tokens in their rows")


def _check_module(name: str, module: torch.nn.Module) -> None:
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        _check_hook(name, hook)
    offload = getattr(module, "_hf_hook", None)
    for part in getattr(offload, "hooks", (offload,)):
        if part is not None:
            _check_hook(name, part)
    if "forward" in vars(module) and offload is None:
        raise NotPackable(f"the forward of {name} was replaced")
    kind = type(module).__module__
    if kind.startswith("peft.tuners.") and not kind.startswith("peft.tuners.lora."):
        raise NotPackable(f"{name} is an adapter of another kind than LoRA")


def _check_hook(name: str, hook: Any) -> None:
    while hasattr(hook, "func"):
        hook = hook.func  # of a partial
    origin = getattr(hook, "__module__", None) or type(hook).__module__
    if not f"{origin}.".startswith(_TRUSTED):
        raise NotPackable(f"a hook of {origin} is on {name}")


def _is_same(given: Tensor | None, expected: Tensor | None) -> bool:
    if given is None or expected is None:
        return given is expected
    return isinstance(given, Tensor) and torch.equal(given, expected)
