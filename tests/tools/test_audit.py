"""The audit of memory: every figure is counted again here, slot by slot, and by the contiguous caches themselves."""

import json
import re

import numpy as np
import pytest
import torch
from transformers import DynamicCache, StaticCache

from hf_paged import OutOfPagesError, PagedCache, PagePool, ReleaseFinished, compiled
from hf_paged.tools.bench.scenarios.mixed import prompt_lengths
from hf_paged.tools.cli import main
from hf_paged.tools.evaluation.audit import MemoryAudit, agreement
from hf_paged.tools.evaluation.audited_batch import audit_batch
from hf_paged.tools.lab.memory import token_bytes
from hf_paged.tools.lab.model import random_model
from tests.models import generate, left_padded, paged_cache, random_ids, run, tiny_gemma, tiny_llama

WINDOW = 24
PAGE_SIZE = 16
TOKEN_BYTES = 2 * 2 * 2 * 16 * 4  # keys and values of 2 layers, 2 heads, head size 16, float32


@pytest.fixture
def llama():
    return tiny_llama()


@pytest.fixture
def gemma():
    return tiny_gemma(WINDOW)


def counted(*caches):
    """Live, active and shared bytes, slot by slot."""
    live = active = shared = 0
    for index, group in enumerate(caches[0].pool.groups):
        token_bytes = len(group.layers) * 2 * 2 * 16 * 4
        slots, pages, num_tokens = set(), set(), 0
        for table in (cache._sequences.rows.tables[index] for cache in caches):
            for row in range(table.num_rows):
                start, held = int(table.starts[row]), table.row_pages(row)
                places = range(start, int(table.lengths[row]))
                slots |= {(held[place // PAGE_SIZE - start // PAGE_SIZE], place % PAGE_SIZE) for place in places}
                num_tokens += len(places)
                pages |= set(held)
        live += len(slots) * token_bytes
        active += len(pages) * PAGE_SIZE * token_bytes
        shared += (num_tokens - len(slots)) * token_bytes
    return live, active, shared


def figures(stats):
    assert stats.wasted_bytes == stats.active_bytes - stats.live_bytes
    assert stats.overhead == pytest.approx(stats.active_bytes / stats.live_bytes - 1 if stats.live_bytes else 0)
    return stats.live_bytes, stats.active_bytes, stats.shared_bytes


def storage_bytes(pool):
    return sum(tensor.nbytes for layer in pool.group_of_layer for tensor in pool.storage(layer).tensors)


def contiguous_bytes(model, cache, ids, splits, mask):
    """What one of Transformers' caches holds after each pass."""
    model.set_attn_implementation("sdpa")
    held, start = [], 0
    for size in splits:
        stop = start + size
        with torch.no_grad():
            model(ids[:, start:stop], past_key_values=cache, attention_mask=None if mask is None else mask[:, :stop])
        held.append(sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers))
        start = stop
    return held


# What each column says


@pytest.mark.parametrize("lengths", [[1], [1, 15, 16, 17, 33], [40, 40]], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_each_pass_is_accounted_for_as_counted_by_hand(request, family, lengths):
    model = request.getfixturevalue(family)
    splits = [max(lengths)] + [1] * 18
    ids = random_ids(len(lengths), sum(splits))
    mask = torch.cat([left_padded(max(lengths), lengths), torch.ones(len(lengths), 18, dtype=torch.long)], dim=1)
    dynamic = contiguous_bytes(model, DynamicCache(config=model.config), ids, splits, mask)
    static = contiguous_bytes(model, StaticCache(config=model.config, max_cache_len=60), ids, splits, mask)
    cache = paged_cache(model)
    expected = []
    with MemoryAudit(model, cache, max_length=60) as audit:
        for done in range(len(splits)):
            start, stop = sum(splits[:done]), sum(splits[: done + 1])
            with torch.no_grad():
                model(ids[:, start:stop], past_key_values=cache, attention_mask=mask[:, :stop])
            expected.append(counted(cache))
    assert [figures(step.cache) for step in audit.steps] == expected
    assert [figures(step.pool) for step in audit.steps] == expected
    assert [step.padded_bytes for step in audit.steps] == dynamic
    assert [step.static_bytes for step in audit.steps] == static
    assert [step.num_columns for step in audit.steps] == np.cumsum(splits).tolist()
    assert {(step.event, step.num_rows) for step in audit.steps} == {("pass", len(lengths))}
    assert audit.steps[-1].pool.reserved_bytes == storage_bytes(cache.pool)
    last = audit.steps[-1]
    assert last.cache.num_tokens == sum(lengths) + 18 * len(lengths)
    if family == "llama":
        assert last.cache.minimum_bytes == last.cache.num_tokens * TOKEN_BYTES
        assert last.overheads == {
            "active": last.cache.active_bytes / last.cache.live_bytes - 1,
            "reserved": storage_bytes(cache.pool) / last.cache.live_bytes - 1,
            "padded": dynamic[-1] / last.cache.live_bytes - 1,
            "static": static[-1] / last.cache.live_bytes - 1,
        }


def test_beams_share_their_prompt_and_contiguous_beams_do_not(llama):
    ids = random_ids(2, 40)
    expected = generate(llama, "paged_flex", paged_cache(llama), ids, num_beams=3, max_new_tokens=10)
    cache = paged_cache(llama)
    with MemoryAudit(llama, cache) as audit:
        tokens = generate(llama, "paged_flex", cache, ids, num_beams=3, max_new_tokens=10)
        reordered = audit.observe("reordered")
    assert torch.equal(tokens, expected)
    assert figures(reordered.cache) == counted(cache)
    *passes, last = audit.steps
    first = passes[0]
    assert first.cache.live_bytes == 2 * 40 * TOKEN_BYTES
    assert first.cache.shared_bytes == 4 * 40 * TOKEN_BYTES
    assert [step.padded_bytes for step in passes] == [6 * (40 + step) * TOKEN_BYTES for step in range(10)]
    assert last.static_bytes is None
    assert "static" not in last.overheads


def test_rows_that_end_early_are_held_by_a_contiguous_cache_only(llama):
    ids = random_ids(3, 33)
    tokens = generate(llama, "paged_flex", paged_cache(llama), ids, max_new_tokens=6)
    end = int(tokens[0, 34])
    cache = paged_cache(llama)
    with MemoryAudit(llama, cache) as audit:
        generate(llama, "paged_flex", cache, ids, max_new_tokens=6, stopping_criteria=[ReleaseFinished(cache, end)])
    assert cache.lengths[0] == 0
    last = audit.steps[-1]
    assert figures(last.cache) == counted(cache)
    assert last.cache.num_tokens == sum(cache.lengths)
    assert last.padded_bytes == 3 * last.num_columns * TOKEN_BYTES


def test_a_fork_on_the_same_pool_is_the_pools_and_not_the_caches(llama):
    cache = paged_cache(llama)
    ids = random_ids(1, 60)
    run(llama, cache, ids[:, :40], [40])
    fork = cache.fork()
    with MemoryAudit(llama, cache) as audit:
        run(llama, fork, ids[:, 40:50], [10])
        run(llama, cache, ids[:, 40:], [20])
    other, own = audit.steps
    assert (other.event, own.event) == ("other pass", "pass")
    assert other.cache.live_bytes == 40 * TOKEN_BYTES
    assert other.pool.live_bytes == (32 + 8 + 18) * TOKEN_BYTES, "the shared last page was copied"
    assert figures(own.cache) == counted(cache)
    assert figures(own.pool) == counted(cache, fork)
    assert audit.summary()["num_passes"] == 1


def test_a_packed_prompt_is_the_caches_once_it_is_whole(llama):
    ids, mask = random_ids(3, 70), left_padded(70, [70, 17, 33])
    cache = paged_cache(llama)
    with MemoryAudit(llama, cache) as audit:
        cache.prefill(llama, ids, mask, max_tokens=50)
        assert audit.observe("prefilled").cache.num_tokens == 69 + 16 + 32
        generate(llama, "paged_flex", cache, ids, attention_mask=mask, max_new_tokens=2)
    assert [step.event for step in audit.steps] == ["other pass"] * 3 + ["prefilled"] + ["pass"] * 2
    assert [step.cache.num_tokens for step in audit.steps] == [0, 0, 0, 117, 120, 123]
    assert [step.pool.live_bytes // TOKEN_BYTES for step in audit.steps] == [50, 100, 117, 117, 120, 123]
    assert [step.num_columns for step in audit.steps] == [0, 0, 0, 69, 70, 71]


def test_a_static_cache_that_is_too_small_is_left_out(llama):
    cache = paged_cache(llama)
    with MemoryAudit(llama, cache, max_length=16) as audit:
        run(llama, cache, random_ids(2, 17), [16, 1])
    assert [step.static_bytes for step in audit.steps] == [2 * 16 * TOKEN_BYTES, None]
    assert "static" not in audit.summary()["overheads"]


@pytest.mark.parametrize(("page_size", "limit"), [(16, 0.02), (64, 0.07), (128, 0.13)])
def test_little_is_wasted_on_prompts_of_16_to_1024_tokens(page_size, limit):
    pool = PagePool(tiny_llama().config, page_size=page_size)
    cache = PagedCache(pool=pool)
    (table,) = cache._sequences.rows.tables
    lengths = np.array(prompt_lengths())
    table.open_rows(len(lengths))
    for layer in (0, 1):
        pool.open_storage(layer, torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16))
    for counts in [lengths] + [np.ones_like(lengths)] * 32:
        table.reserve(counts)
        table.commit(counts)
        assert pool.stats().minimum_bytes == table.lengths.sum() * TOKEN_BYTES
        assert pool.stats().overhead <= limit


# The audit as a context


def test_the_hook_is_gone_after_an_error_and_a_failed_pass_is_no_step(llama):
    cache = paged_cache(llama, num_pages=2)
    audit = MemoryAudit(llama, cache)
    with pytest.raises(OutOfPagesError, match="needs 2 more pages"), audit:
        run(llama, cache, random_ids(1, 60), [20, 40])
    assert len(audit.steps) == 1
    run(llama, cache, random_ids(1, 1), [1])
    assert len(audit.steps) == 1
    assert not any(module._forward_hooks for module in llama.modules())


def test_it_does_not_change_what_is_generated(gemma):
    ids, mask = random_ids(3, 40), left_padded(40, [40, 3, 17])
    arguments = {"attention_mask": mask, "max_new_tokens": 20}
    expected = generate(gemma, "paged_flex", paged_cache(gemma), ids, **arguments)
    cache = paged_cache(gemma)
    with MemoryAudit(gemma, cache) as audit:
        assert torch.equal(generate(gemma, "paged_flex", cache, ids, **arguments), expected)
    assert len(audit.steps) == 20
    cache.pool.check_integrity()


def test_an_audit_is_entered_once_and_observes_within(llama):
    audit = MemoryAudit(llama, paged_cache(llama))
    with pytest.raises(ValueError, match=r"observe\('early'\) was called outside of"):
        audit.observe("early")
    with audit:
        audit.observe("nothing yet")
    assert audit.steps[0].row()["active_bytes"] == audit.steps[0].padded_bytes == 0
    with pytest.raises(ValueError, match="has been used before"), audit:
        pass
    with pytest.raises(ValueError, match="max_length=0 was asked for"):
        MemoryAudit(llama, paged_cache(llama), max_length=0)


def test_a_compiled_model_is_refused(llama):
    llama.set_attn_implementation("paged_flex")
    with compiled(llama), pytest.raises(ValueError, match="Leave compiled"), MemoryAudit(llama, paged_cache(llama)):
        pass


@torch.no_grad()
def test_passes_that_the_hook_does_not_see_are_noticed(llama, caplog):
    cache = paged_cache(llama)
    with MemoryAudit(llama, cache) as audit:
        llama.model.forward(random_ids(1, 20), past_key_values=cache)  # as a graph does that was compiled before
    assert not audit.steps
    assert "20 columns were added in passes that this audit did not see" in caplog.text
    assert agreement(audit.summary()) == "Nothing was observed."


def test_the_summary_says_how_the_overhead_went(llama):
    cache = paged_cache(llama)
    with MemoryAudit(llama, cache, max_length=40) as audit:
        run(llama, cache, random_ids(1, 33), [16] + [1] * 17)
        cache.reset()
        audit.observe("reset")
    summary = audit.summary()
    course = [0.0] + [32 / length - 1 for length in range(17, 33)] + [48 / 33 - 1]
    found = summary["overheads"]["active"]
    assert found == pytest.approx({"first": 0.0, "worst": 32 / 17 - 1, "mean": sum(course) / 18, "last": 48 / 33 - 1})
    assert (summary["num_steps"], summary["num_passes"]) == (19, 18)
    assert summary["peak_live_bytes"] == summary["peak_padded_bytes"] == 33 * TOKEN_BYTES
    assert summary["peak_active_bytes"] == 48 * TOKEN_BYTES
    assert summary["peak_static_bytes"] == 40 * TOKEN_BYTES
    report = audit.report().splitlines()
    assert report[0].split()[:3] == ["step", "event", "rows"]
    assert report[1].split()[:4] == ["0", "pass", "1", "16"]
    assert re.search(r"\nactive +0.00 % +88.24 % +\d+.\d\d % +45.45 %\n", audit.report())
    assert "At the peak, MiB:\n\n" in audit.report()


# A batch, and the command


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_batch_gives_all_of_its_memory_back(num_beams):
    model = random_model()
    size = token_bytes(model.model)
    audit = audit_batch(model, [5, 40, 18], page_size=16, max_new_tokens=3, num_beams=num_beams)
    passes = [step for step in audit.steps if step.event == "pass"]
    assert [step.num_rows for step in passes] == [3 * num_beams] * 3
    assert [step.cache.num_tokens for step in passes] == [num_beams * (63 + 3 * step) for step in range(3)]
    assert passes[0].static_bytes == 3 * num_beams * 43 * size
    assert passes[0].cache.active_bytes <= (3 * num_beams + 3) * 16 * size, "prompts are shared"
    assert audit.steps[-1].event == "reset and trim"
    assert audit.steps[-1].cache.active_bytes == 0
    assert audit.steps[-1].pool.reserved_bytes == 16 * size, "a page in each layer"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 7}, "need 8 columns, but there is room for 7. Ask for less, or for a larger max_length"),
        ({"max_new_tokens": 131072}, "need 131077 columns, but there is room for 131072"),
    ],
)
def test_a_batch_that_makes_no_sense_is_refused(changes, message):
    settings = {"prompt_lengths": [5, 3], "page_size": 16, "max_new_tokens": 3} | changes
    with pytest.raises(ValueError, match=message):
        audit_batch(random_model(), settings.pop("prompt_lengths"), **settings)


def test_the_command_prints_writes_and_draws(tmp_path, capsys):
    path, folder = tmp_path / "audit.json", tmp_path / "plots"
    arguments = ["audit", "--random-llama", "--page-size", "16,32", "--prompt-lengths", "5,40", "--max-new-tokens"]
    arguments += ["3", "--json", str(path), "--plot", str(folder)]
    assert main(arguments) == 0
    results = json.loads(path.read_text())
    assert results["command"] == " ".join(["hf-paged", *arguments])
    assert results["settings"]["prompt_lengths"] == [5, 40]
    assert {"machine", "versions", "commit", "num_threads"} <= set(results)
    assert [each["page_size"] for each in results["audit"]] == [16, 32]
    small, large = ([step for step in each["steps"] if step["event"] == "pass"] for each in results["audit"])
    assert [step["tokens"] for step in small] == [step["tokens"] for step in large] == [45, 47, 49]
    assert sorted(picture.name for picture in folder.iterdir()) == ["audit-16.svg", "audit-32.svg"]
    printed = capsys.readouterr().out
    assert re.search(r"page size +moment +tokens +minimum, MiB +live, MiB +active, MiB +wasted, MiB", printed)
    assert re.search(r"32 +active", printed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--page-size", "16,17"], "page_size=17 was asked for"),
        (["gpt2"], "model='gpt2' was asked for beside random_llama"),
        (["--prompt-lengths", "9", "--max-length", "10"], "there is room for 10"),
    ],
)
def test_a_mistake_is_said_without_a_traceback(capsys, arguments, message):
    assert main(["audit", *arguments, "--random-llama"]) == 2
    assert message in capsys.readouterr().err
