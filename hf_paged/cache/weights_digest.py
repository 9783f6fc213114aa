"""What a model computes keys and values by, told by its content: the same in all processes that have loaded it."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor

from hf_paged.cache.prompt.fingerprint import OF_ADAPTERS, PLAIN, fingerprint, plain_tensors
from hf_paged.pages.tiers.checked_file import digest_of

_WRAPPERS = ("_orig_mod.", "base_model.model.")  # of torch.compile and PEFT, in the names of weights and modules
# What a configuration says beside what keys and values are computed by.
_OF_OTHER_THINGS = {
    "_model_name_or_path",
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "unk_token_id",
    "use_cache",
}
# What modules say that changes while a model is used.
_OF_USE = {"gradient_checkpointing", "loss_type", "max_seq_len_cached", "name_or_path", "training"}
_weights_digests: WeakKeyDictionary[torch.nn.Module, tuple[bytes, str]] = WeakKeyDictionary()


@dataclass(frozen=True)
class ModelDigest:
    """What a model computes keys and values by, most of it as hexadecimal digits of sha256.

    Attributes:
        weights: weights, persistent buffers and the frequencies of rotary embeddings, with names, shapes and dtypes.
        configuration: of the model.
        settings: classes of its modules, and the numbers, flags and names in them.
        adapters: which are active, and how they are scaled.
        version_of_transformers: which has the code.
    """

    weights: str
    configuration: str
    settings: str
    adapters: str
    version_of_transformers: str

    @property
    def whole(self) -> bytes:
        """All in one, 32 bytes."""
        return hashlib.sha256("".join(astuple(self)).encode()).digest()

    def differences(self, other: "ModelDigest") -> list[str]:
        """What differs, in words."""
        names = [field.name for field in fields(self)]
        return [name.replace("_", " ") for name in names if getattr(self, name) != getattr(other, name)]


def model_digest(model: Any) -> ModelDigest:
    """Tell models apart by all that they compute keys and values by.

    All weights are read, at about a gigabyte per second and thread; not again unless `fingerprint` notices a change.

    Args:
        model: a model of Transformers, or a PEFT model of one, which is what its base model is without.

    Raises:
        ValueError: if some weights are not in memory.
    """
    mark = fingerprint(model)
    known = _weights_digests.get(model)
    if known is None or known[0] != mark:
        known = _weights_digests[model] = mark, _weights(model)
    configuration = _digest(_kept(model.config.to_dict()))
    settings, adapters = _digest(_settings(model)), _digest(_adapters(model))
    return ModelDigest(known[1], configuration, settings, adapters, transformers.__version__)


def _weights(model: torch.nn.Module) -> str:
    tensors: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    seen = set()
    for name, value in [*model.state_dict(keep_vars=True).items(), *_frequencies(model)]:
        if not isinstance(value, Tensor):
            others[_unwrapped(name)] = value
            continue
        for index, tensor in enumerate(plain_tensors(value)):
            if tensor.is_meta:
                raise ValueError(
                    f"{name} of this {type(model).__name__} is not in memory (device 'meta'), so it can't be told "
                    "what the model computes. Load the model without offloading its weights."
                )
            place = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
            if place not in seen:  # tied weights are read once
                seen.add(place)
                tensors[f"{_unwrapped(name)}/{index}"] = tensor
    return hashlib.sha256(digest_of(tensors) + _digest(others).encode()).hexdigest()


def _frequencies(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The frequencies of rotary embeddings, which no checkpoint has; not those that depend on the longest row yet."""
    for prefix, module in model.named_modules():
        changes = any(kind in str(getattr(module, "rope_type", "")) for kind in ("dynamic", "longrope"))
        for name, buffer in module.named_buffers(recurse=False):
            is_original = name.endswith("original_inv_freq")
            if is_original or (name.endswith("inv_freq") and not changes):
                yield f"{prefix}.{name}", buffer


def _settings(model: torch.nn.Module) -> list[Any]:
    found = []
    for name, module in model.named_modules():
        if not type(module).__module__.startswith("peft."):
            said = {key: value for key, value in vars(module).items() if type(value) in PLAIN and key not in _OF_USE}
            public = sorted((key, repr(value)) for key, value in said.items() if not key.startswith("_"))
            found.append((_unwrapped(name), type(module).__qualname__, public))
    return sorted(found)


def _adapters(model: torch.nn.Module) -> list[Any]:
    found = []
    for name, module in model.named_modules():
        if type(module).__module__.startswith("peft."):
            held = {key: value for key in OF_ADAPTERS if (value := vars(module).get(key)) is not None}
            if held:
                found.append((_unwrapped(name), held))
    return found


def _kept(configuration: Any) -> Any:
    if isinstance(configuration, dict):
        return {str(key): _kept(value) for key, value in configuration.items() if key not in _OF_OTHER_THINGS}
    return configuration


def _unwrapped(name: str) -> str:
    name += "."
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name.strip(".")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=repr).encode()).hexdigest()
