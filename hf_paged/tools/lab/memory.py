"""Bytes: of a cache, of the process, of a model's weights."""

import gc
import re
import resource
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from transformers import Cache, PreTrainedModel

from hf_paged._transformers import token_bytes_by_device
from hf_paged.cache.paged import PagedCache


def kv_bytes(cache: Cache | None) -> int:
    """Bytes of keys and values that a cache holds: its pages, or its tensors; 0 without a cache."""
    if cache is None:
        return 0
    if isinstance(cache, PagedCache):
        return cache.stats().active_bytes
    tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def token_bytes(model: PreTrainedModel) -> int:
    """Keys and values of one token in all layers, bytes; the model computes one."""
    return sum(token_bytes_by_device(model).values())


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
        self._device = device
        gc.collect()
        self._before = self._held()
        self.forget_peak()

    def forget_peak(self) -> None:
        """Let the peak begin anew, at what is held now."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    @property
    def held_bytes(self) -> int:
        """Bytes held now, less those at the beginning."""
        return self._held() - self._before

    @property
    def bytes(self) -> int:
        """Bytes at the peak, less those at the beginning."""
        is_cuda = self._device.type == "cuda"
        return (torch.cuda.max_memory_allocated(self._device) if is_cuda else _peak_rss()) - self._before

    def _held(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        held: int = psutil.Process().memory_info().rss
        return held


def _peak_rss() -> int:
    """What Linux calls VmHWM: `ru_maxrss` would begin with what the process had before it became this program."""
    with suppress(OSError):
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
        if found:
            return 1024 * int(found[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
