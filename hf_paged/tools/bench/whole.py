"""Baselines that decode with `generate()` itself, so that its own part of a step counts, and that of another loop."""

import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer
from typing_extensions import override

import hf_paged
from hf_paged._transformers import CACHE
from hf_paged.tools.lab import baselines as lab
from hf_paged.tools.lab.baseline import Baseline, WholeRun, synchronize

_NUM_NAMED = 12


class Generated(WholeRun):
    """Stands before another baseline, whose cache, attention and compilation `generate()` uses.

    A token is there when a streamer is given it.
    """

    _ids: Tensor  # of all columns so far
    loop: Callable[..., Any] | None = None
    """For `custom_generate`; None: Transformers' own loop."""

    @override
    def open(self) -> None:
        # Without a token that is the end.
        self.model.generation_config = GenerationConfig(pad_token_id=0, do_sample=False)  # type: ignore[no-untyped-call]
        super().open()

    @override
    def run(self, ids: Tensor, num_new_tokens: int, chunk_size: int | None) -> list[tuple[list[int], float]]:
        if self.tokens:
            ids = torch.cat([self._ids, ids], dim=1)
        mask = torch.ones_like(ids) if self._mask is None else self._mask[:, : ids.shape[1]]
        model: Any = self.model
        cache: Any = self.cache
        clock = _Clock()
        with torch.no_grad(), self.flags():
            synchronize(ids.device)
            start = time.perf_counter()
            if self.packs_prompts and not self.tokens and self._mask is not None:
                cache.prefill(model, ids, mask)
            self._ids = model.generate(
                ids,
                attention_mask=mask,
                **{CACHE: cache},
                max_new_tokens=num_new_tokens,
                prefill_chunk_size=chunk_size,
                streamer=clock,
                custom_generate=self.loop,
                # On a GPU generate() would compile what it is given a PagedCache for by itself.
                disable_compile=not isinstance(self, lab.PagedCompiled | lab.StaticCompiled),
            )
        times = [start, *clock.times[1:]]  # the first is that of the prompt, which is handed on, too
        seconds = [after - before for before, after in pairwise(times)]
        return list(zip(self._ids[:, ids.shape[1] :].T.tolist(), seconds, strict=True))

    def profile(self, num_tokens: int) -> dict[str, Any]:
        """Decode so many tokens more, and return what `of_kernels` says of them."""
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            self.feed(self._ids[:, :0], num_tokens)
        return of_kernels(profiler.events(), num_tokens)


def of_kernels(events: Iterable[Any], num_steps: int) -> dict[str, Any]:
    """Say what ran on a GPU under a profiler.

    Returns:
        `kernels`, milliseconds of a step by name, of those that take longest; `kernel_ms` of all; `busy_share` of the
        second half of the time, when whatever runs ahead does so. Nothing without a GPU.
    """
    own = [event for event in events if event.device_type.name == "CUDA" and not event.is_user_annotation]
    runs = sorted((event.time_range.start, event.time_range.end, event.name) for event in own)
    if not runs:
        return {}
    last = max(end for _, end, _ in runs)
    middle = reached = (runs[0][0] + last) / 2
    busy, spent = 0.0, dict.fromkeys((name for _, _, name in runs), 0.0)
    for start, end, name in runs:
        spent[name] += (end - start) / 1e3 / num_steps
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    longest = dict(sorted(spent.items(), key=itemgetter(1), reverse=True)[:_NUM_NAMED])
    return {"kernel_ms": sum(spent.values()), "busy_share": busy / (last - middle), "kernels": longest}


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


_KINDS = (Baseline, lab.WithoutCudnn, lab.StaticCompiled, lab.Paged, lab.PagedRagged, lab.PagedCompiled)

WHOLE = {lab.GenerateBatch.name: lab.GenerateBatch} | {kind.name: _driven(kind) for kind in _KINDS}
"""By name; `static-compiled` as `generate()` compiles it, which it does on a GPU."""

for name, kind in (("paged-loop", lab.PagedRagged), ("paged-compiled-loop", lab.PagedCompiled)):
    WHOLE[name] = _driven(kind, name=name, loop=staticmethod(hf_paged.sample))
