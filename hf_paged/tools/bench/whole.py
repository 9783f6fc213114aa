"""Baselines that decode with `generate()` itself, so that its own part of a step counts, and that of another loop."""

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer
from typing_extensions import override

import hf_paged
from hf_paged._transformers import CACHE
from hf_paged.tools.bench.kernels import Kernels
from hf_paged.tools.lab.baseline import Baseline, WholeRun, synchronize
from hf_paged.tools.lab.baselines import (
    GenerateBatch,
    Paged,
    PagedCompiled,
    PagedRagged,
    StaticCompiled,
    WithoutCudnn,
)


class Generated(WholeRun):
    """Stands before another baseline, whose cache, attention and compilation `generate()` uses.

    A token is there when a streamer is given it.
    """

    loop: Callable[..., Any] | None = None
    """For `custom_generate`; None: Transformers' own loop."""

    @override
    def open(self) -> None:
        # Without a token that is the end.
        self.model.generation_config = GenerationConfig(pad_token_id=0, do_sample=False)  # type: ignore[no-untyped-call]
        super().open()

    @override
    def begin(self, max_length: int, mask: Tensor | None = None) -> None:
        super().begin(max_length, mask)
        self._ids = torch.empty(0)  # of all columns so far

    @override
    def run(self, ids: Tensor, num_new_tokens: int, chunk_size: int | None) -> list[tuple[list[int], float]]:
        is_first = not self._ids.numel()
        ids = ids if is_first else torch.cat([self._ids, ids], dim=1)
        mask = torch.ones_like(ids) if self._mask is None else self._mask[:, : ids.shape[1]]
        model: Any = self.model
        cache: Any = self.cache
        clock = _Clock()
        options = {} if self.loop is None else {"custom_generate": self.loop}
        with torch.no_grad(), self.flags():
            synchronize(ids.device)
            start = time.perf_counter()
            if self.packs_prompts and is_first and self._mask is not None:
                cache.prefill(model, ids, mask)
            self._ids = model.generate(
                ids,
                attention_mask=mask,
                **{CACHE: cache},
                max_new_tokens=num_new_tokens,
                prefill_chunk_size=chunk_size,
                streamer=clock,
                **options,
            )
        times = [start, *clock.times[1:]]  # the first is that of the prompt, which is handed on, too
        seconds = [after - before for before, after in pairwise(times)]
        return list(zip(self._ids[:, ids.shape[1] :].T.tolist(), seconds, strict=True))

    def profile(self, num_tokens: int) -> dict[str, Any]:
        """Decode so many tokens more on a GPU, and return what `Kernels` says of them."""
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            self.feed(self._ids[:, :0], num_tokens)
        return Kernels(profiler.events()).figures(num_tokens)


class _Clock(BaseStreamer):
    """Notes when it is given something."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _driven(kind: type[Baseline], **attributes: Any) -> type[Baseline]:
    return type(kind.__name__, (Generated, kind), attributes)


_KINDS = (Baseline, WithoutCudnn, StaticCompiled, Paged, PagedRagged, PagedCompiled)

WHOLE: dict[str, type[Baseline]] = {kind.name: _driven(kind) for kind in _KINDS} | {GenerateBatch.name: GenerateBatch}
"""By name; `static-compiled` as `generate()` compiles it, which it does on a GPU."""

if hasattr(hf_paged, "sample"):
    for name, kind in (("paged-loop", PagedRagged), ("paged-compiled-loop", PagedCompiled)):
        WHOLE[name] = _driven(kind, name=name, loop=staticmethod(hf_paged.sample))
