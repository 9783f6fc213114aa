"""A GPU at the shapes of real models, within a time limit: `python examples/bench_gpu.py --seconds 420`.

Needs no more of this package than its source on the path, as with `PYTHONPATH=.`. What matters most comes first.
Results are written after each case; one that is not expected to fit into what is left is a row that says so. `--shape
tiny --device cpu --dtype float32` tries everything out.
"""

import argparse
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

import torch
from transformers.utils.logging import disable_progress_bar

from hf_paged.tools.bench.scenario import with_speed
from hf_paged.tools.bench.scenarios import SCENARIOS
from hf_paged.tools.bench.scenarios.attention import RAGGED, RAGGED_AND_LONG
from hf_paged.tools.bench.settings import Settings
from hf_paged.tools.bench.whole import WHOLE
from hf_paged.tools.lab.baseline import synchronize
from hf_paged.tools.lab.model import SHAPES
from hf_paged.tools.lab.options import names
from hf_paged.tools.lab.provenance import provenance, write_results
from hf_paged.tools.lab.table import table

_REFERENCE = "dynamic-no-cudnn"
_COMPILED = ("paged-compiled", "paged-compiled-loop")
_PAGED = ("paged", "paged-loop", *_COMPILED)
_PACKED = ("paged-ragged", "paged-loop", *_COMPILED)


@dataclass(frozen=True)
class Case:
    """What is measured in one go.

    Attributes:
        name: for the command line, and for a table.
        scenario: what is measured.
        shape: of the model, "" without one.
        baselines: those that this version has are measured.
        seconds: that it is expected to take on an H100.
        more: settings.
        environment: of the process.
    """

    name: str
    scenario: str
    shape: str
    baselines: tuple[str, ...]
    seconds: int
    more: dict[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)

    def settings(self, arguments: argparse.Namespace) -> Settings:
        """Make the settings; with a shape that all are to have, for short prompts."""
        more = dict(self.more)
        if arguments.shape:
            asked = {"prompt_lengths": RAGGED} | more if not self.shape else more
            more |= {
                name: tuple(16 + length // 1000 for length in asked[name])
                for name in asked.keys() & {"contexts", "prompt_lengths"}
            }
        if self.shape:
            more["caches"] = tuple(name for name in self.baselines if name in WHOLE)
            more["shape"] = arguments.shape or self.shape
        return Settings(dtype=arguments.dtype, device=arguments.device, whole=True, **more)


def _one_row(name: str, shape: str, context: int, seconds: int, *baselines: str, rounds: int = 3) -> Case:
    more = {"contexts": (context,), "max_new_tokens": 64, "rounds": rounds}
    return Case(name, "latency", shape, (_REFERENCE, *baselines), seconds, more)


def _batch(name: str, shape: str, lengths: Sequence[int], seconds: int, *baselines: str, rounds: int = 2) -> Case:
    more = {"prompt_lengths": tuple(lengths), "max_new_tokens": 64, "rounds": rounds}
    return Case(name, "mixed", shape, baselines, seconds, more)


def _sequence(name: str, seconds: int, *baselines: str) -> Case:
    more = {"contexts": (100_000,), "max_new_tokens": 32, "rounds": 1, "chunk_size": 4096}
    return Case(name, "single", "llama-2-7b", baselines, seconds, more)


# inductor makes loops of products of one row then, and tries out how to launch them.
_TUNED = {"TORCHINDUCTOR_COORDINATE_DESCENT_TUNING": "1"}

CASES = (
    Case("attention", "attention", "", (), 30, {}),
    _one_row("8b-512", "llama-3-8b", 512, 90, "static-compiled", *_PAGED),
    _batch("8b-32-rows", "llama-3-8b", RAGGED, 50, _REFERENCE, *_PACKED),
    _one_row("8b-32768", "llama-3-8b", 32768, 40, *_COMPILED, rounds=1),
    _one_row("8b-8192", "llama-3-8b", 8192, 20, *_COMPILED, rounds=2),
    _one_row("1b-512", "llama-3.2-1b", 512, 50, "static-compiled", *_PAGED),
    _batch("8b-16-long-rows", "llama-3-8b", RAGGED_AND_LONG, 60, *_COMPILED, rounds=1),
    _sequence("7b-100000", 70, "paged-compiled"),
    _batch("8b-32-rows-engine", "llama-3-8b", RAGGED, 60, _REFERENCE, "generate_batch", rounds=1),
    _batch("1b-32-rows", "llama-3.2-1b", RAGGED, 30, _REFERENCE, *_PACKED),
    _one_row("135m-512", "smollm2-135m", 512, 40, *_PAGED),
    _batch("135m-32-rows", "smollm2-135m", RAGGED, 30, _REFERENCE, *_PACKED),
    _sequence("7b-100000-dynamic", 60, _REFERENCE),
    replace(_one_row("8b-512-tuned", "llama-3-8b", 512, 120, "paged-compiled-loop"), environment=_TUNED),
)
"""What matters most first; those of one shape that follow one another share a process."""


def measure(scenario: str, settings: Settings) -> dict[str, Any]:
    """Measure a scenario, and wait for the device: what failed there is known then."""
    results = SCENARIOS[scenario].measure(settings)
    synchronize(torch.device(settings.device))
    return results


def run(cases: Sequence[Case], arguments: argparse.Namespace) -> Iterator[tuple[Case, list[dict[str, Any]], float]]:
    """Measure cases within the time limit, each shape in a process of its own, and another one after a failure.

    Yields:
        Each case, its rows, and the seconds that it took.
    """
    deadline = time.monotonic() + arguments.seconds
    process, known = None, None
    for case in cases:
        begin = time.monotonic()
        left = deadline - begin
        if case.seconds > left:
            error = f"not measured: takes about {case.seconds} s, and {max(0, left):.0f} s of the limit were left"
            yield case, [{"baseline": "", "error": error}], 0.0
            continue
        if process is None or (case.shape, case.environment) != known:
            if process is not None:
                process.shutdown()
            process, known = _new_process(case.environment), (case.shape, case.environment)
        try:
            rows = process.submit(measure, case.scenario, case.settings(arguments)).result()["rows"]
        except Exception as error:
            rows, known = [{"baseline": "", "error": f"{type(error).__name__}: {error}"}], None
        yield case, rows, time.monotonic() - begin
    if process is not None:
        process.shutdown()


def _new_process(environment: Mapping[str, str]) -> ProcessPoolExecutor:
    process = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    with patch.dict(os.environ, environment):  # for what is read when torch is imported
        process.submit(disable_progress_bar).result()
    return process


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=420, help="the limit (default: %(default)s)")
    parser.add_argument("--json", default="gpu-shapes.json", help="where the results go (default: %(default)s)")
    parser.add_argument("--cases", type=names, help=f"default: all of {','.join(case.name for case in CASES)}")
    parser.add_argument("--shape", choices=SHAPES, help="for all cases instead of their own, with short prompts")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args(argv)
    chosen = [case for case in CASES if arguments.cases is None or case.name in arguments.cases]
    if arguments.cases is not None and len(chosen) < len(arguments.cases):
        parser.error(f"--cases has {arguments.cases}; there are {[case.name for case in CASES]}")
    seconds: dict[str, float] = {}
    results = provenance() | {"seconds": seconds} | {case.scenario: {"rows": []} for case in chosen}
    for case, rows, taken in run(chosen, arguments):
        seconds[case.name] = round(taken, 1)
        named = [({"model": case.shape} if case.shape else {}) | {"context": case.name} | row for row in rows]
        results[case.scenario]["rows"] += named
        write_results(arguments.json, results)
        print(
            f"\n{case.name}, {taken:.0f} s\n\n{table(with_speed(named), SCENARIOS[case.scenario].columns)}", flush=True
        )


if __name__ == "__main__":
    main()
