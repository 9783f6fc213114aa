"""Other ways to decode, and all of them by name."""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Cache, ContinuousBatchingConfig, GenerationConfig, PreTrainedModel, StaticCache
from typing_extensions import override

from hf_paged._torch.dynamo import with_own_code
from hf_paged._torch.graphs import frozen_weights
from hf_paged._transformers import CACHE
from hf_paged.attention.mask import NAME
from hf_paged.cache.paged import PagedCache
from hf_paged.compile.api import compiled
from hf_paged.compile.weights import gather_weights
from hf_paged.tools.lab.baseline import Baseline, WholeRun


class WithoutCudnn(Baseline):
    """The same as the reference, but without cuDNN's attention, which torch prefers on some GPUs."""

    name = "dynamic-no-cudnn"

    @override
    def flags(self) -> AbstractContextManager[Any]:
        others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        flags: AbstractContextManager[Any] = sdpa_kernel(others)
        return flags


class Static(Baseline):
    """StaticCache of just the columns that are used, and `sdpa`."""

    name = "static"

    @override
    def new_cache(self, max_length: int) -> Cache | None:
        return StaticCache(config=self.model.config, max_cache_len=max_length)


class StaticCompiled(Static):
    """StaticCache, decoding compiled, the prompt not: as `generate()` does it."""

    name = "static-compiled"

    @override
    def open(self) -> None:
        super().open()
        self._lanes: dict[int, tuple[StaticCache, Any]] = {}

    @override
    def new_cache(self, max_length: int) -> Cache | None:
        # A frozen graph holds the tensors of the cache that it was compiled with, and reads no other. What a graph
        # costs to compile is not in the time of a step.
        if max_length not in self._lanes:
            cache = StaticCache(config=self.model.config, max_cache_len=max_length)
            self._lanes[max_length] = cache, self._compile()
        cache, self._compiled = self._lanes[max_length]
        cache.reset()  # type: ignore[no-untyped-call]
        return cache

    def _compile(self) -> Any:
        mode = "reduce-overhead" if self._is_on_gpu else None  # with CUDA graphs, as generate() does
        # Code of its own: dynamo runs a code uncompiled, without a word, once it has eight graphs.
        return torch.compile(with_own_code(_forward), mode=mode, dynamic=False)

    @property
    def _is_on_gpu(self) -> bool:
        return bool(self.model.device.type == "cuda")

    @override
    def flags(self) -> AbstractContextManager[Any]:
        return super().flags() if self._is_on_gpu else frozen_weights()

    @override
    def close(self) -> None:
        super().close()
        self._lanes = {}

    @override
    def compute(self, ids: Tensor, past: int, **arguments: Any) -> Tensor:
        if ids.shape[1] > 1:
            return super().compute(ids, past, **arguments)
        logits: Tensor = self._compiled(self.model, input_ids=ids, **{CACHE: self.cache}, use_cache=True, **arguments)
        return logits


def _forward(model: Any, **inputs: Any) -> Any:
    return model(**inputs).logits


class Flex(Baseline):
    """DynamicCache and the `flex_attention` that comes with Transformers."""

    name = "flex"
    attention = "flex_attention"


class NoCache(Baseline):
    """All tokens computed again for every new one."""

    name = "no-cache"

    @override
    def new_cache(self, max_length: int) -> Cache | None:
        return None

    @override
    def begin(self, max_length: int, mask: Tensor | None = None) -> None:
        super().begin(max_length, mask)
        self._ids: Tensor | None = None

    @override
    def compute(self, ids: Tensor, past: int, **arguments: Any) -> Tensor:
        self._ids = ids if self._ids is None else torch.cat([self._ids, ids], dim=1)
        logits: Tensor = self.model(
            input_ids=self._ids, use_cache=False, logits_to_keep=1, **self.padding(first=0)
        ).logits
        return logits


class Paged(Baseline):
    """PagedCache and `paged_flex`; prompts are computed with their padding."""

    name = "paged"
    attention = NAME

    @override
    def new_cache(self, max_length: int) -> Cache | None:
        return PagedCache.from_model(self.model, page_size=self.page_size)


class PagedRagged(Paged):
    """The same, but prompts with padding are packed without it by `PagedCache.prefill`."""

    name = "paged-ragged"
    packs_prompts = True

    @override
    def compute(self, ids: Tensor, past: int, **arguments: Any) -> Tensor:
        if past == 0 and ids.shape[1] > 1 and arguments:
            cache: Any = self.cache
            cache.prefill(self.model, ids, attention_mask=arguments["attention_mask"])
            past, ids = ids.shape[1] - 1, ids[:, -1:]
            arguments["position_ids"] = arguments["position_ids"][:, -1:]
        return self.decode(ids, past, **arguments)

    def decode(self, ids: Tensor, past: int, **arguments: Any) -> Tensor:
        """Run what is not prefilled packed, as `compute`."""
        return super().compute(ids, past, **arguments)


class PagedCompiled(PagedRagged):
    """The same, compiled by `hf_paged.compiled`."""

    name = "paged-compiled"

    @override
    def open(self) -> None:
        super().open()
        gather_weights(self.model)
        self._opened.enter_context(compiled(self.model))

    @override
    def decode(self, ids: Tensor, past: int, **arguments: Any) -> Tensor:
        if ids.shape[1] > 1:
            return super().decode(ids, past, **arguments)
        # As generate() does it: the mask is made outside of the graph.
        positions = arguments.pop("position_ids", torch.tensor([[past]], device=ids.device)).contiguous()
        model: Any = self.model
        inputs = model.prepare_inputs_for_generation(
            ids, **{CACHE: self.cache}, use_cache=True, position_ids=positions, **arguments
        )
        logits: Tensor = model.get_compiled_call(model.generation_config.compile_config)(**inputs).logits
        return logits


class GenerateBatch(WholeRun):
    """Transformers' continuous batching, with the best attention that it finds, on a GPU with CUDA graphs.

    The k-th token of a batch is there when every row has its k-th token.
    """

    name = "generate_batch"

    @override
    def new_cache(self, max_length: int) -> Cache | None:
        return None

    @override
    def run(self, ids: Tensor, num_new_tokens: int, chunk_size: int | None) -> list[tuple[list[int], float]]:
        if self.tokens:
            raise ValueError("generate_batch keeps nothing of the last turn, so it can't be given more of a prompt.")
        keep = torch.ones_like(ids) if self._mask is None else self._mask[:, : ids.shape[1]]
        rows = [row[kept.bool()].tolist() for row, kept in zip(ids, keep, strict=True)]
        page_size = ContinuousBatchingConfig().page_size
        # No token is the end: every row is to have all of its tokens.
        greedy = GenerationConfig(do_sample=False, max_new_tokens=num_new_tokens, eos_token_id=-1)  # type: ignore[no-untyped-call]
        model: Any = self.model
        start = time.perf_counter()
        outputs = model.generate_batch(
            rows,
            generation_config=greedy,
            # Left to itself it takes nine tenths of the memory.
            continuous_batching_config=ContinuousBatchingConfig(
                num_blocks=sum(-(-(len(row) + num_new_tokens) // page_size) for row in rows) + len(rows),
                max_batch_tokens=4096 if ids.is_cuda else 512,
                use_cuda_graph=ids.is_cuda,
            ),
            record_timestamps=True,
        )
        if len(outputs) != len(rows) or any(output.error is not None for output in outputs.values()):
            raise RuntimeError(f"generate_batch failed: {[output.error for output in outputs.values()]}")
        times = [max(moments) for moments in zip(*(output.timestamps for output in outputs.values()), strict=True)]
        tokens = [list(step) for step in zip(*(output.generated_tokens for output in outputs.values()), strict=True)]
        seconds = [after - before for before, after in zip([start, *times], times, strict=False)]
        return list(zip(tokens, seconds, strict=True))


_KINDS: tuple[type[Baseline], ...] = (
    Baseline,
    WithoutCudnn,
    Static,
    StaticCompiled,
    Flex,
    GenerateBatch,
    NoCache,
    Paged,
    PagedRagged,
    PagedCompiled,
)

BASELINES = {kind.name: kind for kind in _KINDS}
"""By name."""

CACHES = {kind.name: kind for kind in (Baseline, Paged, Static)}
"""Those that differ by the cache and the attention that reads it alone, so that `generate()` can be given it."""


@contextmanager
def line_up(
    model: PreTrainedModel, names: Sequence[str], page_size: int, among: dict[str, type[Baseline]] = BASELINES
) -> Iterator[list[Baseline]]:
    """Make baselines for one model.

    Raises:
        ValueError: for a name that is none of those among which is chosen.
    """
    unknown = [name for name in names if name not in among]
    if unknown:
        raise ValueError(f"caches={unknown} were asked for; there are {', '.join(among)}.")
    baselines = [among[name](model, page_size) for name in names]
    try:
        yield baselines
    finally:
        for baseline in baselines:
            baseline.close()
