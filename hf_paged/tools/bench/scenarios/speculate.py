"""Drafts for a batch: answers that repeat their prompt, that repeat nothing, and drafts that are never right."""

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer
from typing_extensions import override

from hf_paged._transformers import CACHE
from hf_paged.attention.mask import NAME
from hf_paged.cache.paged import PagedCache
from hf_paged.compile.api import compiled
from hf_paged.compile.weights import gather_weights
from hf_paged.decoding.sample import sample
from hf_paged.decoding.speculate.assistant import assisted
from hf_paged.decoding.speculate.lookup import prompt_lookup
from hf_paged.tools.bench.scenario import Scenario
from hf_paged.tools.bench.settings import Settings, load
from hf_paged.tools.lab.baseline import synchronize
from hf_paged.tools.progress import progress

ROWS, PASSAGE, BEGUN, ANSWER = 8, 120, 24, 96
PLAIN, LOOKUP, RANDOM = "no drafts", "prompt lookup", "random draft model"

Case = tuple[str, Tensor, dict[str, Any], tuple[str, ...]]


def measure(settings: Settings, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Decode batches with drafts and without, in turn.

    Args:
        settings: as given.
        rows: gets one for each case and loop, with medians of `tokens_per_s`, that over the one without drafts as
            `speed`, and the share of tokens that are those without drafts.
    """
    measured = load(settings)
    measured.check_room([3 * PASSAGE], ROWS)
    model: Any = measured.model
    model.set_attn_implementation(NAME)
    prose = measured.prompt(ROWS * PASSAGE).view(ROWS, PASSAGE)
    begun = torch.cat([prose, prose, prose[:, :BEGUN]], dim=1)
    cases: list[Case] = [
        ("answers that repeat their prompt", begun, {"do_sample": False}, (PLAIN, LOOKUP, RANDOM)),
        ("nothing repeats (sampled)", prose, {"do_sample": True, "top_k": 0}, (PLAIN, LOOKUP)),
    ]
    loops: dict[str, Callable[..., Any]] = {
        PLAIN: sample,
        LOOKUP: prompt_lookup(),
        RANDOM: assisted(_random_model(model)),
    }
    gather_weights(model)
    with compiled(model):
        for case, ids, options, names in progress(cases, "speculate"):
            runs: dict[str, list[tuple[float, Tensor]]] = {name: [] for name in names}
            for turn in range(settings.rounds + 1):
                for name in names[:: 1 if turn % 2 else -1]:
                    taken = _run(model, loops[name], ids, options, settings.page_size)
                    if turn:  # the first one compiles
                        runs[name].append(taken)
            expected = runs[PLAIN][0][1]
            speeds = {name: statistics.median(one[0] for one in taken) for name, taken in runs.items()}
            for name, taken_runs in runs.items():
                rows.append(
                    {
                        "model": measured.name,
                        "case": case,
                        "baseline": name,
                        "tokens_per_s": speeds[name],
                        "speed": speeds[name] / speeds[PLAIN],
                    }
                    | ({} if options["do_sample"] else {"same": _share(taken_runs[0][1], expected)})
                )
    return {}


class _FirstToken(BaseStreamer):
    """Notes when the first token was there, behind the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    @override
    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    @override
    def end(self) -> None:
        """Nothing is left to do."""

    @property
    def time(self) -> float:
        """In seconds, as `time.perf_counter()` counts."""
        return self.times[1]


def _run(
    model: Any, loop: Callable[..., Any], ids: Tensor, options: dict[str, Any], page_size: int
) -> tuple[float, Tensor]:
    """Decode once; return tokens per second behind the first of each row, and all tokens."""
    torch.manual_seed(0)
    streamer = _FirstToken()
    with PagedCache(model.config, page_size=page_size) as cache:
        settings = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "pad_token_id": 0} | options
        tokens: Tensor = model.generate(ids, **{CACHE: cache}, custom_generate=loop, streamer=streamer, **settings)
        synchronize(tokens.device)
        seconds = time.perf_counter() - streamer.time
    return len(ids) * (ANSWER - 1) / seconds, tokens


def _random_model(model: Any) -> Any:
    """A small model of the same family and vocabulary, that knows nothing."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 2
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:2]
    torch.manual_seed(0)
    return type(model)(config).to(model.device, model.dtype).eval()


def _share(tokens: Tensor, expected: Tensor) -> float:
    return float((tokens == expected).double().mean())


SPECULATE = Scenario(
    "speculate",
    "drafts for a batch: where answers repeat their prompt, where nothing repeats, and of a model that is wrong",
    measure,
    ("model", "case", "baseline", "tokens_per_s", "speed", "same"),
)
