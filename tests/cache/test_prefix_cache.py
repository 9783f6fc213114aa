"""Prompts that begin alike, in one pool: what is found is not computed, and changes no token."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BartConfig, MistralConfig, MistralForCausalLM
from transformers.generation.streamers import BaseStreamer

import hf_paged
from hf_paged import OutOfPagesError, PagedCache, PagePool
from hf_paged._transformers import CACHE
from hf_paged.batch.sequences import Sequences
from tests.models import letter_tokenizer, letters, plain_tokens, random_ids, tiny_gemma, tiny_llama, tiny_model

PAGE_SIZE = 16
NUM_NEW = 12


def mistral(window=24):
    return tiny_model(MistralForCausalLM, MistralConfig, sliding_window=window)


MODELS = {
    "llama": tiny_llama,
    "windows beside full layers": lambda: tiny_gemma(24),
    "windows within a page": lambda: tiny_gemma(8),
    "windows alone": mistral,
}


@pytest.fixture(params=MODELS)
def model(request):
    return paged(MODELS[request.param]())


@pytest.fixture
def llama():
    return paged(tiny_llama())


def paged(model):
    model.set_attn_implementation("paged_flex")
    return model


def pool_for(model, num_pages=256, page_size=PAGE_SIZE):
    return PagePool.from_model(model, num_pages, page_size, prefix_cache=True)


def prefilled(model, pool, ids, mask=None, **arguments):
    cache = PagedCache(pool=pool, **arguments)
    cache.prefill(model, ids, mask)
    return cache


def go_on(model, cache, ids, mask=None, **arguments):
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": NUM_NEW}
    model.set_attn_implementation("paged_flex")
    return model.generate(ids, attention_mask=mask, **{CACHE: cache}, **(settings | arguments))


def expected(model, ids, mask=None, **arguments):
    tokens = plain_tokens(model, ids, attention_mask=mask, **({"max_new_tokens": NUM_NEW} | arguments))
    model.set_attn_implementation("paged_flex")
    return tokens


def alike(num_rows, num_columns, num_common, seed=0):
    """Rows that begin with the same tokens and then go apart."""
    ids = random_ids(num_rows, num_columns, seed)
    ids[:, :num_common] = ids[0, :num_common].clone()
    return ids


@pytest.mark.parametrize("num_common", [0, 1, 15, 16, 17, 63, 64, 65, 99])
def test_a_second_prompt_computes_what_the_first_one_has_not(model, num_common):
    pool = pool_for(model)
    ids = alike(2, 100, num_common)
    first = prefilled(model, pool, ids[:1])
    second = prefilled(model, pool, ids[1:])
    assert pool.stats().num_hit_tokens == num_common // PAGE_SIZE * PAGE_SIZE
    for cache, row in ((first, ids[:1]), (second, ids[1:])):
        assert torch.equal(go_on(model, cache, row), expected(model, row))
    pool.check_integrity()


def test_pages_that_nobody_holds_any_more_are_found(model):
    pool = pool_for(model)
    ids = alike(2, 100, 80)
    prefilled(model, pool, ids[:1]).reset()
    assert pool.stats().num_active_pages == 0
    assert pool.stats().num_cached_pages > 0
    cache = prefilled(model, pool, ids[1:])
    assert pool.stats().num_hit_tokens == 80
    assert torch.equal(go_on(model, cache, ids[1:]), expected(model, ids[1:]))
    pool.check_integrity()


@pytest.mark.parametrize("padding_side", ["left", "right", "scattered"])
def test_each_row_of_a_padded_batch_finds_its_own_beginning(model, padding_side):
    pool = pool_for(model)
    ids = alike(4, 100, 70)
    prefilled(model, pool, ids[:1])
    mask = torch.ones_like(ids)
    if padding_side == "left":
        mask[1, :30] = 0
        ids[1, 30:] = ids[0, :70].clone()
    elif padding_side == "right":
        mask[1, 60:90] = 0
        mask[2, 40:99] = 0
    else:
        mask[1, 33:60] = 0
        mask[2, :10] = 0
        mask[2, 50:70] = 0
    cache = prefilled(model, pool, ids, mask)
    assert pool.stats().num_hit_tokens > 0
    assert torch.equal(go_on(model, cache, ids, mask), expected(model, ids, mask))
    pool.check_integrity()


def test_rows_of_one_batch_compute_a_common_beginning_once(model):
    pool = pool_for(model)
    ids = alike(5, 140, 100)
    ids[3:, :120] = ids[3, :120].clone()  # two of them go on together
    cache = prefilled(model, pool, ids)
    assert pool.stats().num_hit_tokens == 4 * 96
    assert torch.equal(go_on(model, cache, ids), expected(model, ids))
    pool.check_integrity()


def test_a_tree_of_prompts_is_held_once(llama):
    pool = pool_for(llama)
    ids = alike(4, 257, 96)
    ids[2:, :192] = ids[2, :192].clone()
    cache = prefilled(llama, pool, ids)
    # 6 pages of all, 10 of each of the first two, 6 of the other two together, and 4 of each of these.
    assert cache.stats().num_active_pages == 6 + 2 * 10 + 6 + 2 * 4
    assert torch.equal(go_on(llama, cache, ids), expected(llama, ids))


def test_a_prompt_that_is_found_whole_computes_nothing(llama):
    pool = pool_for(llama)
    ids = random_ids(3, 97)
    prefilled(llama, pool, ids)
    with FlopCounterMode(display=False) as counter:
        again = prefilled(llama, pool, ids)
    assert counter.get_total_flops() == 0
    assert pool.stats().num_hit_tokens == 3 * 96
    assert torch.equal(go_on(llama, again, ids), expected(llama, ids))


def test_chunks_are_found_too(model):
    pool = pool_for(model)
    ids = alike(3, 150, 90)
    for row in range(3):
        cache = PagedCache(pool=pool)
        cache.prefill(model, ids[row : row + 1], max_tokens=20)
        assert torch.equal(go_on(model, cache, ids[row : row + 1]), expected(model, ids[row : row + 1]))
    assert pool.stats().num_hit_tokens == 2 * 80
    pool.check_integrity()


@pytest.mark.parametrize("page_size", [16, 32, 128])
def test_page_sizes(llama, page_size):
    pool = pool_for(llama, page_size=page_size)
    ids = alike(2, 400, 300)
    for row in (ids[:1], ids[1:]):
        assert torch.equal(go_on(llama, prefilled(llama, pool, row), row), expected(llama, row))
    assert pool.stats().num_hit_tokens == 300 // page_size * page_size


def test_a_pool_without_index_computes_everything(llama):
    pool = PagePool.from_model(llama, 64, PAGE_SIZE)
    ids = alike(2, 100, 80)
    for row in (ids[:1], ids[1:]):
        prefilled(llama, pool, row)
    assert (pool.stats().num_looked_up_tokens, pool.stats().num_cached_pages) == (0, 0)


# Who finds what


def test_tenants_with_different_salts_share_no_page(llama):
    pool = pool_for(llama)
    ids = random_ids(1, 100)
    caches = [prefilled(llama, pool, ids, salt=salt) for salt in ("one", "other", None, "one")]
    assert pool.stats().num_hit_tokens == 96  # the last one finds the first one's
    pages = [set(cache._sequences.rows.tables[0].row_pages(0)) for cache in caches]
    assert len(pages[0] | pages[1] | pages[2]) == 3 * 7
    assert len(pages[0] & pages[3]) == 6


def test_a_fork_keeps_its_salt(llama):
    pool = pool_for(llama)
    cache = PagedCache(pool=pool, salt="one").fork()
    cache.prefill(llama, random_ids(1, 100))
    prefilled(llama, pool, random_ids(1, 100))
    assert pool.stats().num_hit_tokens == 0


def test_another_model_of_the_same_shape_finds_nothing(llama):
    pool = pool_for(llama)
    other = copy.deepcopy(llama)
    ids = random_ids(1, 100)
    prefilled(llama, pool, ids)
    prefilled(other, pool, ids)
    assert pool.stats().num_hit_tokens == 0


CHANGES = {
    "an optimizer's step": lambda model: torch.optim.SGD(model.parameters(), 0.1).step(),
    "in place": lambda model: model.model.layers[1].mlp.up_proj.weight.mul_(1.5),
    "around versions": lambda model: model.model.layers[1].mlp.up_proj.weight.data.mul_(1.5),
    "another tensor": lambda model: setattr(
        model.model.layers[0].mlp.up_proj,
        "weight",
        torch.nn.Parameter(model.model.layers[0].mlp.up_proj.weight.detach() * 2),
    ),
    "other data": lambda model: setattr(
        model.model.norm.weight, "data", model.model.layers[0].input_layernorm.weight.data * 3
    ),
    "rotary embedding": lambda model: model.model.rotary_emb.inv_freq.mul_(0.5),
    "a number": lambda model: setattr(model.model.layers[0].self_attn, "scaling", 0.1),
    "state dict": lambda model: model.load_state_dict({k: v * 1.01 for k, v in model.state_dict().items()}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_was_changed_finds_nothing_of_before(llama, change):
    pool = pool_for(llama)
    ids = alike(2, 100, 90)
    prefilled(llama, pool, ids[:1])
    for parameter in llama.parameters():
        parameter.grad = torch.ones_like(parameter)
    with torch.no_grad():
        CHANGES[change](llama)
    cache = prefilled(llama, pool, ids[1:])
    assert pool.stats().num_hit_tokens == 0
    assert torch.equal(go_on(llama, cache, ids[1:]), expected(llama, ids[1:]))


def test_autocast_finds_nothing_of_without(llama):
    pool = pool_for(llama.bfloat16())
    ids = random_ids(1, 100)
    prefilled(llama, pool, ids)
    with torch.autocast("cpu", torch.bfloat16):
        prefilled(llama, pool, ids)
    assert pool.stats().num_hit_tokens == 0


def test_adapters_find_what_the_same_adapter_has_computed(llama):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama, peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj"]), "one")
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    pool = pool_for(llama)
    ids = random_ids(1, 100)
    hits = []
    for adapter in ("one", "other", "one", None, "one"):
        context = model.disable_adapter() if adapter is None else torch.no_grad()
        if adapter is not None:
            model.set_adapter(adapter)
        with context:
            cache = PagedCache(pool=pool)
            cache.prefill(model, ids, adapter_names=None)
        hits.append(pool.stats().num_hit_tokens)
    assert hits == [0, 0, 96, 96, 192]
    model.merge_adapter()
    cache = PagedCache(pool=pool)
    cache.prefill(model, ids, adapter_names=None)
    assert pool.stats().num_hit_tokens == 192


# What was generated


def test_the_next_turn_finds_what_was_generated(model):
    pool = pool_for(model)
    conversation, num_known = random_ids(1, 40), 0
    for turn in range(4):
        with PagedCache(pool=pool) as cache:
            before = pool.stats().num_hit_tokens
            cache.prefill(model, conversation)
            found = pool.stats().num_hit_tokens - before
            assert found == num_known // PAGE_SIZE * PAGE_SIZE
            answer = go_on(model, cache, conversation)
            assert torch.equal(answer, expected(model, conversation))
            cache.commit(answer)
        num_known = answer.shape[1] - 1
        conversation = torch.cat([answer, random_ids(1, 10, seed=turn)], dim=1)
    assert pool.stats().num_active_pages == 0
    pool.check_integrity()


def test_rows_that_were_released_are_found(model):
    pool = pool_for(model)
    ids = random_ids(3, 40)
    cache = PagedCache(pool=pool)

    def release_early(generated, scores):
        if generated.shape[1] == 50:
            cache.release([0, -1])
        return scores

    settings = {"custom_generate": hf_paged.sample, "max_new_tokens": 20}
    tokens = go_on(model, cache, ids, logits_processor=[release_early], **settings)
    cache.reset()
    assert torch.equal(tokens[1], expected(model, ids, max_new_tokens=20)[1])
    for row, num_found in ((0, 48), (1, 48), (2, 48)):
        before = pool.stats().num_hit_tokens
        history = torch.cat([tokens[row : row + 1, :50], random_ids(1, 9)], dim=1)
        assert torch.equal(go_on(model, prefilled(model, pool, history), history), expected(model, history))
        assert pool.stats().num_hit_tokens - before == num_found
    pool.check_integrity()


def test_a_history_that_was_changed_is_found_up_to_the_change(llama):
    pool = pool_for(llama)
    ids = random_ids(1, 100)
    prefilled(llama, pool, ids)
    ids[0, 50] = (ids[0, 50] + 1) % 100 + 3
    cache = prefilled(llama, pool, ids)
    assert pool.stats().num_hit_tokens == 48
    assert torch.equal(go_on(llama, cache, ids), expected(llama, ids))


def test_a_batch_of_beginnings_is_committed_row_by_row(model):
    pool = pool_for(model)
    ids = random_ids(3, 60)
    mask = torch.ones_like(ids)
    mask[1, :25] = 0
    cache = prefilled(model, pool, ids, mask)
    answers = go_on(model, cache, ids, mask)
    cache.commit(answers)
    row = torch.cat([answers[1:2, 25:], random_ids(1, 5)], dim=1)
    before = pool.stats().num_hit_tokens
    second = prefilled(model, pool, row)
    assert pool.stats().num_hit_tokens - before == (60 + NUM_NEW - 26) // PAGE_SIZE * PAGE_SIZE
    assert torch.equal(go_on(model, second, row), expected(model, row))


def test_the_loop_finds_and_commits_by_itself(model):
    pool = pool_for(model)
    conversation, num_known = random_ids(1, 40), 0
    for turn in range(3):
        before = pool.stats().num_hit_tokens
        answer = go_on(model, PagedCache(pool=pool), conversation, custom_generate=hf_paged.sample)
        assert pool.stats().num_hit_tokens - before == num_known // PAGE_SIZE * PAGE_SIZE
        assert torch.equal(answer, expected(model, conversation))
        num_known = answer.shape[1] - 1
        conversation = torch.cat([answer, random_ids(1, 10, seed=turn)], dim=1)
    pool.check_integrity()


def test_one_row_is_computed_in_a_single_pass(model, monkeypatch):
    pool = pool_for(model)
    ids, widths = random_ids(1, 60), []
    write = Sequences.write

    def spy(sequences, layer, keys, values):
        if layer == 0:
            widths.append(keys.shape[2])
        return write(sequences, layer, keys, values)

    monkeypatch.setattr(Sequences, "write", spy)
    for _ in range(2):
        tokens = go_on(model, PagedCache(pool=pool), ids, custom_generate=hf_paged.sample, max_new_tokens=2)
    monkeypatch.undo()
    assert widths == [60, 1, 60 - 48, 1]
    assert torch.equal(tokens, expected(model, ids, max_new_tokens=2))


@pytest.mark.parametrize("num_columns", [33, 40, 48])
def test_a_shorter_prompt_finds_whole_pages_of_a_longer_one_whose_window_begins_in_them(num_columns):
    model = paged(mistral(window=40))
    pool = PagePool.from_model(model, num_pages=30, page_size=PAGE_SIZE, prefix_cache=True)
    ids, settings = random_ids(1, 60), {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for prompt in (ids, ids[:, :num_columns]):
        with PagedCache(pool=pool) as cache:
            found = model.generate(
                prompt, past_key_values=cache, custom_generate=hf_paged.sample, max_new_tokens=NUM_NEW, **settings
            )
    assert pool.stats().num_hit_tokens == 32
    assert torch.equal(found, plain_tokens(model, prompt, max_new_tokens=NUM_NEW))


def test_a_prompt_is_found_while_its_answer_is_being_made(model):
    pool = pool_for(model)
    ids = random_ids(1, 60)
    num_hits = []

    def ask_again(generated, scores):
        if generated.shape[1] == 61:
            prefilled(model, pool, ids)
            num_hits.append(pool.stats().num_hit_tokens)
        return scores

    tokens = go_on(model, PagedCache(pool=pool), ids, custom_generate=hf_paged.sample, logits_processor=[ask_again])
    assert num_hits == [48]
    assert torch.equal(tokens, expected(model, ids))


def test_a_row_that_leaves_more_than_a_chunk_is_computed_in_chunks(model, monkeypatch):
    monkeypatch.setattr("hf_paged.cache.prompt.prefill.usual_chunk", lambda device: 32)
    pool = pool_for(model)
    ids = alike(2, 100, 50)
    for row in (ids[:1], ids[:1, :70], ids[1:]):
        tokens = go_on(model, PagedCache(pool=pool), row, custom_generate=hf_paged.sample)
        assert torch.equal(tokens, expected(model, row))
    assert pool.stats().num_hit_tokens == 64 + 48
    pool.check_integrity()


@pytest.mark.parametrize("is_known", [False, True])
def test_a_single_pass_that_fails_holds_what_was_found_and_can_be_made_again(model, is_known, monkeypatch):
    pool = pool_for(model)
    ids = random_ids(1, 60)
    if is_known:
        prefilled(model, pool, ids[:, :40])
    cache = PagedCache(pool=pool)

    def fail(sequences, layer, keys, values):
        if layer == len(pool.layers) - 1:
            raise ZeroDivisionError
        return write(sequences, layer, keys, values)

    write = Sequences.write
    monkeypatch.setattr(Sequences, "write", fail)
    with pytest.raises(ZeroDivisionError):
        go_on(model, cache, ids, custom_generate=hf_paged.sample)
    monkeypatch.undo()
    cache.roll_back()
    assert cache.lengths == ([32] if is_known else [])
    pool.check_integrity()
    assert torch.equal(go_on(model, cache, ids, custom_generate=hf_paged.sample), expected(model, ids))
    pool.check_integrity()


def test_the_loop_takes_left_padded_rows_through_the_index(model):
    pool = pool_for(model)
    ids = random_ids(3, 60)
    mask = torch.ones_like(ids)
    mask[0, :25] = 0
    for _ in range(2):
        cache = PagedCache(pool=pool)
        tokens = go_on(model, cache, ids, mask, custom_generate=hf_paged.sample)
        assert torch.equal(tokens, expected(model, ids, mask))
    assert pool.stats().num_hit_tokens == 32 + 48 + 48


def test_sampling_shares_its_prompt_and_keeps_its_tokens(llama):
    pool = pool_for(llama)
    ids = random_ids(1, 60)
    sampled = {"do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(1)
    reference = expected(llama, ids, **sampled)
    for _ in range(2):
        torch.manual_seed(1)
        tokens = go_on(llama, PagedCache(pool=pool), ids, custom_generate=hf_paged.sample, **sampled)
        assert torch.equal(tokens, reference)


def test_beams_go_on_from_what_is_found(llama):
    pool = pool_for(llama)
    ids = random_ids(1, 90)
    prefilled(llama, pool, ids)
    cache = prefilled(llama, pool, ids)
    assert torch.equal(go_on(llama, cache, ids, num_beams=4), expected(llama, ids, num_beams=4))


# What may not be found


def unfindable(model, pool, ids, how):
    cache = prefilled(model, pool, ids)
    match how:
        case "other positions":
            answer = go_on(model, cache, ids, position_ids=torch.arange(ids.shape[1])[None] + 3)
        case "an edit":
            cache.layers[0].keys[:, :, 4] += 1
            answer = go_on(model, cache, ids)
        case "an edit by set":
            keys, values = cache.gather(0)
            cache.set(0, keys, 2 * values)
            answer = go_on(model, cache, ids)
        case "a mask that hides tokens":
            mask = torch.ones_like(ids)
            mask[:, 5:9] = 0
            answer = go_on(model, cache, ids, mask)
        case "a pass of the caller's":
            ids = torch.cat([ids, random_ids(1, 1)], dim=1)
            with torch.no_grad():
                model(ids[:, -2:], **{CACHE: cache})
            answer = ids
        case "weights that were changed":
            with torch.no_grad():
                model.model.layers[0].mlp.up_proj.weight.mul_(1.1)
            answer = go_on(model, cache, ids)
        case "another attention":
            model.set_attn_implementation("sdpa")
            answer = model.generate(ids, max_new_tokens=3, do_sample=False, **{CACHE: cache})
            model.set_attn_implementation("paged_flex")
    return cache, answer


@pytest.mark.parametrize(
    "how",
    [
        "other positions",
        "an edit",
        "an edit by set",
        "a mask that hides tokens",
        "a pass of the caller's",
        "weights that were changed",
        "another attention",
    ],
)
def test_what_ids_alone_have_not_made_is_not_committed(llama, how):
    pool = pool_for(llama)
    ids = random_ids(1, 60)
    cache, answer = unfindable(llama, pool, ids, how)
    with pytest.raises(ValueError, match="may hold more than a model makes of these ids by themselves"):
        cache.commit(answer)
    pool.check_integrity()


def test_an_edit_leaves_what_others_find_as_it_was(llama):
    pool = pool_for(llama)
    ids = random_ids(1, 60)
    cache = prefilled(llama, pool, ids)
    cache.layers[0].keys[:, :, 4] += 1
    cache.crop(0)
    cache.crop(-20)  # into a page that can be found
    with torch.no_grad():
        llama(random_ids(1, 30, seed=5), **{CACHE: cache})
    second = prefilled(llama, pool, ids)
    assert pool.stats().num_hit_tokens == 48
    assert torch.equal(go_on(llama, second, ids), expected(llama, ids))
    pool.check_integrity()


def test_commit_says_what_is_wrong(llama):
    pool = pool_for(llama)
    ids = random_ids(2, 60)
    cache = prefilled(llama, pool, ids)
    for wrong in (ids[:1], ids[:, :20], ids[0], "text"):
        with pytest.raises(ValueError, match=r"commit\(\) was given .*Pass what generate\(\) returned"):
            cache.commit(wrong)
    other = ids.clone()
    other[1, 7] += 1
    with pytest.raises(ValueError, match="holds another prompt: row 1 has token"):
        cache.commit(other)
    with pytest.raises(ValueError, match="whose pool has no prefix cache"):
        PagedCache(llama.config).commit(ids)
    with pytest.raises(ValueError, match="salt='one' was given, but the pool has no prefix cache"):
        PagedCache(llama.config, salt="one")


def test_a_model_with_an_encoder_has_no_prefix_cache():
    config = BartConfig(encoder_layers=1, decoder_layers=1, d_model=16, encoder_attention_heads=2)
    with pytest.raises(ValueError, match="prefix_cache=True was asked for, but this 'bart' model has an encoder"):
        PagePool(config, prefix_cache=True)


@pytest.mark.parametrize("free", [0, 2**40])
def test_a_pool_without_a_bound_keeps_what_memory_there_is_for(llama, free, monkeypatch):
    monkeypatch.setattr("hf_paged.pages.group.free_bytes", lambda device: free)
    pool = PagePool.from_model(llama, page_size=PAGE_SIZE, prefix_cache=True)
    for seed in range(20):
        ids = random_ids(1, 100, seed)
        with prefilled(llama, pool, ids) as cache:
            go_on(llama, cache, ids)
        pool.check_integrity()
    stats = pool.stats()
    assert (stats.num_evicted_pages > 0, stats.num_pages > 100) == ((True, False) if free == 0 else (False, True))


def test_a_model_that_is_not_packed_is_not_indexed(llama, caplog):
    pool = pool_for(llama)
    llama.set_attn_implementation("sdpa")
    ids = random_ids(1, 60)
    for _ in range(2):
        prefilled(llama, pool, ids)
    assert (pool.stats().num_hit_tokens, pool.stats().num_cached_pages) == (0, 0)


# When pages run short


def test_cached_pages_make_room(model):
    pool = pool_for(model, num_pages=12)
    for seed in range(6):
        ids = random_ids(1, 100, seed)
        with prefilled(model, pool, ids) as cache:
            assert torch.equal(go_on(model, cache, ids), expected(model, ids))
        pool.check_integrity()
    assert pool.stats().num_evicted_pages > 0
    assert pool.stats().num_active_pages == 0


def test_a_prompt_that_does_not_fit_changes_nothing(model):
    pool = pool_for(model, num_pages=8)
    ids = alike(2, 90, 80)
    held = prefilled(model, pool, ids[:1])
    with pytest.raises(OutOfPagesError, match="Raise num_pages"):
        prefilled(model, pool, random_ids(3, 90, seed=3))
    pool.check_integrity()
    assert torch.equal(go_on(model, held, ids[:1]), expected(model, ids[:1]))


def test_an_exception_in_mid_prompt_holds_no_page(llama):
    pool = pool_for(llama)

    def fail(*_):
        raise KeyboardInterrupt

    fail.__module__ = "torch.fails"
    handle = llama.model.layers[1].register_forward_pre_hook(fail)
    cache = PagedCache(pool=pool)
    with pytest.raises(KeyboardInterrupt):
        cache.prefill(llama, alike(2, 100, 80))
    handle.remove()
    assert pool.stats().num_active_pages == pool.stats().num_cached_pages == 0
    pool.check_integrity()


def test_a_cache_in_a_with_statement_gives_its_pages_back(llama):
    pool = pool_for(llama)
    with pytest.raises(RuntimeError, match="on purpose"), prefilled(llama, pool, random_ids(1, 60)):
        raise RuntimeError("on purpose")
    assert pool.stats().num_active_pages == 0


def test_prefixes_can_be_forgotten(llama):
    pool = pool_for(llama)
    ids = random_ids(1, 60)
    held = prefilled(llama, pool, ids)
    pool.forget_prefixes()
    prefilled(llama, pool, ids)
    assert pool.stats().num_hit_tokens == 0
    assert torch.equal(go_on(llama, held, ids), expected(llama, ids))
    pool.check_integrity()


@pytest.mark.parametrize("num_pages", [30, 400])
def test_threads_find_each_others_pages_and_keep_their_tokens(llama, num_pages):
    pool = pool_for(llama, num_pages=num_pages)
    shared = [random_ids(1, 50, seed) for seed in range(3)]
    prompts = [
        torch.cat([shared[seed % 3][:, : 10 * (1 + seed % 5)], random_ids(1, 5 + seed % 17, seed + 10)], dim=1)
        for seed in range(40)
    ]
    references = [expected(llama, ids, max_new_tokens=4) for ids in prompts]
    num_refused = 0
    lock = threading.Lock()

    def work(index):
        nonlocal num_refused
        try:
            with PagedCache(pool=pool) as cache:
                cache.prefill(llama, prompts[index])
                tokens = go_on(llama, cache, prompts[index], max_new_tokens=4)
                assert torch.equal(tokens, references[index])
                cache.commit(tokens)
        except OutOfPagesError:
            with lock:
                num_refused += 1

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(work, index) for index in range(40)]:
            done.result()
    pool.check_integrity()
    assert pool.stats().num_active_pages == 0
    assert num_pages < 400 or num_refused == 0
    assert pool.stats().num_hit_tokens > 0


def test_a_streamer_and_text_prompts(llama):
    class Counting(BaseStreamer):
        count = 0

        def put(self, value):
            self.count += 1

        def end(self):
            self.count += 100

    tokenizer = letter_tokenizer()
    ids = tokenizer(letters(80), return_tensors="pt")["input_ids"]
    pool = pool_for(llama)
    streamer = Counting()
    for _ in range(2):
        tokens = go_on(llama, PagedCache(pool=pool), ids, custom_generate=hf_paged.sample, streamer=streamer)
        assert torch.equal(tokens, expected(llama, ids))
    assert streamer.count == 2 * (101 + NUM_NEW)
