"""How often kernels are compiled, in processes of their own, where nothing was compiled before."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BEGIN = """
import torch
from torch._dynamo.utils import counters
from hf_paged import PagedCache
from hf_paged._torch import inductor
from hf_paged.attention import dispatch
from tests.models import random_ids, run, tiny_llama

model = tiny_llama(num_layers=1)
model.set_attn_implementation("paged_flex")
"""

PACKED = """
def prefill():
    for num_rows in (1, 2, 5):
        for max_tokens in (2, 30, 90):
            for turn in (7, 70):
                cache = PagedCache.from_model(model, page_size=32)
                ids = random_ids(num_rows, 20 + turn)
                cache.prefill(model, ids[:, :20], max_tokens=max_tokens)
                cache.prefill(model, ids, max_tokens=max_tokens)

prefill()
print("packed", inductor.num_specializations())
"""

MANY_SHAPES = """
def many_shapes():
    for num_rows in (1, 2, 3, 5, 64, 1):
        for num_pages in (None, 300):
            cache = PagedCache.from_model(model, page_size=32, num_pages=num_pages)
            run(model, cache, random_ids(num_rows, 90), [20, 1, 1, 1, 30, 7, 1, 2, 1, 26])

many_shapes()
print("many_shapes", inductor.num_specializations())
"""

LONG_RUNS = """
for num_rows in (1, 4):
    cache = PagedCache.from_model(model, page_size=32)
    run(model, cache, random_ids(num_rows, 2000), ([1] * 9 + [31]) * 50)
print("long_runs", inductor.num_specializations())
print("graphs", counters["stats"]["unique_graphs"])
"""

TILES = """
dispatch.VARLEN_SDPA.fall_back("tiles are wanted here")
prefill()
many_shapes()
print("tiles", inductor.num_specializations())
"""

END = """
print("hits", counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"])
print("misses", counters["aot_autograd"]["autograd_cache_miss"] + counters["inductor"]["fxgraph_cache_miss"])
"""


def counts(body: str, cache_folder: Path) -> dict[str, int]:
    process = subprocess.run(
        [sys.executable, "-c", BEGIN + body + END],
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache_folder), "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return {name: int(number) for name, number in (line.split() for line in process.stdout.splitlines())}


@pytest.mark.timeout(300)
def test_kernels_are_compiled_for_kinds_of_steps_and_not_for_their_sizes(tmp_path):
    found = counts(PACKED + MANY_SHAPES + LONG_RUNS + TILES, tmp_path)
    assert found["packed"] == 0, "on a CPU they are SDPA's"
    assert found["many_shapes"] == 2, "one row and several rows, with one query; several queries are SDPA's, too"
    assert found["long_runs"] == 2, "up to 2000 tokens, and 2000 of four rows"
    assert found["graphs"] == 2, "dynamo compiled something that is not counted"
    assert found["tiles"] == 4, "one row and several rows with several queries; packed chunks run the latter's kernel"
    assert found["misses"] > 0
    again = counts(PACKED + MANY_SHAPES + TILES, tmp_path)
    assert (again["many_shapes"], again["tiles"]) == (2, 4)
    assert (again["misses"], again["hits"] > 0) == (0, True), "a second process starts from the compile cache"
