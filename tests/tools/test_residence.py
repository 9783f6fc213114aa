"""Memory that is resident lies between what the accounting says must and may be; what doesn't is reported."""

import ctypes
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_paged import PagedCache, PagePool
from hf_paged._torch.host_memory import give_back_freed, untouched_memory
from hf_paged.cache.prompt import prefill
from hf_paged.packaged import load_packaged_model, prompts
from hf_paged.pages.group import PageGroup
from hf_paged.tools.evaluation.audit import MemoryAudit
from hf_paged.tools.evaluation.residence import _os_pages, _pieces, _runs
from hf_paged.tools.lab import resident
from hf_paged.tools.lab.memory import PeakMemory
from tests.models import generate, left_padded, paged_cache, random_ids, run, tiny_gemma, tiny_llama

WINDOW = 24
PAGE_SIZE = 16
TOKEN_BYTES = 2 * 2 * 2 * 16 * 4  # keys and values of 2 layers, 2 heads, head size 16, float32

on_linux = pytest.mark.skipif(
    resident.resident_pages(torch.zeros(1)) is None, reason="resident pages are read from Linux's /proc"
)


@pytest.fixture
def llama():
    return tiny_llama()


@pytest.fixture
def gemma():
    return tiny_gemma(WINDOW)


# Memory and accounting


@on_linux
@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("num_pages", [None, 64], ids=["growing", "bounded"])
def test_resident_memory_lies_between_what_was_written_and_what_was_handed_out(request, family, num_pages):
    model = request.getfixturevalue(family)
    cache = paged_cache(model, num_pages=num_pages)
    ids = random_ids(2, 400)
    with MemoryAudit(model, cache) as audit:
        run(model, cache, ids, [100, 100, 60, 1, 1, 138])
        held = audit.steps[-1].residence
        fork = cache.fork()
        cache.release([0])
        run(model, fork, random_ids(2, 30), [30])
        cache.reset()
        assert audit.observe("reset").residence.resident_bytes >= held.resident_bytes, "a pool keeps what it has"
        del fork
        cache.pool.trim()
        trimmed = audit.observe("trim").residence
        run(model, cache, ids[:, :50], [50])
    assert [step.disagreements for step in audit.steps] == [()] * len(audit.steps)
    assert audit.summary()["agrees"]
    for step in audit.steps:
        residence = step.residence
        assert residence.least_bytes <= residence.resident_bytes <= residence.most_bytes
        assert step.pool.live_bytes <= residence.least_bytes + WINDOW * 2 * TOKEN_BYTES
        assert residence.storage_bytes == step.pool.reserved_bytes
    if num_pages is None:
        assert trimmed.resident_bytes == trimmed.touched_bytes == 0
    else:
        assert trimmed.resident_bytes > 0, "what was reserved at once stays"


@on_linux
def test_full_pages_of_whole_system_pages_are_resident_to_the_byte():
    head_dim = resident.PAGE_BYTES // (PAGE_SIZE * 4)  # a page of one head is one of the system
    model = tiny_llama(num_heads=2, num_kv_heads=2, head_dim=head_dim)
    cache = PagedCache.from_model(model, page_size=PAGE_SIZE)
    with MemoryAudit(model, cache) as audit:
        run(model, cache, random_ids(3, 48), [16, 32])
    has_huge_pages = resident.backing_bytes() > resident.PAGE_BYTES
    for step, length in zip(audit.steps, (16, 48), strict=True):
        exact, residence = 3 * length * 2 * 2 * 2 * head_dim * 4, step.residence
        assert residence.least_bytes == residence.touched_bytes == step.cache.live_bytes == exact
        assert exact <= residence.resident_bytes <= (residence.most_bytes if has_huge_pages else exact)


def claim_more_storage(monkeypatch, cache):
    honest = PageGroup.reserved_bytes.fget
    monkeypatch.setattr(PageGroup, "reserved_bytes", property(lambda group: 2 * honest(group)))


def claim(name, factor):
    def lie(monkeypatch, cache):
        honest = PagePool.stats

        def stats(pool):
            told = honest(pool)
            return dataclasses.replace(told, **{name: factor * getattr(told, name)})

        monkeypatch.setattr(PagePool, "stats", stats)

    return lie


def claim_tokens_that_nobody_wrote(monkeypatch, cache):
    (table,) = cache._sequences.rows.tables
    table.reserve(np.array([600]))
    table.commit(np.array([600]))


def write_where_nothing_was_handed_out(monkeypatch, cache):
    cache.pool.storage(1).values[:, :, 900:] = 1.0


@on_linux
@pytest.mark.parametrize(
    ("lie", "words"),
    [
        (claim_more_storage, r"reserved_bytes is 1,048,576, but the storage has 524,288"),
        (claim("active_bytes", 1000), r"active_bytes is .*, but only .* were handed out"),
        (claim("live_bytes", 1000), r"live_bytes is .*, but only .* are resident"),
        (claim_tokens_that_nobody_wrote, r"bytes where tokens were written [\d,]+ are missing"),
        (write_where_nothing_was_handed_out, r"[\d,]+ bytes are resident that belong to no page ever handed out"),
    ],
    ids=["reserved", "active", "live", "unwritten", "stray"],
)
def test_a_lie_is_found_and_reported(monkeypatch, llama, lie, words):
    cache = paged_cache(llama, num_pages=64)
    with MemoryAudit(llama, cache) as audit:
        run(llama, cache, random_ids(1, 40), [40])
        assert audit.steps[0].agrees
        lie(monkeypatch, cache)
        told = audit.observe("lie")
    assert told.agrees is False
    assert any(re.search(words, line) for line in told.disagreements)
    assert audit.summary()["agrees"] is False
    assert "Memory and accounting DISAGREE:\n  step 1: " in audit.report()


def test_a_system_that_does_not_tell_is_said_not_to(monkeypatch, llama, tmp_path):
    monkeypatch.setattr(resident, "_PAGEMAP", tmp_path / "none")
    cache = paged_cache(llama)
    with MemoryAudit(llama, cache) as audit:
        run(llama, cache, random_ids(1, 20), [20])
    (step,) = audit.steps
    assert (step.residence.resident_bytes, step.agrees, audit.summary()["agrees"]) == (None, None, None)
    assert step.pool.reserved_bytes == step.residence.storage_bytes > 0
    assert "This system does not tell what is resident" in audit.report()
    assert "peak_resident_bytes" not in audit.summary()


# Memory behind a tensor


@on_linux
def test_system_pages_are_resident_once_they_are_written_and_not_when_read():
    size = resident.PAGE_BYTES
    memory = untouched_memory(8 * size + 1)
    assert resident.num_os_pages(memory) == 9
    assert not resident.resident_pages(memory).any()
    assert memory[: 2 * size].sum() == 0
    assert not resident.resident_pages(memory).any()
    memory[size - 1 : size + 1] = 1
    memory[8 * size] = 1
    assert np.flatnonzero(resident.resident_pages(memory)).tolist() == [0, 1, 8]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only glibc can be told to give back")
def test_what_c_keeps_of_freed_tensors_is_given_back():
    before = PeakMemory(torch.device("cpu"))
    tensors = [torch.ones(4096) for _ in range(4096)]  # 64 MiB, too small to be the system's own
    del tensors[::2]
    kept = before.held_bytes
    give_back_freed()
    assert before.held_bytes < kept - 8 * 2**20, "a system page at the end of each piece holds its neighbour, too"
    assert all(tensor.eq(1).all() for tensor in tensors)


@pytest.mark.parametrize(
    ("num_tokens", "max_tokens", "times"),
    [(1600, None, 2), (3200, 1600, 2), (1600, 400, 1), (1600, 1601, 1), (100, None, 0)],
)
def test_activations_of_long_prompts_are_given_back(llama, monkeypatch, num_tokens, max_tokens, times):
    """After each long chunk, and after all of many short ones."""
    calls = []
    monkeypatch.setattr(prefill, "give_back_freed", lambda: calls.append(None))
    paged_cache(llama).prefill(llama, random_ids(1, num_tokens), max_tokens=max_tokens)
    assert len(calls) == times


@pytest.mark.parametrize(
    ("enabled", "sizes", "expected"),
    [
        ("always [madvise] never", {64: "inherit [never]", 2048: "[inherit] never"}, 0),
        ("[always] madvise never", {64: "inherit [never]", 2048: "[inherit] never"}, 2048),
        ("always madvise [never]", {64: "[always] inherit", 2048: "[inherit] never"}, 64),
        ("[always] madvise never", {}, 2048),
        (None, {}, 0),
    ],
)
def test_huge_pages_count_where_they_come_unasked(monkeypatch, tmp_path, enabled, sizes, expected):
    if enabled is not None:
        (tmp_path / "enabled").write_text(enabled)
        (tmp_path / "hpage_pmd_size").write_text(f"{2048 * 1024}\n")
    for size, choice in sizes.items():
        (tmp_path / f"hugepages-{size}kB").mkdir()
        (tmp_path / f"hugepages-{size}kB" / "enabled").write_text(choice)
    monkeypatch.setattr(resident, "_HUGE_PAGES", tmp_path)
    assert resident.backing_bytes() == (expected * 1024 or resident.PAGE_BYTES)


def test_pieces_are_rounded_outwards_in_each_head():
    size = resident.PAGE_BYTES
    memory = untouched_memory(8 * size)
    tensor = memory.view(1, 2, 4 * size, 1)
    first, second = ([head * 4 * size + size + 5, head * 4 * size + 2 * size + 1] for head in (0, 1))
    pieces = _pieces(tensor, np.array([[size + 5, 2 * size + 1]])) - tensor.data_ptr()
    assert pieces.tolist() == [first, second]
    flags = _os_pages(tensor, pieces + tensor.data_ptr(), size)
    assert np.flatnonzero(flags).tolist() == [1, 2, 5, 6]
    assert not _os_pages(tensor, np.array([[tensor.data_ptr() + 5] * 2]), size).any(), "an empty piece is nothing"
    whole = _os_pages(tensor, np.array([[tensor.data_ptr() - 1, tensor.data_ptr()]]), 2**30)
    assert whole.all(), "a neighbour in the same huge page may bring all of it"


def test_runs_have_the_worked_numbers():
    assert _runs(np.array([0, 1, 1, 0, 1], dtype=bool)).tolist() == [[1, 3], [4, 5]]
    assert _runs(np.zeros(3, dtype=bool)).tolist() == []


FRESH = """
from hf_paged import PagedCache
from hf_paged.tools.evaluation.audit import MemoryAudit
from tests.models import generate, random_ids, tiny_llama

model = tiny_llama()
cache = PagedCache.from_model(model, page_size=16)
with MemoryAudit(model, cache) as audit:
    generate(model, "sdpa", cache, random_ids(3, 300))
    cache.reset()
    cache.pool.trim()
    audit.observe("trim")
print(audit.report())
"""


@on_linux
def test_memory_and_accounting_agree_in_a_fresh_process():
    folder = Path(__file__).parents[2]
    printed = subprocess.run([sys.executable, "-c", FRESH], check=True, capture_output=True, text=True, cwd=folder)
    assert printed.stdout.splitlines()[-1] == "Resident memory and accounting agree in every step."


@on_linux
@pytest.mark.real_model
def test_a_real_model_takes_what_the_accounting_says():
    model, tokenizer = load_packaged_model(attn_implementation="paged_flex")
    ids = torch.tensor(prompts(tokenizer, [70, 70]))
    mask = left_padded(70, [70, 20])
    cache = PagedCache.from_model(model, page_size=16)
    with MemoryAudit(model, cache) as audit:
        generate(model, "paged_flex", cache, ids, attention_mask=mask, max_new_tokens=4)
        cache.reset()
        cache.pool.trim()
        trimmed = audit.observe("trim")
    first = audit.steps[0]
    token_bytes = 30 * 2 * 3 * 64 * 4
    assert first.cache.live_bytes == 90 * token_bytes
    assert first.cache.active_bytes == 7 * 16 * token_bytes
    assert first.padded_bytes == 140 * token_bytes
    assert audit.summary()["agrees"]
    assert trimmed.residence.resident_bytes == 0
