"""Bytes: of a cache, of the process, of a model's weights."""

import gc
import resource
import sys
from pathlib import Path

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from hf_paged._transformers import CACHE
from hf_paged.cache.paged import PagedCache

_STATUS = Path("/proc/self/status")


def kv_bytes(cache: Cache | None) -> int:
    """Bytes of keys and values that a cache holds: its pages, or its tensors; 0 without a cache."""
    if cache is None:
        return 0
    if isinstance(cache, PagedCache):
        return cache.stats().active_bytes
    tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@torch.no_grad()
def token_bytes(model: PreTrainedModel) -> int:
    """Keys and values of one token in all layers, bytes."""
    cache = DynamicCache(config=model.config)
    model(torch.zeros((1, 1), dtype=torch.long, device=model.device), **{CACHE: cache})
    return kv_bytes(cache)


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that a decoding step reads.

    Every weight counts once, a head that is tied to the embedding too; of an embedding that is not tied a step reads
    one row only, which counts as nothing.
    """
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    is_tied = head is not None and head.weight is embedding
    return sum(weight.nbytes for weight in model.parameters() if is_tied or weight is not embedding)


class PeakMemory:
    """The most memory that is held beyond what is held now.

    On CUDA that is what torch allocates; elsewhere the resident set of the process. Where the system has no
    high-water mark that can be set back, the peak is that since the start of the process.

    Args:
        device: where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        gc.collect()
        self._device = device
        self._before = torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS") or _max_rss()
        self.forget_peak()

    def forget_peak(self) -> None:
        """Let the peak begin anew, at what is held now."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            _reset_high_water_mark()

    @property
    def held_bytes(self) -> int | None:
        """Bytes held now, less those at the beginning; None where the system tells the peak only."""
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device) - self._before
        held = _status("VmRSS")
        return None if held is None else held - self._before

    @property
    def bytes(self) -> int:
        """Bytes at the peak, less those at the beginning."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return (_status("VmHWM") or _max_rss()) - self._before


def _reset_high_water_mark() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def _status(field: str) -> int | None:
    """A field of the process's status, bytes; None where the system doesn't tell."""
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def _max_rss() -> int:
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024
