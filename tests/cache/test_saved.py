"""A cache that was saved goes on as it would have gone on, in any process, or is refused."""

import copy
import os
import random
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    DynamicCache,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_paged
from hf_paged import OutOfPagesError, PagedCache, PagePool
from hf_paged.cache import weights_digest
from hf_paged.cache.weights_digest import model_digest
from hf_paged.pages.tiers import checked_file
from tests.models import (
    generate,
    left_padded,
    paged_cache,
    plain_tokens,
    random_ids,
    run,
    tiny_gemma,
    tiny_llama,
    tiny_model,
)
from tests.processes import kill_after

SIZES = [(16, 128), (128, 16), (32, 32)]


def mistral() -> PreTrainedModel:
    return tiny_model(MistralForCausalLM, MistralConfig, sliding_window=24)


MODELS = {"llama": tiny_llama, "mistral": mistral, "gemma": lambda: tiny_gemma(24)}


def assert_same(loaded: PagedCache, cache: PagedCache) -> None:
    """The same rows of the same tokens, bit for bit."""
    assert loaded.lengths == cache.lengths
    assert loaded.get_seq_length() == cache.get_seq_length()
    for layer in range(len(cache)):
        for found, held in zip(loaded.gather(layer), cache.gather(layer), strict=True):
            assert (found is None and held is None) or torch.equal(found, held)
    loaded.pool.check_integrity()


def assert_free(cache: PagedCache) -> None:
    """Its pages are free once it is reset."""
    cache.reset()
    cache.pool.check_integrity()
    assert cache.pool.stats().num_active_pages == 0


# It goes on


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("page_size", "other_size"), SIZES)
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_a_batch_goes_on_with_the_tokens_of_dynamic_cache(tmp_path, name, page_size, other_size, side):
    model, ids = MODELS[name](), random_ids(3, 45)
    mask = None if side == "none" else left_padded(45, [45, 17, 31])
    mask = mask if side != "right" else mask.flip(1)
    longer = None if mask is None else torch.nn.functional.pad(mask, (0, 6), value=1)
    plain = DynamicCache(config=model.config)
    expected = generate(model, "sdpa", plain, ids, attention_mask=mask, max_new_tokens=6)
    expected = generate(model, "sdpa", plain, expected, attention_mask=longer)
    cache = paged_cache(model, page_size)
    said = generate(model, "paged_flex", cache, ids, attention_mask=mask, max_new_tokens=6)
    cache.save(tmp_path / "cache")
    loaded = PagedCache.load(tmp_path / "cache", MODELS[name](), page_size=other_size)
    assert_same(loaded, cache)
    assert torch.equal(generate(model, "paged_flex", loaded, said, attention_mask=longer), expected)
    assert_free(loaded)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 127, 128, 129])
@pytest.mark.parametrize(("page_size", "other_size"), SIZES)
def test_every_length_fits_into_pages_of_every_size(tmp_path, length, page_size, other_size):
    model, ids = mistral(), random_ids(2, length + 1)
    cache = paged_cache(model, page_size)
    run(model, cache, ids[:, :length], [length])
    cache.save(tmp_path / "cache")
    loaded = PagedCache.load(tmp_path / "cache", model, page_size=other_size)
    assert_same(loaded, cache)
    assert torch.equal(
        generate(model, "paged_flex", loaded, ids, max_new_tokens=4), plain_tokens(model, ids, max_new_tokens=4)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_dtype_is_kept_bit_for_bit(tmp_path, dtype):
    model = tiny_llama(dtype=dtype)
    cache = paged_cache(model)
    generate(model, "paged_flex", cache, random_ids(2, 20))
    cache.save(tmp_path / "cache")
    loaded = PagedCache.load(tmp_path / "cache", tiny_llama(dtype=dtype))
    assert loaded.gather(0)[0].dtype == dtype
    assert_same(loaded, cache)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attention_may_be_another(tmp_path, attention):
    model, ids = tiny_llama(), random_ids(2, 20)
    cache = PagedCache.from_model(model)
    said = generate(model, attention, cache, ids, max_new_tokens=4)
    cache.save(tmp_path / "cache")
    model.set_attn_implementation("paged_flex")
    loaded = PagedCache.load(tmp_path / "cache", model)
    assert torch.equal(generate(model, "paged_flex", loaded, said, max_new_tokens=20), plain_tokens(model, ids))


def test_beams_are_stored_once_and_share_their_pages_again(tmp_path):
    model, ids = tiny_llama(), random_ids(1, 100)
    cache = paged_cache(model, 16)
    generate(model, "paged_flex", cache, ids, num_beams=4, max_new_tokens=6)
    cache.save(tmp_path / "cache")
    num_tokens = load_file(tmp_path / "cache")["keys.0"].shape[1]
    assert num_tokens == cache.stats().num_unique_tokens <= 100 + 4 * 6
    for page_size in (16, 128):
        loaded = PagedCache.load(tmp_path / "cache", model, page_size=page_size)
        assert_same(loaded, cache)
        if page_size == 16:
            assert loaded.stats().num_active_pages == cache.stats().num_active_pages
            assert loaded.stats().shared_bytes == cache.stats().shared_bytes
        free = PagedCache(pool=loaded.pool)
        generate(model, "paged_flex", free, ids)  # may not write into what is shared
        assert_same(loaded, cache)


def test_rows_that_share_a_page_part_when_they_write(tmp_path):
    model, ids = tiny_llama(), random_ids(1, 20)
    cache = paged_cache(model)
    run(model, cache, ids, [20])
    cache.batch_repeat_interleave(3)
    cache.save(tmp_path / "cache")
    loaded = PagedCache.load(tmp_path / "cache", model, page_size=16)
    assert loaded.stats().num_active_pages == 2
    longer = torch.cat([ids.expand(3, -1), random_ids(3, 5, seed=1)], dim=1)
    assert torch.equal(generate(model, "paged_flex", loaded, longer), plain_tokens(model, longer))
    loaded.pool.check_integrity()


def test_a_fork_is_saved_as_its_own(tmp_path):
    model, ids = tiny_llama(), random_ids(1, 20)
    cache = paged_cache(model)
    run(model, cache, ids, [20])
    fork = cache.fork()
    run(model, fork, random_ids(1, 3, seed=1), [3])
    for name, held in {"cache": cache, "fork": fork}.items():
        held.save(tmp_path / name)
        assert_same(PagedCache.load(tmp_path / name, model), held)


def test_a_window_is_stored_and_what_has_left_it_is_not(tmp_path):
    model = mistral()
    cache = paged_cache(model)
    run(model, cache, random_ids(2, 200), [200])
    cache.save(tmp_path / "cache")
    tensors = load_file(tmp_path / "cache")
    assert tensors["keys.0"].shape[1] == 2 * 23
    assert tensors["starts.0"].tolist() == [177, 177]


def test_past_that_is_recorded_can_still_be_taken_back(tmp_path):
    model, ids = mistral(), random_ids(2, 60)
    cache = paged_cache(model)
    cache.activate_past_recording()
    run(model, cache, ids, [60])
    cache.save(tmp_path / "cache")
    loaded = PagedCache.load(tmp_path / "cache", model)
    run(model, loaded, random_ids(2, 10, seed=1), [10])
    loaded.crop(-40)
    assert torch.equal(generate(model, "paged_flex", loaded, ids[:, :40]), plain_tokens(model, ids[:, :40]))


def test_rows_that_were_released_stay_so(tmp_path):
    model, ids = tiny_llama(), random_ids(3, 20)
    cache = paged_cache(model)
    said = generate(model, "paged_flex", cache, ids, max_new_tokens=4)
    cache.release([1])
    cache.save(tmp_path / "cache")
    loaded = PagedCache.load(tmp_path / "cache", model)
    assert_same(loaded, cache)
    assert loaded.lengths == [23, 0, 23]
    found = generate(model, "paged_flex", loaded, said, max_new_tokens=20)
    assert torch.equal(found[[0, 2]], plain_tokens(model, ids)[[0, 2]])


@pytest.mark.parametrize("num_rows", [0, 2])
def test_a_cache_without_tokens_can_be_saved(tmp_path, num_rows):
    model, ids = tiny_llama(), random_ids(2, 20)
    cache = paged_cache(model)
    if num_rows:
        run(model, cache, ids[:, :3], [3], mask=torch.zeros(num_rows, 3, dtype=torch.int64))
    cache.save(tmp_path / "cache")
    loaded = PagedCache.load(tmp_path / "cache", model)
    assert_same(loaded, cache)
    assert loaded.batch_size == (num_rows or -1)
    assert torch.equal(generate(model, "paged_flex", PagedCache(pool=loaded.pool), ids), plain_tokens(model, ids))


def test_changes_of_copies_are_saved(tmp_path):
    model = tiny_llama()
    cache = paged_cache(model)
    run(model, cache, random_ids(2, 20), [20])
    cache.layers[1].values[:, :, 3] = 0
    cache.save(tmp_path / "cache")
    assert PagedCache.load(tmp_path / "cache", model).gather(1)[1][:, :, 3].abs().sum() == 0


def test_layers_that_the_model_passes_over_hold_nothing_afterwards(tmp_path):
    model, ids = tiny_llama(num_layers=3), random_ids(2, 20)
    del model.model.layers[2]
    cache = paged_cache(model)
    said = generate(model, "paged_flex", cache, ids, max_new_tokens=4)
    cache.save(tmp_path / "cache")
    loaded = PagedCache.load(tmp_path / "cache", model)
    assert_same(loaded, cache)
    assert torch.equal(generate(model, "paged_flex", loaded, said, max_new_tokens=20), plain_tokens(model, ids))


def test_a_file_may_be_saved_again_and_again(tmp_path):
    model, ids = tiny_llama(), random_ids(1, 20)
    for _ in range(3):
        cache = PagedCache.load(tmp_path / "cache", model) if (tmp_path / "cache").exists() else paged_cache(model)
        ids = generate(model, "paged_flex", cache, ids, max_new_tokens=8)
        cache.save(tmp_path / "cache")
    assert torch.equal(ids, plain_tokens(model, random_ids(1, 20)))
    assert os.listdir(tmp_path) == ["cache"]


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_may_be_prefilled_behind_what_was_loaded(tmp_path, name):
    model, ids, mask = MODELS[name](), random_ids(2, 90), left_padded(90, [90, 63])
    cache = paged_cache(model)
    cache.prefill(model, ids[:, :50], mask[:, :50])
    cache.save(tmp_path / "cache")
    loaded = PagedCache.load(tmp_path / "cache", model, page_size=16)
    loaded.prefill(model, ids, mask, max_tokens=20)
    found = generate(model, "paged_flex", loaded, ids, attention_mask=mask)
    assert torch.equal(found, plain_tokens(model, ids, attention_mask=mask))


@pytest.mark.parametrize("has_index", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_what_was_loaded_goes_on_with_another_version_of_its_prompt(tmp_path, name, has_index):
    model, ids, mask = MODELS[name](), random_ids(2, 60), left_padded(60, [60, 43])
    model.set_attn_implementation("paged_flex")
    pools = [PagePool(model.config, 40, 16, prefix_cache=has_index) for _ in range(2)]
    cache = PagedCache(pool=pools[0])
    cache.prefill(model, ids, mask)
    cache.save(tmp_path / "cache", model)
    loaded = PagedCache.load(tmp_path / "cache", model, pool=pools[1])
    other = ids.clone()
    other[:, 55:] = (other[:, 55:] + 1) % 100
    loaded.resume(model, other, mask)
    found = generate(model, "paged_flex", loaded, other, attention_mask=mask)
    assert torch.equal(found, plain_tokens(model, other, attention_mask=mask))


@pytest.mark.parametrize(("other_size", "is_found"), [(16, True), (32, False)])
def test_pages_that_lack_their_beginning_are_not_found(tmp_path, other_size, is_found):
    model, ids = tiny_gemma(24), random_ids(1, 150)
    model.set_attn_implementation("paged_flex")
    cache = PagedCache(pool=PagePool(model.config, 80, 16, prefix_cache=True))
    said = generate(model, "paged_flex", cache, ids, max_new_tokens=2, custom_generate=hf_paged.sample)
    cache.save(tmp_path / "cache", model)
    pool = PagePool(model.config, 80, other_size, prefix_cache=True)
    loaded = PagedCache.load(tmp_path / "cache", model, pool=pool)
    if is_found:
        loaded.commit(said)
    else:
        with pytest.raises(ValueError, match="may hold more than a model makes of these ids"):
            loaded.commit(said)
    pool.check_integrity()


def test_a_pass_of_ones_own_is_not_forgotten_in_a_file(tmp_path):
    model, ids = tiny_llama(), random_ids(1, 30)
    cache = paged_cache(model)
    run(model, cache, ids, [30])
    cache.save(tmp_path / "cache", model)
    loaded = PagedCache.load(tmp_path / "cache", model)
    with pytest.raises(ValueError, match="it isn't known that a model made it of these ids"):
        loaded.resume(model, random_ids(1, 40))


# Into a pool


def test_a_cache_can_be_loaded_into_a_pool_that_others_use(tmp_path):
    model, ids = tiny_gemma(24), random_ids(2, 40)
    cache = paged_cache(model, 32)
    said = generate(model, "paged_flex", cache, ids, max_new_tokens=4)
    cache.save(tmp_path / "cache")
    pool = PagePool(model.config, num_pages=40, page_size=16)
    other = PagedCache(pool=pool)
    others = generate(model, "paged_flex", other, random_ids(2, 50, seed=1), max_new_tokens=4)
    loaded = PagedCache.load(tmp_path / "cache", model, pool=pool)
    assert loaded.pool is pool
    assert_same(loaded, cache)
    assert torch.equal(generate(model, "paged_flex", loaded, said, max_new_tokens=20), plain_tokens(model, ids))
    assert torch.equal(
        generate(model, "paged_flex", other, others, max_new_tokens=20),
        plain_tokens(model, random_ids(2, 50, seed=1)),
    )
    pool.check_integrity()


def test_what_was_left_in_a_page_is_not_seen(tmp_path):
    model, ids = tiny_llama(), random_ids(1, 20)
    cache = paged_cache(model)
    said = generate(model, "paged_flex", cache, ids, max_new_tokens=4)
    cache.save(tmp_path / "cache")
    pool = PagePool(model.config, num_pages=4, page_size=16)
    other = PagedCache(pool=pool)
    run(model, other, random_ids(1, 64, seed=1), [64])
    for layer in range(2):
        other.set(layer, *(torch.full_like(tensor, torch.nan) for tensor in other.gather(layer)))
    other.reset()
    loaded = PagedCache.load(tmp_path / "cache", model, pool=pool)
    assert torch.equal(generate(model, "paged_flex", loaded, said, max_new_tokens=20), plain_tokens(model, ids))


@pytest.mark.parametrize("num_pages", [1, 3])
def test_a_pool_that_is_too_small_raises_and_keeps_all_its_pages(tmp_path, num_pages):
    model = tiny_gemma(64)
    cache = paged_cache(model)
    run(model, cache, random_ids(2, 40), [40])
    cache.save(tmp_path / "cache")
    pool = PagePool(model.config, num_pages=num_pages, page_size=16)
    with pytest.raises(OutOfPagesError, match=f"needs 6 more pages, but {num_pages} of {num_pages} are free"):
        PagedCache.load(tmp_path / "cache", model, pool=pool)
    assert pool.stats().num_active_pages == 0
    pool.check_integrity()


def test_a_pool_of_another_model_is_refused(tmp_path):
    model = tiny_llama()
    cache = paged_cache(model)
    run(model, cache, random_ids(1, 20), [20])
    cache.save(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"a LlamaForCausalLM with other layers than the model that the pool"):
        PagedCache.load(tmp_path / "cache", model, pool=PagePool(mistral().config))


def test_a_pool_of_another_dtype_is_refused_and_keeps_all_its_pages(tmp_path):
    model = tiny_llama()
    cache = paged_cache(model)
    run(model, cache, random_ids(1, 20), [20])
    cache.save(tmp_path / "cache")
    pool = PagePool(model.config, page_size=16)
    run(tiny_llama(dtype=torch.bfloat16), PagedCache(pool=pool), random_ids(1, 20), [20])
    with pytest.raises(
        ValueError, match=r"Layer 0 was given dtype torch.float32, but this cache holds torch.bfloat16"
    ):
        PagedCache.load(tmp_path / "cache", model, pool=pool)
    assert pool.stats().num_active_pages == 0
    pool.check_integrity()


def test_what_was_loaded_can_be_committed_and_found_by_its_salt(tmp_path):
    model, ids = tiny_llama(), random_ids(1, 64)
    model.set_attn_implementation("paged_flex")
    cache = PagedCache(pool=PagePool(model.config, 20, 16, prefix_cache=True))
    cache.prefill(model, ids)
    said = generate(model, "paged_flex", cache, ids, max_new_tokens=20)
    cache.save(tmp_path / "cache")
    pool = PagePool(model.config, 20, 16, prefix_cache=True)
    loaded = PagedCache.load(tmp_path / "cache", model, pool=pool, salt="mine")
    loaded.commit(said)
    for salt, num_found in [("mine", 80), ("another", 0)]:
        before = pool.stats().num_hit_tokens
        again = PagedCache(pool=pool, salt=salt)
        again.prefill(model, said, torch.ones_like(said))  # a pad token may be among them
        assert pool.stats().num_hit_tokens - before == num_found
        found = generate(model, "paged_flex", again, said, attention_mask=torch.ones_like(said), max_new_tokens=9)
        assert torch.equal(found, plain_tokens(model, said, attention_mask=torch.ones_like(said), max_new_tokens=9))
        again.reset()
    pool.check_integrity()


# The tokens are known


def test_another_prompt_raises_after_loading(tmp_path):
    model, ids = tiny_llama(), random_ids(2, 20)
    cache = paged_cache(model)
    said = generate(model, "paged_flex", cache, ids, max_new_tokens=4)
    cache.save(tmp_path / "cache")
    loaded = PagedCache.load(tmp_path / "cache", model)
    other = said.clone()
    other[1, 21] = 3 if other[1, 21] != 3 else 4
    with pytest.raises(ValueError, match=r"The cache holds another prompt: row 1 has token .* in column 21"):
        generate(model, "paged_flex", loaded, other)
    assert_same(loaded, cache)


def test_ids_are_known_from_the_column_on_from_which_they_were(tmp_path):
    model, ids = tiny_llama(), random_ids(2, 20)
    cache = paged_cache(model)
    run(model, cache, ids[:, :10], [10])  # of which nobody has said the ids
    generate(model, "paged_flex", cache, ids, max_new_tokens=4)
    cache.save(tmp_path / "cache")
    loaded = PagedCache.load(tmp_path / "cache", model)
    known, first = loaded._sequences.rows.known_ids.known
    assert first == 10
    assert torch.equal(known[:, :10], ids[:, 10:])


# Which model it was


def test_the_model_is_the_one_that_has_computed_last(tmp_path):
    model, ids = tiny_llama(), random_ids(1, 20)
    model.set_attn_implementation("paged_flex")
    cache = PagedCache(model.config)
    with pytest.raises(
        ValueError, match=r"nothing says which model has computed it. Pass the model: cache.save\(path"
    ):
        cache.save(tmp_path / "cache")
    run(model, cache, ids, [20])
    cache.save(tmp_path / "given", model)
    generate(model, "paged_flex", cache, random_ids(1, 30), max_new_tokens=1)
    cache.fork().save(tmp_path / "generated")
    prefilled = PagedCache(model.config)
    prefilled.prefill(model, ids)
    copy.deepcopy(prefilled).save(tmp_path / "prefilled")
    for name in ("given", "generated", "prefilled"):
        assert len(PagedCache.load(tmp_path / name, tiny_llama()).lengths) == 1


def adapted(seed: int = 0, **changes) -> PreTrainedModel:
    settings = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj"], "init_lora_weights": False}
    model = tiny_llama()
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(**(settings | changes))).eval()


def other_weight(model: PreTrainedModel) -> None:
    model.model.layers[1].self_attn.k_proj.weight.data[0, 0] += 1e-6


def other_frequencies(model: PreTrainedModel) -> None:
    model.model.rotary_emb.inv_freq[1] += 1e-3


def other_theta(model: PreTrainedModel) -> None:
    model.config.rope_parameters["rope_theta"] = 5000.0


def other_scaling(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.scaling *= 2


OTHERS = {
    "weight": (tiny_llama, other_weight, "weights"),
    "size": (lambda: tiny_llama(num_heads=4), None, "weights, configuration, settings"),
    "dtype": (lambda: tiny_llama(dtype=torch.bfloat16), None, "weights"),
    "frequencies": (tiny_llama, other_frequencies, "weights"),
    "theta": (tiny_llama, other_theta, "configuration"),
    "scaling": (tiny_llama, other_scaling, "settings"),
    "adapter": (adapted, None, "weights, settings, adapters"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_is_refused(tmp_path, name):
    make, change, differences = OTHERS[name]
    cache = paged_cache(tiny_llama())
    run(tiny_llama(), cache, random_ids(1, 20), [20])
    cache.save(tmp_path / "cache", tiny_llama())
    other = make()
    if change is not None:
        change(other)
    with pytest.raises(ValueError, match=rf"what another model has computed: {differences} of that LlamaForCausal"):
        PagedCache.load(tmp_path / "cache", other)


def test_another_version_of_transformers_is_refused(files, monkeypatch):
    model, path, _ = files
    monkeypatch.setattr(weights_digest.transformers, "__version__", "9.9.9")
    refused(path, model, "it holds what another model has computed: version of transformers of that LlamaForCausalLM")


def test_an_adapter_must_be_the_same_active_and_scaled_alike(tmp_path):
    model, ids = adapted(), random_ids(1, 20)
    cache = PagedCache.from_model(model)
    said = generate(model, "paged_flex", cache, ids, max_new_tokens=4)
    expected = generate(model, "sdpa", DynamicCache(config=model.config), ids)
    cache.save(tmp_path / "cache")
    loaded = PagedCache.load(tmp_path / "cache", adapted())
    assert torch.equal(generate(model, "paged_flex", loaded, said, max_new_tokens=20), expected)
    assert PagedCache.load(tmp_path / "cache", adapted().base_model.model).lengths == [23]

    with model.disable_adapter(), pytest.raises(ValueError, match="computed: adapters of that LlamaForCausalLM"):
        PagedCache.load(tmp_path / "cache", model)
    with pytest.raises(ValueError, match="computed: weights of that"):
        PagedCache.load(tmp_path / "cache", adapted(seed=1))
    with pytest.raises(ValueError, match="computed: adapters of that"):
        PagedCache.load(tmp_path / "cache", adapted(lora_alpha=3))
    model.merge_adapter()
    with pytest.raises(ValueError, match="computed: weights, adapters of that"):
        PagedCache.load(tmp_path / "cache", model)


def test_a_model_in_no_process_is_refused(tmp_path):
    cache = paged_cache(tiny_llama())
    with torch.device("meta"):
        absent = tiny_llama()
    with pytest.raises(ValueError, match=r"embed_tokens.weight of this LlamaForCausalLM is not in memory"):
        cache.save(tmp_path / "cache", absent)


def test_positions_that_the_model_keeps_to_itself_are_refused(tmp_path):
    model = tiny_llama()
    cache = paged_cache(model)
    model.model.rope_deltas = torch.zeros(1, 1, dtype=torch.int64)  # as of a text without images
    cache.save(tmp_path / "cache")
    model.model.rope_deltas += 3
    with pytest.raises(ValueError, match=r"it keeps the positions that follow them to itself \(rope_deltas\)"):
        cache.save(tmp_path / "cache")


def test_an_encoder_is_refused(tmp_path):
    model = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    cache = PagedCache.from_model(model)
    with pytest.raises(ValueError, match="what it keeps of the encoder is in no pages"):
        cache.self_attention_cache.save(tmp_path / "cache")
    with pytest.raises(ValueError, match="has an encoder, too"):
        PagedCache.load(tmp_path / "cache", model)


def test_the_weights_are_read_once_until_they_change(monkeypatch):
    reads = []
    monkeypatch.setattr(weights_digest, "digest_of", lambda tensors: reads.append(tensors) or b"")
    model = tiny_llama()
    model_digest(model)
    model_digest(model)
    assert len(reads) == 1
    model.model.layers[0].mlp.up_proj.weight.data.mul_(2)  # around torch's versions
    model_digest(model)
    assert len(reads) == 2


def test_what_a_configuration_says_of_other_things_may_differ(tmp_path):
    model = tiny_llama()
    expected = model_digest(model)
    model.config.use_cache, model.config.pad_token_id, model.config.name_or_path = False, 7, "elsewhere"
    model.set_attn_implementation("eager")
    model.train()
    assert model_digest(model) == expected


# What is not as it was written


@pytest.fixture
def files(tmp_path) -> tuple[PreTrainedModel, Path, Path]:
    """A model, and two caches that it has saved."""
    model = tiny_llama()
    for seed, name in enumerate(("one", "other")):
        cache = paged_cache(model)
        ids = random_ids(2, 30, seed=seed)
        generate(model, "paged_flex", cache, ids, attention_mask=left_padded(30, [30, 7]), max_new_tokens=4)
        cache.save(tmp_path / name)
    return model, tmp_path / "one", tmp_path / "other"


def damaged(data: bytes, other: bytes, random_: random.Random) -> bytes:
    place = random_.randrange(len(data))
    kind = random_.choice(["bit", "bit", "head", "cut", "insert", "swap", "zero"])
    if kind == "head":
        place, kind = random_.randrange(2500), "bit"
    return {
        "bit": lambda: data[:place] + bytes([data[place] ^ 1 << random_.randrange(8)]) + data[place + 1 :],
        "cut": lambda: data[:place],
        "insert": lambda: data[:place] + random_.randbytes(random_.randrange(1, 50)) + data[place:],
        "swap": lambda: data[:place] + other[place:],
        "zero": lambda: data[:place] + bytes(len(data) - place),
    }[kind]()


def test_a_damaged_file_is_refused(files):
    model, path, other = files
    expected = PagedCache.load(path, model)
    data, random_ = path.read_bytes(), random.Random(0)
    messages = []
    for _ in range(200):
        path.write_bytes(damaged(data, other.read_bytes(), random_))
        try:
            assert_same(PagedCache.load(path, model), expected)  # where what has changed says nothing
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 190
    assert all(f"{path} can't be loaded: " in message for message in messages)


def refused(path: Path, model: PreTrainedModel, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"{path} can't be loaded: {reason}.*compute the prompt anew"):
        PagedCache.load(path, model)


@pytest.mark.parametrize(
    "data", [b"", b"\0", bytes(8), b"\xff" * 100, b"\x02\0\0\0\0\0\0\0{}", b"text", b"\x80\x04N."]
)
def test_a_file_of_something_else_is_refused(tmp_path, data):
    (tmp_path / "file").write_bytes(data)
    refused(tmp_path / "file", tiny_llama(), "it is no file of hf-paged, or a damaged one")


def test_a_checkpoint_is_refused(tmp_path):
    save_file({"keys.0": torch.zeros(3)}, tmp_path / "file", {"format": "pt"})
    refused(tmp_path / "file", tiny_llama(), "it is no file of hf-paged, or a damaged one")


def test_a_page_of_a_store_is_refused(tmp_path):
    checked_file.write_tensors(tmp_path / "file", {"content": torch.zeros(3)}, {"format": "hf-paged page 1"})
    refused(tmp_path / "file", tiny_llama(), "it is a file of 'hf-paged page 1', not of 'hf-paged cache 1'")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to(path.parent / "one")])
def test_what_is_no_file_is_refused(files, make):
    model, path, _ = files
    make(path.parent / "new")
    refused(path.parent / "new", model, "it is a folder, a link or something else that is no regular file")


def test_a_link_is_replaced_and_not_written_through(files):
    model, path, other = files
    before = other.read_bytes()
    link = path.with_name("link")
    link.symlink_to(other)
    PagedCache.load(path, model).save(link)
    assert not link.is_symlink()
    assert other.read_bytes() == before


def test_a_file_that_is_not_there_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        PagedCache.load(tmp_path / "nothing", tiny_llama())


def test_a_file_that_can_not_be_written_leaves_the_old_one(files, monkeypatch):
    model, path, _ = files
    cache = PagedCache.load(path, model)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="the disk is full"):
        cache.save(path)
    assert path.read_bytes() == before
    assert sorted(os.listdir(path.parent)) == ["one", "other"]


FORGERIES = {
    "starts": lambda tensors: tensors | {"starts.0": tensors["starts.0"] - 1},
    "places": lambda tensors: tensors | {"tokens.0": tensors["tokens.0"] + 1},
    "negative": lambda tensors: tensors | {"tokens.0": tensors["tokens.0"] - 1},
    "count": lambda tensors: tensors | {"tokens.0": tensors["tokens.0"][:-1]},
    "padding": lambda tensors: tensors | {"real": ~tensors["real"]},
    "columns": lambda tensors: tensors | {"real": tensors["real"][:, 1:]},
    "ids": lambda tensors: tensors | {"ids": tensors["ids"][:1].expand(5, -1).contiguous()},
    "missing": lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "keys.1"},
    "keys": lambda tensors: tensors | {"keys.1": tensors["keys.1"][0]},
    "fewer": lambda tensors: tensors | {"values.1": tensors["values.1"][:, 1:].contiguous()},
    "dtype": lambda tensors: tensors | {"tokens.0": tensors["tokens.0"].float()},
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_file_whose_parts_do_not_belong_together_is_refused(files, name):
    model, path, _ = files
    tensors, metadata = checked_file.read_tensors(path)
    checked_file.write_tensors(path, FORGERIES[name](tensors), metadata)
    refused(path, model, "its parts don't belong together")


# A process that is killed


def test_what_killed_processes_left_is_removed_after_an_hour(files):
    model, path, other = files
    left, written, others = (
        path.with_name(f".{name}.unfinished") for name in ("one.left", "one.written", "other.left")
    )
    for unfinished in (left, written, others):
        unfinished.touch()
    for unfinished in (left, others):
        os.utime(unfinished, (0, 0))
    PagedCache.load(other, model).save(path)
    assert [unfinished.exists() for unfinished in (left, written, others)] == [False, True, True]


def contents(number: int) -> tuple[PreTrainedModel, PagedCache]:
    """A cache of 1 MB that says a number."""
    model = tiny_llama(num_layers=1)
    cache = PagedCache.from_model(model)
    keys = torch.full((1, 2, 4000, 16), float(number))
    cache.update(keys, keys, 0)
    return model, cache


def save_for_ever(sign: Path, path: Path) -> None:
    torch.set_num_threads(1)
    (model, one), (_, other) = contents(1), contents(2)
    one.save(path, model)
    sign.touch()
    while True:
        other.save(path, model)
        one.save(path, model)


def test_a_process_killed_while_it_saves_leaves_the_old_file_or_the_new_one(tmp_path):
    random_, (model, _) = random.Random(0), contents(0)
    folder = tmp_path / "folder"
    folder.mkdir()
    num_unfinished = 0
    for number in range(50):
        awaited = folder if number % 2 else None
        kill_after(0.05 * random_.random(), awaited, save_for_ever, tmp_path / "sign", folder / "cache")
        keys = PagedCache.load(folder / "cache", model).gather(0)[0]
        assert keys.shape == (1, 2, 4000, 16)
        assert keys.unique().tolist() in ([1.0], [2.0])
        for unfinished in folder.glob(".*.unfinished"):
            unfinished.unlink()
            num_unfinished += 1
    assert num_unfinished > 0
