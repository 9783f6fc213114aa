"""How often FlexAttention is compiled. Each test runs in processes of its own, where nothing was compiled before."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import torch
from torch._dynamo.utils import counters
from hf_paged import PagedCache
from hf_paged._torch import inductor
from tests.models import random_ids, run, tiny_llama

model = tiny_llama(num_layers=1)
model.set_attn_implementation("paged_flex")
{body}
print("specializations", inductor.num_specializations())
print("graphs", counters["stats"]["unique_graphs"])
print("hits", counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"])
print("misses", counters["aot_autograd"]["autograd_cache_miss"] + counters["inductor"]["fxgraph_cache_miss"])
"""

LONG_RUNS = """
for num_rows in (1, 4):
    cache = PagedCache.from_model(model, page_size=32)
    run(model, cache, random_ids(num_rows, 2000), [1] * 2000)
"""

MANY_SHAPES = """
for num_rows in (1, 2, 3, 5, 64, 1):
    for num_pages in (None, 300):
        cache = PagedCache.from_model(model, page_size=32, num_pages=num_pages)
        run(model, cache, random_ids(num_rows, 90), [20, 1, 1, 1, 30, 7, 1, 2, 1, 26])
"""

PACKED = """
for num_rows in (1, 2, 5):
    for max_tokens in (1, 2, 30, 90):
        for turn in (7, 90):
            cache = PagedCache.from_model(model, page_size=32)
            ids = random_ids(num_rows, 20 + turn)
            cache.prefill(model, ids[:, :20], max_tokens=max_tokens)
            cache.prefill(model, ids, max_tokens=max_tokens)
"""

BY_TILES = """
from hf_paged.attention import dispatch
dispatch.choose_backend = lambda *_: dispatch.Backend.FLEX
"""

SHORT_RUN = """
run(model, PagedCache.from_model(model, page_size=32), random_ids(1, 40), [30] + [1] * 10)
"""


def counts(body: str, cache_folder: Path) -> dict[str, int]:
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(body=body)],
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache_folder), "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return {name: int(number) for name, number in (line.split() for line in process.stdout.splitlines())}


def test_2000_tokens_alone_and_in_a_batch_of_4_compile_at_most_4_kernels(tmp_path):
    found = counts(LONG_RUNS, tmp_path)
    assert 1 <= found["specializations"] <= 4
    assert found["graphs"] == found["specializations"], "dynamo compiled something that is not counted"


def test_batch_sizes_lengths_and_pool_sizes_don_t_recompile(tmp_path):
    assert counts(MANY_SHAPES, tmp_path)["specializations"] <= 4


def test_packed_chunks_compile_nothing_on_a_cpu(tmp_path):
    assert counts(PACKED, tmp_path)["specializations"] == 0


def test_all_packed_chunks_in_tiles_run_one_kernel(tmp_path):
    assert counts(BY_TILES + PACKED, tmp_path)["specializations"] == 1


@pytest.mark.timeout(300)
def test_a_second_process_starts_from_the_compile_cache(tmp_path):
    first = counts(SHORT_RUN, tmp_path)
    second = counts(SHORT_RUN, tmp_path)
    assert first["misses"] > 0
    assert second["misses"] == 0
    assert second["hits"] > 0
    assert second["specializations"] == first["specializations"]
