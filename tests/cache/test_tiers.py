"""Prefixes that have left their device: where they come back from, no token is another one."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

import hf_paged
from hf_paged import OutOfPagesError, PagedCache, PagePool, PrefixStore
from hf_paged.batch.prompt.packed_prompt import PackedPrompt
from hf_paged.pages.tiers.host import HostTier
from hf_paged.pages.tiers.speeds import Speeds
from tests.cache.test_prefix_cache import MODELS, go_on, paged, prefilled
from tests.cache.test_random_prefixes import NUM_PAGES, RANDOM, PrefixMachine, WindowedPrefixMachine
from tests.models import left_padded, plain_tokens, random_ids, tiny_gemma, tiny_llama

pytestmark = pytest.mark.usefixtures("quick_collection")

MIB = 2**20
NUM_NEW = 12


@pytest.fixture(autouse=True)
def _computing(monkeypatch):
    """Whatever is measured, a token seems to take a second, so that what is brought doesn't depend on the machine."""
    monkeypatch.setattr(Speeds, "seconds_to_compute", lambda speeds, num_tokens: float(num_tokens))


@pytest.fixture(params=MODELS)
def model(request):
    return paged(MODELS[request.param]())


@pytest.fixture
def llama():
    return paged(tiny_llama())


def pool_for(model, num_pages=24, host_bytes=8 * MIB, **arguments):
    return PagePool.from_model(model, num_pages, 16, prefix_cache=True, host_bytes=host_bytes, **arguments)


def answer(model, pool, ids, mask=None, **arguments):
    """What is generated behind a prompt; its pages are given back."""
    with PagedCache(pool=pool, **arguments) as cache:
        cache.prefill(model, ids, mask)
        tokens = go_on(model, cache, ids, mask)
    pool.check_integrity()
    return tokens


def expected(model, ids, mask=None):
    arguments = {} if mask is None else {"attention_mask": mask}
    tokens = plain_tokens(model, ids, max_new_tokens=NUM_NEW, **arguments)
    model.set_attn_implementation("paged_flex")
    return tokens


def test_a_prompt_goes_on_from_pages_that_were_brought_back(model):
    pool, ids = pool_for(model), random_ids(1, 150)
    first = answer(model, pool, ids)
    answer(model, pool, random_ids(1, 300, seed=1))
    stats = pool.stats()
    assert stats.num_demoted_pages == stats.num_evicted_pages > 0
    assert stats.host_bytes > 0
    assert torch.equal(answer(model, pool, ids), first)
    assert torch.equal(first, expected(model, ids))
    stats = pool.stats()
    assert stats.num_promoted_pages > 0
    assert stats.num_hit_tokens == 144


def test_rows_of_a_batch_share_what_is_brought_back(model):
    pool, ids = pool_for(model, 48), random_ids(1, 100)
    answer(model, pool, ids)
    answer(model, pool, random_ids(1, 700, seed=1))
    rows = torch.cat([ids.expand(4, -1), random_ids(4, 20, seed=2)], dim=1)
    rows[3, 30:] = random_ids(1, 90, seed=3)
    mask = left_padded(120, [120, 120, 120, 110])
    rows[3] = rows[3].roll(10)
    assert torch.equal(answer(model, pool, rows, mask), expected(model, rows, mask))
    num_brought = pool.stats().num_promoted_pages
    assert 0 < num_brought <= (6 + 1) * len(pool.groups)


def test_a_conversation_goes_on_though_its_pages_were_evicted_in_between(model):
    pool, ids = pool_for(model), random_ids(1, 60)
    whole = ids
    for turn in range(4):
        whole = answer(model, pool, whole)
        assert torch.equal(whole, expected(model, ids))
        answer(model, pool, random_ids(1, 300, seed=turn + 1))
        whole = ids = torch.cat([whole, random_ids(1, 9, seed=turn + 10)], dim=1)
    assert pool.stats().num_promoted_pages > 0


def test_what_the_loop_has_generated_is_brought_back(llama):
    pool, ids = pool_for(llama), random_ids(1, 60)
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "custom_generate": hf_paged.sample}
    for seed in (0, 1, 0):
        ids = random_ids(1, 250, seed=seed)
        tokens = llama.generate(ids, past_key_values=PagedCache(pool=pool), max_new_tokens=20, **settings)
        assert torch.equal(tokens, plain_tokens(llama, ids, max_new_tokens=20))
        llama.set_attn_implementation("paged_flex")
    assert pool.stats().num_promoted_pages > 0


def test_tenants_share_nothing_on_the_host_either(llama):
    pool, ids = pool_for(llama), random_ids(1, 100)
    answer(llama, pool, ids, salt="one")
    answer(llama, pool, random_ids(1, 300, seed=1))
    answer(llama, pool, ids, salt="other")
    assert pool.stats().num_promoted_pages == 0
    answer(llama, pool, ids, salt="one")
    assert pool.stats().num_promoted_pages > 0


def test_pages_of_weights_that_were_changed_are_not_brought_back(llama):
    pool, ids = pool_for(llama), random_ids(1, 100)
    answer(llama, pool, ids)
    answer(llama, pool, random_ids(1, 300, seed=1))
    with torch.no_grad():
        llama.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    assert torch.equal(answer(llama, pool, ids), expected(llama, ids))
    assert pool.stats().num_promoted_pages == 0


def test_prefixes_that_are_to_be_forgotten_are_forgotten_on_the_host(llama):
    pool, ids = pool_for(llama), random_ids(1, 100)
    answer(llama, pool, ids)
    answer(llama, pool, random_ids(1, 300, seed=1))
    pool.forget_prefixes()
    assert pool.stats().host_bytes == 0
    answer(llama, pool, ids)
    assert pool.stats().num_hit_tokens == 0


def test_a_tier_that_is_slower_than_computing_is_not_used(llama):
    pool, ids = pool_for(llama), random_ids(1, 100)
    first = answer(llama, pool, ids)
    pool.prefix_index.tiers.speeds.note_moved("host", 1, seconds=1e6)
    answer(llama, pool, random_ids(1, 300, seed=1))
    assert torch.equal(answer(llama, pool, ids), first)
    assert pool.stats().num_promoted_pages == 0


def test_how_long_a_prompt_took_is_measured(llama, monkeypatch):
    monkeypatch.undo()
    pool = pool_for(llama)
    answer(llama, pool, random_ids(1, 100))
    assert 0 < pool.prefix_index.tiers.speeds.seconds_to_compute(1) < 60


def test_a_pass_that_fails_behind_pages_that_were_brought_back_leaks_none(model, monkeypatch):
    pool, ids = pool_for(model), random_ids(1, 150)
    first = answer(model, pool, ids)
    answer(model, pool, random_ids(1, 300, seed=1))
    cache = PagedCache(pool=pool)

    def fail(packed):
        raise MemoryError("no room for activations")

    with monkeypatch.context() as patch:
        patch.setattr(PackedPrompt, "end", fail)
        with pytest.raises(MemoryError, match="no room for activations"):
            cache.prefill(model, ids)
    assert pool.stats().num_promoted_pages > 0
    assert pool.stats().num_active_pages == 0
    pool.check_integrity()
    assert torch.equal(answer(model, pool, ids), first)


def test_a_prompt_that_is_there_to_its_last_page_is_computed_no_more(llama):
    pool, ids = pool_for(llama), random_ids(2, 65)
    ids[1] = ids[0]
    first = answer(llama, pool, ids)
    answer(llama, pool, random_ids(1, 370, seed=1))
    with PagedCache(pool=pool) as cache:
        cache.prefill(llama, ids)
        assert pool.stats().num_promoted_pages == 4
        assert torch.equal(go_on(llama, cache, ids), first)


def test_the_host_keeps_what_it_may_and_the_store_the_rest(llama):
    store = HostTier(64 * MIB)
    pool = pool_for(llama, host_bytes=40_000, store=store)
    prompts = [random_ids(1, 150, seed=seed) for seed in range(4)]
    answers = [answer(llama, pool, ids) for ids in prompts]
    for _ in range(2):
        for ids, first in zip(prompts, answers, strict=True):
            assert torch.equal(answer(llama, pool, ids), first)
            assert pool.stats().host_bytes <= 40_000
    assert pool.stats().store_bytes == store.num_bytes > 40_000


def test_rows_that_are_swapped_out_come_before_prefixes(llama):
    ids = random_ids(1, 100)
    pool = pool_for(llama, host_bytes=12 * 8192)
    cache = prefilled(llama, pool, ids)
    answer(llama, pool, random_ids(1, 240, seed=1))
    answer(llama, pool, random_ids(1, 240, seed=2))
    assert pool.stats().host_bytes > 5 * 8192
    cache.swap_out()
    assert pool.stats().swapped_bytes == 7 * 8192
    assert pool.stats().host_bytes <= 5 * 8192
    assert torch.equal(go_on(llama, cache, ids), expected(llama, ids))


# Between processes


@pytest.mark.parametrize("host_bytes", [0, 40_000, 8 * MIB])
def test_another_pool_and_model_find_what_was_stored(model, host_bytes, tmp_path, request):
    ids = random_ids(1, 150)
    pool = pool_for(model, host_bytes=host_bytes, store=PrefixStore(tmp_path, 64 * MIB))
    first = answer(model, pool, ids)
    answer(model, pool, random_ids(1, 200, seed=1))
    pool.store_prefixes()
    other = paged(MODELS[request.node.callspec.params["model"]]())
    pool = pool_for(other, store=PrefixStore(tmp_path, 64 * MIB))
    assert torch.equal(answer(other, pool, ids), first)
    stats = pool.stats()
    assert stats.num_hit_tokens == 144
    assert 0 < stats.num_promoted_pages == stats.num_active_pages + stats.num_cached_pages


def test_pages_that_were_evicted_are_stored_behind_the_scenes(llama, tmp_path):
    store = PrefixStore(tmp_path, 64 * MIB)
    pool = pool_for(llama, host_bytes=0, store=store)
    ids = random_ids(1, 150)
    first = answer(llama, pool, ids)
    answer(llama, pool, random_ids(1, 370, seed=1))
    pool.prefix_index.tiers.tiers["store"].flush()
    assert pool.stats().store_bytes == store.num_bytes > 9 * 8192
    assert torch.equal(answer(llama, pool, ids), first)
    assert pool.stats().num_promoted_pages == 9


def unlike(change):
    model = paged(tiny_llama())
    with torch.no_grad():
        change(model)
    return model


CHANGES = {
    "a weight": lambda model: model.model.layers[1].mlp.up_proj.weight[3].mul_(1.01),
    "a setting of a module": lambda model: setattr(model.model.layers[1].self_attn, "scaling", 0.3),
    "the configuration": lambda model: setattr(model.config, "rms_norm_eps", 1e-3),
    "another class of module": lambda model: setattr(model.model.layers[1].mlp, "act_fn", torch.nn.ReLU()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_model_finds_nothing_in_a_store_that_another_has_computed(llama, change, tmp_path):
    ids = random_ids(1, 150)
    pool = pool_for(llama, store=PrefixStore(tmp_path, 64 * MIB))
    answer(llama, pool, ids)
    pool.store_prefixes()
    other = unlike(change)
    pool = pool_for(other, store=PrefixStore(tmp_path, 64 * MIB))
    assert torch.equal(answer(other, pool, ids), expected(other, ids))
    assert pool.stats().num_promoted_pages == 0


def test_tenants_share_no_store_and_their_salts_are_not_in_it(llama, tmp_path):
    ids = random_ids(1, 150)
    pool = pool_for(llama, store=PrefixStore(tmp_path, 64 * MIB))
    answer(llama, pool, ids, salt="a secret of one")
    pool.store_prefixes()
    for salt, num_brought in (("another", 0), (None, 0), ("a secret of one", 9)):
        pool = pool_for(llama, store=PrefixStore(tmp_path, 64 * MIB))
        answer(llama, pool, ids, salt=salt)
        assert pool.stats().num_promoted_pages == num_brought
    assert not any(b"secret" in path.read_bytes() for path in tmp_path.rglob("*.safetensors"))


def test_passes_under_autocast_find_only_their_own(llama, tmp_path):
    ids = random_ids(1, 150)
    for dtype, num_brought in ((None, 0), (torch.bfloat16, 0), (torch.bfloat16, 9), (None, 9)):
        pool = pool_for(llama, store=PrefixStore(tmp_path, 64 * MIB))
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None), PagedCache(pool=pool) as cache:
            cache.prefill(llama, ids)
            assert pool.stats().num_promoted_pages == num_brought
        pool.store_prefixes()


def test_a_damaged_store_is_computed_anew(llama, tmp_path):
    ids = random_ids(1, 150)
    pool = pool_for(llama, store=PrefixStore(tmp_path, 64 * MIB))
    first = answer(llama, pool, ids)
    pool.store_prefixes()
    for number, path in enumerate(sorted(tmp_path.rglob("*.safetensors"))):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content[: len(content) - number % 2])
    pool = pool_for(llama, store=PrefixStore(tmp_path, 64 * MIB))
    assert torch.equal(answer(llama, pool, ids), first)
    assert pool.stats().num_promoted_pages == 0


def test_storing_leaves_the_order_in_which_prefixes_are_evicted(llama, tmp_path):
    pool = pool_for(llama, store=PrefixStore(tmp_path, 64 * MIB))
    for seed in range(3):
        answer(llama, pool, random_ids(1, 60, seed=seed))
    answer(llama, pool, random_ids(1, 60))
    allocator = pool.groups[0].allocator
    order = allocator.oldest_cached(24)
    assert len(order) == 9
    pool.store_prefixes()
    assert allocator.oldest_cached(24) == order
    pool.check_integrity()


def test_a_pool_without_a_store_says_how_to_get_one(llama):
    with pytest.raises(ValueError, match=r"store=PrefixStore\(folder, max_bytes\)"):
        pool_for(llama).store_prefixes()


@pytest.mark.parametrize("host_bytes", [0, MIB])
def test_a_store_takes_a_prefix_cache(llama, host_bytes):
    with pytest.raises(ValueError, match="A store was given to a pool that finds no prefixes"):
        PagePool.from_model(llama, 8, 16, host_bytes=host_bytes, store=HostTier(MIB))


class TieredPrefixMachine(PrefixMachine):
    """Random requests whose pages are evicted to the host and the store, and caches that are swapped out."""

    @initialize()
    def build(self):
        super().build()
        self.pool = pool_for(self.model, NUM_PAGES, MIB, store=HostTier(20_000))

    def pick(self, which):
        entry = super().pick(which)
        try:
            entry[0].swap_in()
        except OutOfPagesError:
            for cache, *_ in self.caches:
                cache.swap_out()
            entry[0].swap_in()
        return entry

    @precondition(lambda self: self.caches)
    @rule(which=st.integers(0, 3))
    def swap_out(self, which):
        cache, held, *_ = self.pick(which)
        cache.swap_out()
        assert (cache.stats().swapped_bytes > 0) == any(held)

    @invariant()
    def caches_hold_what_their_tokens_make(self):
        caches = self.caches
        self.caches = [entry for entry in caches if entry[0].stats().swapped_bytes == 0]
        super().caches_hold_what_their_tokens_make()
        self.caches = caches

    def teardown(self):
        for which in range(len(getattr(self, "caches", []))):
            self.pick(which)
            self.caches_hold_what_their_tokens_make()


class TieredWindowedPrefixMachine(TieredPrefixMachine, WindowedPrefixMachine):
    """The same with windows."""


TestTieredPrefixes = TieredPrefixMachine.TestCase
TestTieredPrefixes.settings = RANDOM
TestTieredWindowedPrefixes = TieredWindowedPrefixMachine.TestCase
TestTieredWindowedPrefixes.settings = RANDOM


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("restless_threads")
@pytest.mark.parametrize("load", [tiny_llama, lambda: tiny_gemma(24)], ids=["Llama", "Gemma"])
def test_threads_that_generate_get_their_own_tokens(load):
    """In a pool for a third of them."""
    model = paged(load())
    pool = pool_for(model, 20, host_bytes=60_000, store=HostTier(MIB))
    prefixes = [random_ids(1, 80, seed=seed) for seed in range(3)]
    prompts = [torch.cat([prefixes[n % 3], random_ids(1, 5 + n, seed=n)], dim=1) for n in range(6)]
    answers = [expected(model, ids) for ids in prompts]
    start, num_answered = threading.Barrier(4), [0] * 4

    def work(number):
        random_ = random.Random(number)
        start.wait()
        for _ in range(8):
            which = random_.randrange(len(prompts))
            try:
                with PagedCache(pool=pool) as cache:
                    cache.prefill(model, prompts[which])
                    if random_.random() < 0.3:
                        cache.swap_out()
                    assert torch.equal(go_on(model, cache, prompts[which]), answers[which])
                    num_answered[number] += 1
            except OutOfPagesError:
                pass

    with ThreadPoolExecutor(4) as executor:
        for future in [executor.submit(work, number) for number in range(4)]:
            future.result()
    pool.check_integrity()
    stats = pool.stats()
    assert (stats.num_active_pages, stats.swapped_bytes) == (0, 0)
    assert sum(num_answered) > 8
    assert stats.num_promoted_pages > 0
