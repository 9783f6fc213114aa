"""Layers that keep a state of each row, beside layers whose keys and values are in pages."""

import copy
from functools import cache as once

import pytest
import torch
import transformers
from transformers import DynamicCache

import hf_paged
from hf_paged import PagedCache, PagePool, PrefixStore
from hf_paged.errors import UnclearPassError
from hf_paged.pages.tiers.checked_file import read_tensors, write_tensors
from tests.models import left_padded
from tests.sweep.checks import greedy
from tests.sweep.subjects import subject_of, words
from tests.sweep.tiny import tiny_config, tiny_model

FAMILIES = [
    "BambaForCausalLM",
    "FalconH1ForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "JambaForCausalLM",
    "Lfm2ForCausalLM",
    "Lfm2MoeForCausalLM",
    "Lfm3ForCausalLM",
    "NemotronHForCausalLM",
    "OlmoHybridForCausalLM",
    "Qwen3NextForCausalLM",
    "Qwen3_5ForCausalLM",
    "Qwen3_5MoeForCausalLM",
    "ZambaForCausalLM",
    "Zamba2ForCausalLM",
    "ZayaForCausalLM",
]
# A delta rule before attention, both in one layer, a convolution alone, and Mamba behind attention.
CHOSEN = ["Qwen3NextForCausalLM", "FalconH1ForCausalLM", "Lfm2ForCausalLM", "jamba that ends in Mamba"]
ENDS_IN_MAMBA = {"num_hidden_layers": 3}  # attention in every second layer
ATTENTIONS = ["paged_flex", "sdpa"]
FAILING = [*((name, "paged_flex") for name in CHOSEN), (CHOSEN[3], "sdpa")]


@once
def _load(name):
    if name.endswith("ForCausalLM") and not hasattr(transformers, name):
        pytest.skip(f"this Transformers has no {name}")
    if name == CHOSEN[3]:

        def load(attention):
            config = tiny_config(transformers.JambaConfig, ENDS_IN_MAMBA)
            model = tiny_model(transformers.JambaForCausalLM, attention, config)
            model.generation_config = greedy(model)
            return model

        return load("sdpa"), load("paged_flex")
    subject = subject_of(name, "causal")
    return subject.load(subject.attention), subject.load("paged_flex")


def model_of(name, attention="paged_flex"):
    plain, paged = _load(name)
    return paged if attention == "paged_flex" else plain


def dynamic(model):
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def tokens_of(model, cache, ids, mask=None, new=20, **arguments):
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0} | arguments
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **settings)


def plain_tokens(name, ids, mask=None, **arguments):
    model = model_of(name, "sdpa")
    return tokens_of(model, dynamic(model), ids, mask, **arguments)


@torch.no_grad()
def logits_of(model, cache, ids, mask=None):
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return model(ids, past_key_values=cache, attention_mask=mask, position_ids=positions).logits


def states_of(cache):
    states = cache._sequences.rows.states
    return [tensor.clone() for layer in states._layers for tensor in states[layer].tensors]


def are_equal(some, others):
    return len(some) == len(others) and all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_padded_batch_has_the_tokens_and_logits_of_dynamic_cache(name, attention):
    mask = left_padded(19, [19, 7, 1])
    ids = words(3, 19) * mask
    model, plain = model_of(name, attention), model_of(name, "sdpa")
    cache = PagedCache.from_model(model, page_size=16)
    assert torch.equal(tokens_of(model, cache, ids, mask), plain_tokens(name, ids, mask))
    assert cache.lengths == ([38, 26, 20] if attention == "paged_flex" else [38] * 3)
    cache, expected = PagedCache.from_model(model, page_size=16), dynamic(plain)
    for stop in (16, 17, 19):
        new = slice(expected.get_seq_length(), stop)
        found = logits_of(model, cache, ids[:, new], mask[:, :stop])
        wanted = logits_of(plain, expected, ids[:, new], mask[:, :stop])
        real = mask[:, new].bool()
        torch.testing.assert_close(found[real], wanted[real], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("num_columns", [1, 2, 3, 15, 16, 17])
def test_short_prompts_and_those_at_page_edges(name, num_columns):
    ids, model = words(2, num_columns), model_of(name)
    cache = PagedCache.from_model(model, page_size=16)
    assert torch.equal(tokens_of(model, cache, ids), plain_tokens(name, ids))


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", CHOSEN)
def test_beams_samples_and_chunks(name, attention):
    mask = left_padded(19, [19, 7])
    ids, model = words(2, 19) * mask, model_of(name, attention)
    for arguments in ({"num_beams": 4}, {"prefill_chunk_size": 5}, {"num_beams": 2, "num_return_sequences": 2}):
        cache = PagedCache.from_model(model, page_size=16)
        assert torch.equal(tokens_of(model, cache, ids, mask, **arguments), plain_tokens(name, ids, mask, **arguments))
    sampling = {"do_sample": True, "num_return_sequences": 3, "top_k": 5}
    torch.manual_seed(0)
    expected = plain_tokens(name, ids, mask, **sampling)
    torch.manual_seed(0)
    cache = PagedCache.from_model(model, page_size=16)
    assert torch.equal(tokens_of(model, cache, ids, mask, **sampling), expected)


def test_beams_hold_the_pages_of_a_prompt_once():
    model = model_of(CHOSEN[0])
    cache = PagedCache.from_model(model, page_size=16)
    tokens_of(model, cache, words(1, 48), num_beams=4, new=4)
    stats = cache.stats()
    assert stats.num_shared_pages >= 3
    assert stats.num_active_pages <= 3 + 4


@pytest.mark.parametrize("name", CHOSEN)
def test_a_conversation_goes_on_and_forks(name):
    model, plain = model_of(name), model_of(name, "sdpa")
    mask = left_padded(19, [19, 7])
    cache, expected = PagedCache.from_model(model, page_size=16), dynamic(plain)
    first = tokens_of(model, cache, words(2, 19) * mask, mask)
    tokens_of(plain, expected, words(2, 19) * mask, mask)
    fork = copy.deepcopy(cache)
    assert fork.stats().num_active_pages == cache.stats().num_active_pages == cache.pool.stats().num_active_pages
    assert fork.pool.stats().state_bytes == cache.stats().state_bytes > 0
    turn = torch.cat([first, words(2, 5, seed=1)], dim=1)
    mask = torch.cat([mask, torch.ones(2, 25, dtype=torch.long)], dim=1)
    found = tokens_of(model, cache, turn, mask)
    assert torch.equal(found, tokens_of(plain, copy.deepcopy(expected), turn, mask))
    assert torch.equal(tokens_of(model, fork, turn, mask), found)
    other = torch.cat([first, words(2, 9, seed=2)], dim=1)
    mask = torch.cat([mask, torch.ones(2, 4, dtype=torch.long)], dim=1)
    again = PagedCache.from_model(model, page_size=16)
    assert torch.equal(tokens_of(model, again, other, mask), tokens_of(plain, dynamic(plain), other, mask))


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", CHOSEN)
def test_rows_are_reordered_repeated_and_chosen(name, attention):
    model, plain = model_of(name, attention), model_of(name, "sdpa")
    ids = words(3, 17)
    cache = PagedCache.from_model(model, page_size=16)
    logits_of(model, cache, ids)
    cache.reorder_cache(torch.tensor([2, 0, 2]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3, 5]))
    cache.release([1])
    rows = ids[[2, 0, 2]]
    for seed in (1, 2):
        step = words(3, 1, seed=seed)
        rows = torch.cat([rows, step], dim=1)
        found = logits_of(model, cache, step)[:, -1]
        wanted = logits_of(plain, dynamic(plain), rows)[:, -1]
        torch.testing.assert_close(found[[0, 2]], wanted[[0, 2]], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", CHOSEN)
def test_one_row_becomes_many(name):
    model, plain = model_of(name), model_of(name, "sdpa")
    ids, step = words(1, 17), words(3, 1, seed=1)
    cache = PagedCache.from_model(model, page_size=16)
    logits_of(model, cache, ids)
    found = logits_of(model, cache, step)[:, -1]
    wanted = logits_of(plain, dynamic(plain), torch.cat([ids.repeat(3, 1), step], dim=1))[:, -1]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", CHOSEN)
def test_rows_are_split_and_joined(name):
    model, plain = model_of(name), model_of(name, "sdpa")
    mask = left_padded(19, [19, 7])
    ids = words(2, 19) * mask
    cache = PagedCache.from_model(model, page_size=16)
    logits_of(model, cache, ids, mask)
    one, two = cache.split()
    joined = PagedCache.concatenate([two, one])
    step = words(2, 1, seed=1)
    both = torch.cat([mask.flip(0), torch.ones(2, 1, dtype=torch.long)], dim=1)
    found = logits_of(model, joined, step, both)[:, -1]
    wanted = logits_of(plain, dynamic(plain), torch.cat([ids.flip(0), step], dim=1), both)[:, -1]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    cache.pool.check_integrity()


class Failure(Exception):
    """What a hook raises."""


def modules_of(model):
    decoder = model.get_decoder()
    layers = list(decoder.layers)
    return layers + [child for layer in layers for child in layer.children()]


@pytest.mark.parametrize(("name", "attention"), FAILING)
@pytest.mark.parametrize("num_new", [1, 3])
def test_a_pass_that_failed_leaves_states_bit_equal(name, attention, num_new):
    model = model_of(name, attention)
    ids, step = words(2, 17), words(2, num_new, seed=1)
    cache = PagedCache.from_model(model, page_size=16)
    logits_of(model, cache, ids)
    before, count = states_of(cache), cache.get_seq_length()
    expected = logits_of(model, cache.fork(), step)
    num_failed = 0
    for module in [module for module in model.get_decoder().modules() if module is not model.get_decoder()]:
        for register in (module.register_forward_pre_hook, module.register_forward_hook):

            def fail(*args):
                raise Failure

            hook = register(fail)
            try:
                with pytest.raises(Failure):
                    logits_of(model, cache, step)
                num_failed += 1
            except BaseException as error:
                if "DID NOT RAISE" not in str(error):
                    raise
            finally:
                hook.remove()
            cache.roll_back()
            if cache.get_seq_length() == count:
                assert are_equal(states_of(cache), before)
                continue
            # The pass went through all layers that keep anything before it failed: it counts.
            assert cache.get_seq_length() == count + num_new
            fork = PagedCache.from_model(model, page_size=16)
            logits_of(model, fork, ids)
            logits_of(model, fork, step)
            assert are_equal(states_of(cache), states_of(fork))
            cache.reset()
            logits_of(model, cache, ids)
            assert are_equal(states_of(cache), before)
    assert num_failed > 10
    torch.testing.assert_close(logits_of(model, cache, step), expected, rtol=0, atol=0)
    cache.pool.check_integrity()


@pytest.mark.parametrize(("name", "attention"), FAILING)
@pytest.mark.parametrize("is_first", [True, False])
def test_a_pass_that_failed_is_never_gone_on_from(name, attention, is_first):
    model = model_of(name, attention)
    ids, step = words(2, 17), words(2, 1, seed=1)
    plain = dynamic(model_of(name, "sdpa"))  # some models compute a chunk otherwise than a whole prompt
    for chunk in [ids] if is_first else [ids[:, :9], ids[:, 9:]]:
        logits_of(model_of(name, "sdpa"), plain, chunk)
    expected = logits_of(model_of(name, "sdpa"), plain, step)[:, -1]

    def fail(*args):
        raise Failure

    decoder = model.get_decoder()
    for module in [module for module in decoder.modules() if module is not decoder]:
        for register in (module.register_forward_pre_hook, module.register_forward_hook):
            cache = PagedCache.from_model(model, page_size=16)
            if not is_first:
                logits_of(model, cache, ids[:, :9])
            hook = register(fail)
            try:
                logits_of(model, cache, ids if is_first else ids[:, 9:])
            except Failure:
                pass
            finally:
                hook.remove()
            try:
                count = cache.get_seq_length()
                logits_of(model, cache, ids[:, count:] if count < 17 else step)
            except UnclearPassError:
                cache.roll_back()
                logits_of(model, cache, ids[:, cache.get_seq_length() :])
                count = 0
            if count < 17:
                found = logits_of(model, cache, step)[:, -1]
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [CHOSEN[0], CHOSEN[1], CHOSEN[3]])
def test_recurrent_states_are_not_cropped(name):
    model = model_of(name)
    cache = PagedCache.from_model(model, page_size=16)
    cache.activate_past_recording()
    ids = words(1, 17)
    logits_of(model, cache, ids)
    before = states_of(cache)
    assert not cache.is_croppable
    with pytest.raises(ValueError, match="recurrent state, of which none can be"):
        cache.crop(-1)
    assert cache.lengths == [17]
    assert are_equal(states_of(cache), before)
    cache.crop(-17)
    assert cache.lengths == []
    assert torch.equal(tokens_of(model, cache, ids), plain_tokens(name, ids))


@pytest.mark.parametrize("num_removed", [1, 2, 5, 16])
@pytest.mark.parametrize("num_columns", [17, 19])
def test_a_convolution_is_cropped_as_far_as_it_has_recorded(num_columns, num_removed):
    name = "Lfm2ForCausalLM"
    model = model_of(name)
    ids = words(2, num_columns)
    cache = PagedCache.from_model(model, page_size=16)
    logits_of(model, cache, ids)
    with pytest.raises(ValueError, match="activate_past_recording"):
        cache.crop(-num_removed)
    assert cache.lengths == [num_columns] * 2
    cache.reset()
    cache.activate_past_recording()
    logits_of(model, cache, ids[:, :5])
    logits_of(model, cache, ids[:, 5:])
    assert cache.is_croppable
    cache.crop(-num_removed)
    again = torch.cat([ids[:, :-num_removed], words(2, 4, seed=3)], dim=1)
    assert torch.equal(tokens_of(model, cache, again), plain_tokens(name, again))


def test_prompt_lookup_works_where_transformers_can_take_back():
    ids = words(1, 6).repeat(1, 4)
    model = model_of("Lfm2ForCausalLM")
    cache = PagedCache.from_model(model, page_size=16)
    found = tokens_of(model, cache, ids, prompt_lookup_num_tokens=3)
    assert torch.equal(found, plain_tokens("Lfm2ForCausalLM", ids))
    model = model_of(CHOSEN[0])
    cache = PagedCache.from_model(model, page_size=16)
    with pytest.raises(ValueError, match="stateful"):
        tokens_of(model, cache, ids, prompt_lookup_num_tokens=3)
    assert cache.lengths == []


def test_states_are_accounted_for():
    model = model_of(CHOSEN[0])
    pool = PagePool.from_model(model, page_size=16)
    cache = PagedCache(pool=pool)
    assert cache.stats().state_bytes == 0
    logits_of(model, cache, words(3, 17))
    logits_of(model, cache, words(3, 1))
    layers = dynamic(model)
    logits_of(model_of(CHOSEN[0], "sdpa"), layers, words(3, 17))
    held = [*layers.layers[0].conv_states.values(), *layers.layers[0].recurrent_states.values()]
    num_bytes = sum(tensor.nbytes for tensor in held)
    assert cache.stats().state_bytes == pool.stats().state_bytes == num_bytes
    assert "states" in str(cache.stats())
    fork = cache.fork()
    assert pool.stats().state_bytes == num_bytes
    logits_of(model, fork, words(3, 1))
    fork.lengths  # noqa: B018  # ends the pass
    assert pool.stats().state_bytes == 2 * num_bytes
    del fork
    assert pool.stats().state_bytes == num_bytes


def test_a_model_without_keys_is_refused():
    with pytest.raises(ValueError, match="keeps another state, as all of its layers do"):
        PagedCache(transformers.Mamba2Config(num_hidden_layers=2))


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", CHOSEN)
def test_a_prompt_is_prefilled_padded(name, attention):
    mask = left_padded(19, [19, 7])
    ids, model = words(2, 19) * mask, model_of(name, attention)
    cache = PagedCache.from_model(model, page_size=16)
    cache.prefill(model, ids, mask)
    assert cache.get_seq_length() == 18
    found = tokens_of(model, cache, ids, mask)
    assert torch.equal(found, plain_tokens(name, ids, mask))
    turn = torch.cat([found, words(2, 5, seed=1)], dim=1)
    longer = torch.cat([mask, torch.ones(2, 25, dtype=torch.long)], dim=1)
    cache.prefill(model, turn, longer)
    assert cache.get_seq_length() == 43
    plain, expected = model_of(name, "sdpa"), dynamic(model_of(name, "sdpa"))
    tokens_of(plain, expected, ids, mask)
    assert torch.equal(tokens_of(model, cache, turn, longer), tokens_of(plain, expected, turn, longer))
    other = words(2, 21, seed=4)
    again = PagedCache.from_model(model, page_size=16)
    again.prefill(model, ids[:, 12:])
    again.resume(model, other)
    assert torch.equal(tokens_of(model, again, other), plain_tokens(name, other))


def test_a_prefill_that_fails_changes_nothing():
    model = model_of(CHOSEN[0])
    cache = PagedCache.from_model(model, page_size=16)
    ids = words(1, 40)
    logits_of(model, cache, ids[:, :17])
    before = states_of(cache)

    def fail(*args):
        raise Failure

    hook = model.get_decoder().layers[-1].register_forward_hook(fail)
    try:
        with pytest.raises(Failure):
            cache.prefill(model, ids)
    finally:
        hook.remove()
    assert cache.lengths == [17]
    assert are_equal(states_of(cache), before)
    assert torch.equal(tokens_of(model, cache, ids), plain_tokens(CHOSEN[0], ids))


@pytest.mark.parametrize("name", CHOSEN)
def test_rows_that_were_swapped_out_come_back_to_their_states(name):
    model = model_of(name)
    ids = words(2, 17)
    cache = PagedCache(pool=PagePool.from_model(model, page_size=16, host_bytes=2**20))
    logits_of(model, cache, ids)
    cache.swap_out()
    assert cache.stats().num_active_pages == 0
    assert torch.equal(
        tokens_of(model, cache, again := torch.cat([ids, ids[:, :1]], dim=1)), plain_tokens(name, again)
    )


def test_what_would_lose_states_is_refused(tmp_path):
    model = model_of(CHOSEN[0])
    cache = PagedCache.from_model(model, page_size=16)
    logits_of(model, cache, words(1, 17))
    before = states_of(cache)
    with pytest.raises(ValueError, match="which keeps a state that is in no page, so that nothing could go on from"):
        PagePool.from_model(model, page_size=16, prefix_cache=True, store=PrefixStore(tmp_path, 2**20))
    cache.layers[1].keys = cache.layers[1].keys[:, :, :9]
    cache.layers[1].values = cache.layers[1].values[:, :, :9]
    with pytest.raises(ValueError, match="whose recurrent layers have a state for each row"):
        logits_of(model, cache, words(1, 1))
    cache.reset()
    logits_of(model, cache, words(1, 17))
    assert are_equal(states_of(cache), before)


@pytest.mark.parametrize("name", CHOSEN)
def test_a_saved_batch_is_gone_on_from_with_its_states(name, tmp_path):
    mask = left_padded(17, [17, 6])
    ids, model = words(2, 17) * mask, model_of(name)
    cache = PagedCache.from_model(model, page_size=16)
    text = tokens_of(model, cache, ids, mask, new=4)
    cache.save(tmp_path / "cache")
    loaded = PagedCache.load(tmp_path / "cache", model, page_size=32)
    assert are_equal(states_of(loaded), states_of(cache))
    assert loaded.lengths == cache.lengths
    longer = torch.cat([mask, torch.ones_like(text[:, 17:])], dim=1)
    assert torch.equal(tokens_of(model, loaded, text, longer, new=9), plain_tokens(name, ids, mask, new=13))
    assert are_equal(states_of(PagedCache.load(tmp_path / "cache", model)), states_of(cache))
    tensors, metadata = read_tensors(tmp_path / "cache")
    first = next(name for name in tensors if "_states." in name)
    write_tensors(tmp_path / "cut", tensors | {first: tensors[first][:1]}, metadata)
    with pytest.raises(ValueError, match="its parts don't belong together"):
        PagedCache.load(tmp_path / "cut", model)


@pytest.mark.parametrize("name", CHOSEN)
def test_sample_and_an_enabled_model_give_the_same_tokens(name):
    mask = left_padded(19, [19, 7])
    ids, model = words(2, 19) * mask, model_of(name)
    expected = plain_tokens(name, ids, mask)
    cache = PagedCache.from_model(model, page_size=16)
    assert torch.equal(tokens_of(model, cache, ids, mask, custom_generate=hf_paged.sample), expected)
    with hf_paged.enable(model):
        for new in (20, 3, 20):
            found = tokens_of(model, None, ids, mask, new=new)
            assert torch.equal(found, expected[:, : 19 + new])
        told = hf_paged.explain(model)
    assert "hf_paged.sample" in told
    assert "compiled: no" in told
    assert "prefixes: none are looked for, since layer" in told


def test_a_recurrent_layer_that_is_passed_over_holds_nothing(monkeypatch):
    model = model_of(CHOSEN[0])
    cache = PagedCache.from_model(model, page_size=16)
    layer = model.get_decoder().layers[0]

    def pass_over():
        monkeypatch.setattr(layer, "forward", lambda hidden_states, **kwargs: hidden_states)

    pass_over()
    for new in (17, 1):
        logits_of(model, cache, words(2, new))
    assert cache.lengths == [18, 18]
    assert cache.stats().state_bytes == 0
    monkeypatch.undo()
    with pytest.raises(ValueError, match="Layer 0 was given new tokens, but it holds none"):
        logits_of(model, cache, words(2, 1))
    cache.reset()
    logits_of(model, cache, words(2, 17))
    before = states_of(cache)
    pass_over()
    logits_of(model, cache, words(2, 1))
    with pytest.raises(UnclearPassError, match="left out the states of some layers"):
        logits_of(model, cache, words(2, 1))
    cache.roll_back()
    assert cache.lengths == [17, 17]
    assert are_equal(states_of(cache), before)


def test_what_goes_around_torch_counts_as_a_change():
    model = model_of(CHOSEN[3])
    ids = words(1, 17)
    cache = PagedCache.from_model(model, page_size=16)
    logits_of(model, cache, ids)
    cache.get_seq_length()
    states = cache._sequences.rows.states
    logits_of(model, cache, words(1, 1))
    for state in states._versions:  # as kernels do that count no version
        states._versions[state] = states._tensor(state, states[state.layer])._version
    assert cache.get_seq_length() == 18


def test_states_of_inference_mode_are_gone_on_from_without_it():
    model = model_of(CHOSEN[1])
    ids = words(2, 17)
    cache = PagedCache.from_model(model, page_size=16)
    with torch.inference_mode():
        logits_of(model, cache, ids)
    found = tokens_of(model, cache, again := torch.cat([ids, words(2, 1, seed=1)], dim=1))
    assert torch.equal(found, plain_tokens(CHOSEN[1], again))


def test_looking_at_a_state_between_two_passes_changes_nothing():
    model = model_of(CHOSEN[3])
    cache = PagedCache.from_model(model, page_size=16)
    ids = words(2, 17)
    logits_of(model, cache, ids)
    assert cache.get_recurrent_state(2) is not None
    assert cache.has_previous_state()
    found = tokens_of(model, cache, again := torch.cat([ids, words(2, 1, seed=1)], dim=1))
    assert torch.equal(found, plain_tokens(CHOSEN[3], again))
    with pytest.raises(ValueError, match="non linear attention layer"):
        cache.get_conv_state(1)


@pytest.mark.parametrize("name", CHOSEN)
def test_many_prompts_have_the_tokens_of_each_alone(name):
    model = model_of(name)
    prompts = [words(1, length, seed=length)[0].tolist() for length in (19, 1, 33, 16, 40)]
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    expected = [plain_tokens(name, torch.tensor([ids]), new=12)[0, len(ids) :].tolist() for ids in prompts]
    host = PagePool.from_model(model, num_pages=5, page_size=16, host_bytes=2**20)
    for pool in (None, host, PagePool.from_model(model, num_pages=5, page_size=16)):  # the last two run short
        answers = hf_paged.generate_many(model, prompts, pool=pool, max_rows=3, **settings)
        assert [result.tokens for result in answers.in_order()] == expected


def test_rows_are_cropped_alike_or_not_at_all():
    model = model_of("Lfm2ForCausalLM")
    cache = PagedCache.from_model(model, page_size=16)
    cache.activate_past_recording()
    ids = words(2, 17)
    logits_of(model, cache, ids)
    before = states_of(cache)
    with pytest.raises(ValueError, match="whose states are of all columns"):
        cache.crop([-1, -2])
    assert cache.lengths == [17, 17]
    assert are_equal(states_of(cache), before)
    cache.crop([-2, -2])
    assert torch.equal(tokens_of(model, cache, ids), plain_tokens("Lfm2ForCausalLM", ids))


@pytest.mark.parametrize("name", CHOSEN)
def test_drafts_for_single_rows_are_refused(name):
    model = model_of(name)
    cache = PagedCache.from_model(model, page_size=16)
    with pytest.raises(ValueError, match="which keeps a state, of which no token can be taken back"):
        tokens_of(model, cache, words(2, 17), custom_generate=hf_paged.prompt_lookup())
    assert cache.lengths == []
    with pytest.raises(ValueError, match=r"can't draft: layer \d is a .* no token can be taken back"):
        hf_paged.assisted(model)


def test_sinks_of_each_query_are_refused():
    model = model_of("Inkling2ForCausalLM")
    cache = PagedCache.from_model(model, page_size=16)
    with pytest.raises(ValueError, match="sinks of each query"):
        tokens_of(model, cache, words(1, 17))
    cache.roll_back()
    assert cache.lengths == []
    model = model_of("Inkling2ForCausalLM", "eager")
    cache = PagedCache.from_model(model, page_size=16)
    assert torch.equal(tokens_of(model, cache, words(1, 17)), plain_tokens("Inkling2ForCausalLM", words(1, 17)))
