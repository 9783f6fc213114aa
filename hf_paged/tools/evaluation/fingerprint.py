"""What determines the figures of an evaluation."""

import hashlib
import json
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_paged.tools.evaluation.windows import Window

Fingerprint = dict[str, Any]

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_IRRELEVANT = ("_name_or_path", "_attn_implementation", "transformers_version")


def fingerprint(model: PreTrainedModel, windows: Iterable[Window], **settings: Any) -> Fingerprint:
    """Sum up what determines the figures, by its name: model, texts, settings, versions.

    Args:
        model: its configuration, every bit of its weights, their dtype and device count. The number of threads counts
            on a CPU, where sums are rounded accordingly.
        windows: their tokens count.
        **settings: anything that JSON has.
    """
    device = model.device.type
    return {
        "config": _hash([json.dumps(_config(model), sort_keys=True, default=str)]),
        "weights": _hash(
            f"{name} {list(tensor.shape)} {_bits(tensor)}" for name, tensor in model.state_dict().items()
        ),
        "texts": _hash(f"{window.text} {window.first_scored} {list(window.token_ids)}" for window in windows),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device,
        "num_threads": torch.get_num_threads() if device == "cpu" else None,
        **settings,
        "versions": {name: version(name) for name in ("hf-paged", "transformers", "torch")},
    }


def _config(model: PreTrainedModel) -> dict[str, Any]:
    return {name: value for name, value in model.config.to_dict().items() if name not in _IRRELEVANT}


def _bits(tensor: Tensor) -> int:
    """The sum of a tensor's numbers read as integers: exact, hence the same in any order and on any device."""
    integers = tensor.view(_INTEGERS[tensor.element_size()]) if tensor.dtype != torch.bool else tensor
    return int(integers.sum(dtype=torch.int64))


def _hash(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode())
        digest.update(b"\n")
    return digest.hexdigest()[:16]
