"""The plain way to decode, which every other one is compared with and derived from."""

import copy
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from typing_extensions import override

from hf_paged._transformers import CACHE
from hf_paged.cache.paged import PagedCache
from hf_paged.tools.lab.memory import PeakMemory, kv_bytes


def sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model, its configuration included, but none of its weights and buffers."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


class Baseline:
    """DynamicCache and `sdpa`; a model object of its own over weights that all baselines share.

    Args:
        model: shared with the other baselines; is not changed.
        page_size: tokens per page, where there are pages.
    """

    name = "dynamic"
    attention = "sdpa"
    packs_prompts = False  # those with padding, by `PagedCache.prefill`

    def __init__(self, model: PreTrainedModel, page_size: int) -> None:
        self.model = sharing_weights(model)
        self.page_size = page_size
        self.cache: Cache | None = None
        # Not tensors: C's allocator would put each behind the logits that it was chosen from, and when those are gone,
        # the hole before it would be too small for the next ones, so that every step would take new memory.
        self.tokens: list[list[int]] = []
        """Greedy tokens since `begin`, one for each row."""
        self.figures: dict[str, Any] = {}  # what `feed` has measured beside its time
        self._opened = ExitStack()
        self._is_prepared = False
        self._mask: Tensor | None = None  # of all columns that will be
        self._num_columns = 0

    def prepare(self) -> None:
        """Do once what must be done before the model runs."""
        if not self._is_prepared:
            self.open()
            self._is_prepared = True

    def open(self) -> None:
        """What `prepare` does; `_opened` undoes it."""
        self.model.set_attn_implementation(self.attention)

    def close(self) -> None:
        """Undo `prepare`, and drop the cache."""
        self.cache = None
        self._opened.close()

    def new_cache(self, max_length: int) -> Cache | None:
        """Make an empty cache for up to `max_length` columns."""
        return DynamicCache(config=self.model.config)

    def flags(self) -> AbstractContextManager[Any]:
        """What surrounds every forward pass, outside of the time that is taken."""
        return nullcontext()

    def begin(self, max_length: int, mask: Tensor | None = None) -> None:
        """Begin with an empty cache for up to `max_length` columns; the mask of the prompts has 0 for padding."""
        self.prepare()
        self.cache = self.new_cache(max_length)
        self.tokens = []
        self._num_columns = 0
        self._mask = None
        if mask is not None:
            missing = max_length - mask.shape[1]
            self._mask = torch.cat([mask, mask.new_ones(len(mask), missing)], dim=1)

    def feed(self, ids: Tensor, num_new_tokens: int, chunk_size: int | None = None) -> float:
        """Run prompts, or more of them, up to the token that follows; return the seconds it took.

        Args:
            ids: `(num_rows, num_columns)`, what comes after the tokens so far.
            num_new_tokens: tokens that are going to be asked for, that one included.
            chunk_size: columns that are run at a time; None: all.
        """
        if self.tokens:
            ids = torch.cat([self._last_column(), ids], dim=1)
        seconds = 0.0
        for chunk in torch.split(ids, chunk_size or ids.shape[1], dim=1):
            tokens, elapsed = self._forward(chunk)
            seconds += elapsed
        self.tokens.append(tokens)
        return seconds

    def step(self) -> float:
        """Decode one token of each row; return the seconds it took."""
        tokens, seconds = self._forward(self._last_column())
        self.tokens.append(tokens)
        return seconds

    def compute(self, ids: Tensor, past: int, **arguments: Any) -> Tensor:
        """Run a forward pass over `past` columns; return the logits of the last one, `(num_rows, 1, vocab_size)`."""
        logits: Tensor = self.model(
            input_ids=ids, **{CACHE: self.cache}, use_cache=True, logits_to_keep=1, **arguments
        ).logits
        return logits

    def padding(self, first: int) -> dict[str, Tensor]:
        """Mask of all columns so far, and positions of those from `first` on; nothing without padding."""
        if self._mask is None:
            return {}
        mask = self._mask[:, : self._num_columns]
        return {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, first:]}

    def _last_column(self) -> Tensor:
        return torch.tensor(self.tokens[-1], device=self.model.device)[:, None]

    def _forward(self, ids: Tensor) -> tuple[list[int], float]:
        past = self._num_columns
        self._num_columns += ids.shape[1]
        arguments = self.padding(past)
        with torch.no_grad(), self.flags():
            synchronize(ids.device)
            start = time.perf_counter()
            tokens = self.compute(ids, past, **arguments)[:, -1].argmax(-1)
            synchronize(ids.device)
            seconds = time.perf_counter() - start
            return tokens.tolist(), seconds


class WholeRun(Baseline):
    """What only runs as a whole: `feed` runs everything, and `step` gives the tokens and the times that were noted."""

    def run(self, ids: Tensor, num_new_tokens: int, chunk_size: int | None) -> list[tuple[list[int], float]]:
        """Run everything; arguments are those of `feed`. Return the tokens and the seconds of each step."""
        raise NotImplementedError

    @override
    def feed(self, ids: Tensor, num_new_tokens: int, chunk_size: int | None = None) -> float:
        held, memory = kv_bytes(self.cache), PeakMemory(ids.device)
        self._steps = self.run(ids, num_new_tokens, chunk_size)
        self.figures = {"peak_bytes": held + memory.bytes}
        if isinstance(self.cache, PagedCache):
            self.figures["reserved_bytes"] = self.cache.pool.stats().reserved_bytes
        return self.step()

    @override
    def step(self) -> float:
        tokens, seconds = self._steps.pop(0)
        self.tokens.append(tokens)
        return seconds


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
