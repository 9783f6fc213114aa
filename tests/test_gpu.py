"""The same on a CUDA device. Where there is none, these say nothing about it."""

import threading
from contextlib import nullcontext

import pytest
import torch
from transformers import DynamicCache

from hf_paged import PagedCache, PagePool, ReleaseFinished, compiled, sample
from hf_paged.pages.tiers.speeds import Speeds
from hf_paged.tools.evaluation.audit import MemoryAudit
from tests.families import FAMILIES
from tests.models import generate, left_padded, plain, random_ids, run, tiny_gemma, tiny_llama

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("page_size", [16, 128])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_logits_match_those_of_sdpa(page_size, num_rows):
    model, ids = tiny_llama().cuda(), random_ids(num_rows, 200).cuda()
    splits = [100] + [1] * 40 + [60]
    expected = plain(model, ids, splits)
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=page_size)
    torch.testing.assert_close(run(model, cache, ids, splits), expected, atol=1e-2, rtol=1e-2)
    cache.pool.check_integrity()


@pytest.mark.parametrize("disable_compile", [True, False], ids=["eager", "compiled"])
def test_a_ragged_batch_generates_the_same_tokens(disable_compile):
    model, ids = tiny_llama().cuda(), random_ids(4, 40).cuda()
    mask = left_padded(40, [40, 3, 17, 31]).cuda()
    expected = generate(model, "sdpa", DynamicCache(config=model.config), ids, attention_mask=mask)
    cache = PagedCache.from_model(model, page_size=16, num_pages=32)
    actual = generate(model, "paged_flex", cache, ids, attention_mask=mask, disable_compile=disable_compile)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", ["Mistral", "Gemma 2", "GPT-OSS", "Gemma 3n"])
def test_windows_softcap_and_sinks_give_what_they_give_without_pages(name):
    (family,) = (family for family in FAMILIES if family.name == name)
    model, ids, splits = family.load(family.oracle).cuda(), random_ids(3, 100).cuda(), [40] + [1] * 20 + [40]
    mask = left_padded(100, [100, 71, 90]).cuda()
    expected = run(model, DynamicCache(config=model.config), ids, splits, mask)
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    logits = run(model, cache, ids, splits, mask)
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], atol=1e-2, rtol=1e-2)
    cache.pool.check_integrity()


def test_beams_and_released_rows_leave_the_tokens_as_they_are():
    model, ids = tiny_llama().cuda(), random_ids(2, 40).cuda()
    expected = generate(model, "sdpa", DynamicCache(config=model.config), ids, num_beams=3)
    assert torch.equal(generate(model, "paged_flex", PagedCache.from_model(model), ids, num_beams=3), expected)
    expected = generate(model, "sdpa", DynamicCache(config=model.config), ids)
    settings = {"eos_token_id": int(expected[0, 45])}
    expected = generate(model, "sdpa", DynamicCache(config=model.config), ids, **settings)
    cache = PagedCache.from_model(model, page_size=16)
    finished = [ReleaseFinished(cache, settings["eos_token_id"])]
    actual = generate(model, "paged_flex", cache, ids, stopping_criteria=finished, **settings)
    assert torch.equal(actual, expected)
    assert cache.lengths[0] == 0


SAMPLES = {"greedy": {}, "samples": {"do_sample": True, "top_k": 30, "temperature": 1.5, "num_return_sequences": 2}}


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("mode", SAMPLES)
def test_a_loop_that_is_a_step_ahead_gives_the_same(mode, is_compiled):
    model, ids, mask = tiny_llama().cuda(), random_ids(3, 40).cuda(), left_padded(40, [40, 3, 17]).cuda()
    model.set_attn_implementation("paged_flex")
    asked = []

    def ends_at_multiples_of_seven(input_ids, scores, **kwargs):
        asked.append(input_ids.tolist())
        return torch.tensor([row[-1] % 7 == 0 for row in input_ids.tolist()], device=input_ids.device)

    results = []
    for loop in ({}, {"custom_generate": sample}):
        cache = PagedCache.from_model(model, page_size=16, num_pages=64)
        settings = {"eos_token_id": list(range(3, 10)), "disable_compile": not is_compiled, "max_new_tokens": 60}
        criteria = [ends_at_multiples_of_seven, ReleaseFinished(cache, list(range(3, 10)))]
        torch.manual_seed(0)
        with compiled(model) if is_compiled else nullcontext():
            tokens = generate(
                model,
                "paged_flex",
                cache,
                ids,
                attention_mask=mask,
                stopping_criteria=criteria,
                **settings,
                **SAMPLES[mode],
                **loop,
            )
        results.append((tokens.tolist(), list(asked), cache.lengths, torch.cuda.get_rng_state().tolist()))
        cache.pool.check_integrity()
        asked.clear()
    assert results[0] == results[1]


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("mode", SAMPLES)
def test_a_step_of_the_loop_waits_for_nothing(mode, is_compiled):
    model, ids, mask = tiny_llama().cuda(), random_ids(3, 40).cuda(), left_padded(40, [40, 3, 17]).cuda()
    model.set_attn_implementation("paged_flex")

    def watch(input_ids, scores):
        torch.cuda.set_sync_debug_mode("error" if 44 <= input_ids.shape[1] < 75 else "default")
        return scores

    cache = PagedCache.from_model(model, page_size=16, num_pages=64)
    settings = {"eos_token_id": 199, "disable_compile": not is_compiled, "max_new_tokens": 40}
    try:
        with compiled(model) if is_compiled else nullcontext():
            for is_watched in (False, True):  # the first time, kernels are compiled and steps captured
                cache.reset()
                criteria = [ReleaseFinished(cache, 199)]
                generate(
                    model,
                    "paged_flex",
                    cache,
                    ids,
                    attention_mask=mask,
                    stopping_criteria=criteria,
                    logits_processor=[watch] if is_watched else [],
                    custom_generate=sample,
                    **settings,
                    **SAMPLES[mode],
                )
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_the_accounting_reserves_is_allocated():
    model = tiny_llama().cuda()
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    with MemoryAudit(model, cache) as audit:
        run(model, cache, random_ids(2, 300).cuda(), [100, 200])
    assert audit.summary()["agrees"]
    for step in audit.steps:
        assert step.residence.resident_bytes == step.pool.reserved_bytes
        assert step.process_bytes >= step.pool.reserved_bytes


def test_float64_is_computed_in_float64():
    model, ids = tiny_llama().double().cuda(), random_ids(2, 60).cuda()
    splits = [30] + [1] * 10 + [20]
    expected = plain(model, ids, splits)
    model.set_attn_implementation("paged_flex")
    actual = run(model, PagedCache.from_model(model, page_size=16), ids, splits)
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-8)


def test_padding_at_the_end_of_a_second_turn_is_what_it_is_without_pages():
    model, ids = tiny_llama().cuda(), random_ids(3, 32).cuda()
    mask = (torch.arange(32) < torch.tensor([32, 19, 17])[:, None]).long().cuda()
    expected = plain(model, ids, [16, 16], mask)
    model.set_attn_implementation("paged_flex")
    actual = run(model, PagedCache.from_model(model, page_size=16), ids, [16, 16], mask)
    torch.testing.assert_close(actual, expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_layers_left_out_hold_nothing(is_compiled):
    model, ids = tiny_llama(num_layers=4).cuda(), random_ids(1, 20).cuda()
    model.model.layers[1].forward = lambda hidden_states, **kwargs: hidden_states
    expected = generate(model, "sdpa", None, ids, use_cache=False)
    model.set_attn_implementation("paged_flex")
    with compiled(model) if is_compiled else nullcontext():
        for _ in range(2):  # the second time from recorded steps
            cache = PagedCache.from_model(model, page_size=16)
            assert torch.equal(generate(model, "paged_flex", cache, ids), expected)
    assert cache.gather(1) == (None, None)


@pytest.mark.parametrize(
    "arguments", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": 1}], ids=["lookup", "draft"]
)
@pytest.mark.parametrize("is_compiled", [False, True], ids=["as it is", "compiled"])
def test_drafts_keep_the_tokens_and_need_few_graphs(arguments, is_compiled):
    model = tiny_llama().cuda()
    if "assistant_model" in arguments:
        arguments = {"assistant_model": tiny_llama(num_layers=1).cuda()}
    model.set_attn_implementation("paged_flex")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with compiled(model) if is_compiled else nullcontext():
        for length in (20, 40, 60, 75):
            ids = random_ids(1, length // 5, seed=length).repeat(1, 5).cuda()
            expected = generate(model, "sdpa", DynamicCache(config=model.config), ids, **arguments)
            cache = PagedCache.from_model(model, page_size=16)
            assert torch.equal(generate(model, "paged_flex", cache, ids, **arguments), expected)
    num_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    print("graphs:", num_graphs, dict(torch._dynamo.utils.counters["frames"]))
    assert num_graphs <= 12  # the kernels of attention among them


def test_threads_that_share_a_pool_generate_while_another_compiles():
    model = tiny_llama().cuda()
    prompts = [random_ids(1, 10 + 7 * index, seed=index).cuda() for index in range(4)]
    expected = [generate(model, "sdpa", DynamicCache(config=model.config), ids) for ids in prompts]
    model.set_attn_implementation("paged_flex")
    pool, failures, is_over = PagePool(model.config, page_size=16), [], threading.Event()

    def use(index):
        while not is_over.is_set():
            try:
                cache = PagedCache(pool=pool)
                # Before torch 2.15 no compiled step can be called while another thread compiles.
                tokens = generate(model, "paged_flex", cache, prompts[index], disable_compile=True)
                if not torch.equal(tokens, expected[index]):
                    failures.append(f"other tokens in thread {index}")
            except Exception as error:
                failures.append(repr(error))

    threads = [threading.Thread(target=use, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for size in range(32, 36):
        layers = torch.nn.Sequential(*(torch.nn.Linear(size, size) for _ in range(3))).cuda()
        torch.compile(layers)(torch.randn(3, size, device="cuda"))
    is_over.set()
    for thread in threads:
        thread.join()
    assert not failures, failures[:3]
    pool.check_integrity()


def test_what_is_done_to_keys_and_values_counts():
    model, ids = tiny_llama().cuda(), random_ids(2, 30).cuda()
    logits = []
    for attention, new in (("sdpa", DynamicCache), ("paged_flex", lambda config: PagedCache(config, page_size=16))):
        model.set_attn_implementation(attention)
        cache = new(config=model.config)
        run(model, cache, ids[:, :20], [20])
        for layer in cache.layers:
            layer.values[:, :, 3:6] = 0
            layer.keys = layer.keys * 1.5
        logits.append(run(model, cache, ids[:, 20:], [10]))
    torch.testing.assert_close(*logits, atol=1e-2, rtol=1e-2)


def test_a_prompt_that_cannot_be_packed_is_computed_as_generate_does():
    model, ids = tiny_llama().cuda(), random_ids(3, 40).cuda()
    mask = left_padded(40, [40, 3, 17]).cuda()
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: output * 1.01)
    expected = generate(model, "sdpa", DynamicCache(config=model.config), ids, attention_mask=mask)
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    cache.prefill(model, ids, mask)
    assert torch.equal(generate(model, "paged_flex", cache, ids, attention_mask=mask), expected)
    with pytest.raises(ValueError, match="The cache holds another prompt"):
        generate(model, "paged_flex", cache, torch.cat([ids + 1, ids, ids], dim=1))


@pytest.mark.parametrize("load", [tiny_llama, lambda: tiny_gemma(24)], ids=["Llama", "Gemma"])
def test_prefixes_and_caches_come_back_from_the_host(load, monkeypatch):
    monkeypatch.setattr(Speeds, "seconds_to_compute", lambda speeds, num_tokens: float(num_tokens))
    model, prompts = load().cuda(), [random_ids(1, 150, seed=seed).cuda() for seed in range(3)]
    expected = [generate(model, "sdpa", DynamicCache(config=model.config), ids) for ids in prompts]
    model.set_attn_implementation("paged_flex")
    pool = PagePool.from_model(model, 24, 16, prefix_cache=True, host_bytes=2**24)
    for _ in range(3):
        for ids, tokens in zip(prompts, expected, strict=True):
            with PagedCache(pool=pool) as cache:
                cache.prefill(model, ids)
                cache.swap_out()
                assert torch.equal(generate(model, "paged_flex", cache, ids), tokens)
            pool.check_integrity()
    assert pool.stats().num_promoted_pages > 0
