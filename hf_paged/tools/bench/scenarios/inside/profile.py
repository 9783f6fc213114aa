"""Where the milliseconds of a decoding step go."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from hf_paged.tools.bench.race import Race, summarize, warm_up
from hf_paged.tools.bench.scenario import Scenario
from hf_paged.tools.bench.scenarios.mixed import prompt_lengths
from hf_paged.tools.bench.settings import Settings, load
from hf_paged.tools.lab.baselines import line_up
from hf_paged.tools.progress import progress

CONTEXTS = (128, 2048)
BASELINES = ("dynamic", "paged", "paged-compiled")
_NUM_PROFILED = 8
_KINDS = {
    "linear_ms": ("aten::mm", "aten::addmm", "mkldnn::", "hf_paged::products_of_rows"),
    "attention_ms": ("aten::_scaled_dot_product", "hf_paged::paged_attention"),
    "copies_ms": ("aten::cat", "aten::index_copy_", "aten::index_fill_"),
    "guards_ms": ("TorchDynamo Cache Lookup",),
    "graph_ms": ("## Call CompiledFxGraph",),
}
_OTHER = "other_operations_ms"
_PYTHON = "python_ms"


def measure(settings: Settings, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Take steps apart: one row at each context, and the batch of `mixed`; and the prompts of that batch.

    Args:
        settings: as given.
        rows: gets one for each batch and baseline: `ms_per_step` without the profiler, `profiled_ms` with it, and of
            these `linear_ms` and `attention_ms`; `copies_ms`, of keys and values into the cache; `guards_ms`,
            dynamo's; `graph_ms`, what inductor compiled, with the linear layers of one token; `other_operations_ms`;
            and `python_ms`, whatever is left: Python, planning and the dispatch of operations. The prompts, all of
            them together, have no `ms_per_step`.
    """
    model, lengths = load(settings), prompt_lengths(settings.prompt_lengths)
    contexts = model.contexts(settings.contexts, CONTEXTS, settings.max_new_tokens + _NUM_PROFILED)
    batches: list[tuple[str, Tensor, Tensor | None]] = [(str(n), model.prompt(n), None) for n in contexts]
    batches.append((f"{len(lengths)} rows", *model.padded(lengths)))
    with line_up(model.model, settings.caches or BASELINES, settings.page_size) as baselines:
        by_name = {baseline.name: baseline for baseline in baselines}
        warm_up(baselines, model)
        warm_up(baselines, model, len(lengths))
        for name, ids, mask in progress(batches, "profile"):
            race = Race(baselines, ids.shape[1] + settings.max_new_tokens + _NUM_PROFILED, mask)
            summary = summarize([race.lap(ids, settings.max_new_tokens)])
            for row in summary:
                if "error" not in row:
                    row |= _taken_apart(by_name[row["baseline"]].step, _NUM_PROFILED)
                rows.append({"context": name} | row)
            race.end()
        for baseline in [by_name[row["baseline"]] for row in summary if "error" not in row]:
            baseline.begin(ids.shape[1] + 1, mask)
            figures = _taken_apart(partial(baseline.feed, ids, 1), 1)
            rows.append({"context": f"{len(lengths)} prompts", "baseline": baseline.name} | figures)
            baseline.cache = None
    return {}


def _taken_apart(action: Callable[[], float], times: int) -> dict[str, float]:
    """Repeat what returns the seconds it took, and say what an average one is spent on."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        seconds = sum(action() for _ in range(times))
    events = [(event.key, event.self_cpu_time_total / 1e3 / times) for event in profiler.key_averages()]
    return by_kind(events, 1e3 * seconds / times)


def by_kind(events: Sequence[tuple[str, float]], profiled_ms: float) -> dict[str, float]:
    """Add up the times of operations by what they do.

    Args:
        events: name and milliseconds of each, without what it calls.
        profiled_ms: of everything, Python included.
    """
    spent: dict[str, float] = defaultdict(float)
    for name, milliseconds in events:
        # What runs Python shows up as an operation.
        if name.startswith(("hf_paged::write", "Torch-Compiled Region", "Pregraph")):
            continue
        kinds = (kind for kind, prefixes in _KINDS.items() if name.startswith(prefixes))
        spent[next(kinds, _OTHER)] += milliseconds
    figures = {kind: spent[kind] for kind in (*_KINDS, _OTHER)}
    return {"profiled_ms": profiled_ms} | figures | {_PYTHON: profiled_ms - sum(figures.values())}


PROFILE = Scenario(
    "profile",
    "where the milliseconds of a decoding step go",
    measure,
    ("context", "baseline", "ms_per_step", "profiled_ms", *_KINDS, _OTHER, _PYTHON, "error"),
)
