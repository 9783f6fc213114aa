"""A used cache goes on with another version of its history, and keeps what both have in common."""

from unittest.mock import patch

import pytest
import torch
from torch.nn.functional import pad
from transformers import MistralConfig, MistralForCausalLM

from hf_paged import OutOfPagesError, PagedCache, PagePool
from hf_paged._transformers import CACHE
from hf_paged.batch.steps.packed import Packing
from tests.models import left_padded, paged_cache, plain_tokens, random_ids, run, tiny_gemma, tiny_llama, tiny_model

pytestmark = pytest.mark.usefixtures("quick_collection")
SETTINGS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def models():
    return {
        "llama": tiny_llama(),
        "gemma": tiny_gemma(20),
        "mistral": tiny_model(MistralForCausalLM, MistralConfig, sliding_window=20),
    }


@pytest.fixture(params=["llama", "gemma", "mistral"])
def model(request, models):
    return models[request.param].set_attn_implementation("paged_flex") or models[request.param]


@pytest.fixture
def llama(models):
    models["llama"].set_attn_implementation("paged_flex")
    return models["llama"]


def batch(rows):
    """Left-padded ids and their mask."""
    width = max(len(ids) for ids in rows)
    return torch.stack([pad(ids, (width - len(ids), 0)) for ids in rows]), left_padded(width, list(map(len, rows)))


def go_on(model, cache, ids, mask=None, num_new=10, **arguments):
    return model.generate(ids, attention_mask=mask, **{CACHE: cache}, max_new_tokens=num_new, **(SETTINGS | arguments))


def expected(model, ids, mask=None, num_new=10, **arguments):
    attention = model.config._attn_implementation
    tokens = plain_tokens(model, ids, attention_mask=mask, max_new_tokens=num_new, **arguments)
    model.set_attn_implementation(attention)
    return tokens


class Counter:
    """Counts the tokens that are computed packed."""

    def __init__(self):
        self.num_tokens = 0

    def __enter__(self):
        chunk = Packing.chunk

        def counted(packing, begin, end):
            found = chunk(packing, begin, end)
            self.num_tokens += len(found.rows)
            return found

        self._patch = patch.object(Packing, "chunk", counted)
        self._patch.start()
        return self

    def __exit__(self, *error):
        self._patch.stop()


def assert_resumes(model, cache, ids, mask=None, num_computed=None):
    with Counter() as counter:
        cache.resume(model, ids, mask)
    if num_computed is not None:
        assert counter.num_tokens == num_computed
    lengths = torch.ones_like(ids) if mask is None else mask
    assert cache.lengths == lengths[:, :-1].sum(dim=1).tolist()
    cache.pool.check_integrity()
    assert torch.equal(go_on(model, cache, ids, mask), expected(model, ids, mask))
    cache.pool.check_integrity()


# One row


@pytest.mark.parametrize("at", [0, 1, 15, 16, 17, 31, 32, 33, 38, 39, 40, 48])
@pytest.mark.parametrize("length", [12, 33, 60])
def test_an_edit_at_any_place_is_computed_from_there_on(llama, at, length):
    ids = random_ids(1, 40)
    cache = paged_cache(llama)
    tokens = go_on(llama, cache, ids)
    edited = pad(tokens, (0, 20), value=7)[:, :length].clone()
    if at < length:
        edited[0, at] = (edited[0, at] + 1) % 199 + 1
    kept = min(at, length - 1, 49)
    assert_resumes(llama, cache, edited, torch.ones_like(edited), length - 1 - kept)


@pytest.mark.parametrize("at", [2, 25, 45, 48])
def test_an_edit_of_what_has_left_a_window_is_computed_anew(model, at):
    ids = random_ids(1, 40)
    cache = paged_cache(model)
    tokens = go_on(model, cache, ids)
    edited = tokens.clone()
    edited[0, at] = edited[0, at] % 199 + 1
    assert_resumes(model, cache, edited, torch.ones_like(edited))


def test_another_try_of_an_answer_computes_nothing(llama):
    ids = random_ids(1, 40)
    cache = paged_cache(llama)
    go_on(llama, cache, ids)
    assert_resumes(llama, cache, ids, num_computed=0)


def test_what_goes_on_from_all_that_is_cached_computes_what_is_new(model):
    cache = paged_cache(model)
    tokens = go_on(model, cache, random_ids(1, 40))
    longer = torch.cat([tokens, random_ids(1, 6, seed=1)], dim=1)
    assert_resumes(model, cache, longer, torch.ones_like(longer), 6)


def test_a_prompt_of_one_token_leaves_nothing(llama):
    cache = paged_cache(llama)
    go_on(llama, cache, random_ids(1, 20))
    cache.resume(llama, random_ids(1, 1, seed=3))
    assert cache.lengths == []
    cache.pool.check_integrity()


def test_an_empty_cache_is_prefilled(llama):
    assert_resumes(llama, paged_cache(llama), random_ids(2, 20), num_computed=38)


# Batches


def turn(model, cache, rows, num_new=10, **arguments):
    """One turn of conversations: what each holds with its answer."""
    ids, mask = batch(rows)
    cache.resume(model, ids, mask)
    tokens = go_on(model, cache, ids, mask, num_new=num_new, **arguments)
    assert torch.equal(tokens, expected(model, ids, mask, num_new=num_new, **arguments))
    return [row_tokens[-len(row) - num_new :] for row, row_tokens in zip(rows, tokens, strict=True)]


def test_answers_of_different_lengths_go_on_in_a_second_and_third_turn(model):
    cache = paged_cache(model)
    rows = [random_ids(1, length, length)[0] for length in (30, 9, 17)]
    for lengths in ((1, 7, 10), (10, 3, 2)):
        answered = turn(model, cache, rows)
        rows = [
            torch.cat([row, tokens[len(row) : len(row) + length], random_ids(1, 4 + length, length)[0]])
            for row, tokens, length in zip(rows, answered, lengths, strict=True)
        ]
        cache.pool.check_integrity()
    turn(model, cache, rows)


def test_each_row_keeps_what_it_has_in_common(llama):
    cache = paged_cache(llama)
    rows = [random_ids(1, length, length)[0] for length in (30, 21, 17)]
    answered = turn(llama, cache, rows)
    rows = [answered[0][:35], answered[1].clone(), torch.cat([answered[2][:20], random_ids(1, 30)[0]])]
    rows[1][8] = rows[1][8] % 199 + 1
    ids, mask = batch(rows)
    assert_resumes(llama, cache, ids, mask, 0 + (30 - 8) + 29)


def test_rows_that_have_ended_keep_their_answers_without_what_fills_them_up(llama):
    cache = paged_cache(llama)
    ids, mask = batch([random_ids(1, length, length)[0] for length in (30, 9)])
    end = int(go_on(llama, PagedCache.from_model(llama, page_size=16), ids, mask)[1, -7])
    tokens = go_on(llama, cache, ids, mask, eos_token_id=end)
    answer = tokens[1, 30:]
    length = int((answer == end).nonzero()[0]) + 1
    rows = [tokens[0], torch.cat([tokens[1, 21 : 30 + length], random_ids(1, 12)[0]])]
    ids, mask = batch([row if i else row[row.nonzero()[0] :] for i, row in enumerate(rows)])
    assert_resumes(llama, cache, ids, mask)


def test_rows_that_were_released_are_computed_anew(llama):
    cache = paged_cache(llama)
    rows = [random_ids(1, length, length)[0] for length in (30, 21)]
    answered = turn(llama, cache, rows)
    cache.release([0])
    ids, mask = batch([torch.cat([row, random_ids(1, 5)[0]]) for row in answered])
    assert_resumes(llama, cache, ids, mask, 39 + 5 + 5 + 0)


def test_one_row_goes_on_as_many(model):
    cache = paged_cache(model)
    tokens = go_on(model, cache, random_ids(1, 30))[0]
    ids, mask = batch([torch.cat([tokens[:cut], random_ids(1, 8, cut)[0]]) for cut in (39, 36, 20, 2)])
    assert_resumes(model, cache, ids, mask)


def test_equal_rows_are_computed_once(llama):
    cache = paged_cache(llama)
    go_on(llama, cache, random_ids(1, 30))
    ids = random_ids(1, 50).repeat(3, 1)
    ids[:, :30] = random_ids(1, 30)
    assert_resumes(llama, cache, ids, num_computed=19)


def test_padding_on_the_right_and_within_is_told_apart(model):
    cache = paged_cache(model)
    ids, mask = random_ids(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[0, 30:36] = 0
    mask[1, :4] = 0
    go_on(model, cache, ids, mask)
    later, later_mask = ids.clone(), mask.clone()
    later[:, 38] = 9
    assert_resumes(model, cache, later, later_mask)
    later_mask[0, 30:36] = 1
    assert_resumes(model, cache, later, later_mask)
    later_mask[0, :] = 1
    later_mask[0, -5:-1] = 0
    assert_resumes(model, cache, later, later_mask)


def test_tokens_behind_padding_do_not_stay_where_it_is_left_out(model):
    # Behind padding at the end of a prompt, generate() gives an answer other positions than its places; behind padding
    # within, a token sees fewer others through a window.
    ids = random_ids(2, 40)
    for padded in (slice(36, 40), slice(30, 34)):
        cache, mask = paged_cache(model), torch.ones_like(ids)
        mask[1, padded] = 0
        tokens = go_on(model, cache, ids, mask)
        later, later_mask = batch([tokens[0], tokens[1][pad(mask[1], (0, 10), value=1).bool()]])
        assert_resumes(model, cache, later, later_mask)


def test_a_mask_that_leaves_out_what_is_cached_is_another_history(llama):
    cache = paged_cache(llama)
    ids = random_ids(1, 40)
    tokens = go_on(llama, cache, ids)
    mask = torch.ones_like(tokens)
    mask[0, 20:22] = 0
    assert_resumes(llama, cache, tokens, mask, 49 - 2 - 20)


# Forks and other caches


def test_forks_keep_what_they_have(model):
    cache = paged_cache(model)
    ids = random_ids(1, 40)
    tokens = go_on(model, cache, ids)
    fork = cache.fork()
    edited = tokens.clone()
    edited[0, 44] = edited[0, 44] % 199 + 1
    assert_resumes(model, fork, edited, torch.ones_like(edited))
    longer = torch.cat([tokens, random_ids(1, 6, seed=1)], dim=1)
    assert_resumes(model, cache, longer, torch.ones_like(longer), 6)


def test_joined_and_split_conversations_resume(model):
    pool = PagePool.from_model(model, page_size=16)
    rows = [random_ids(1, length, length)[0] for length in (30, 21, 5)]
    caches = [PagedCache(pool=pool) for _ in rows]
    answered = [turn(model, cache, [row])[0] for cache, row in zip(caches, rows, strict=True)]
    joined = PagedCache.concatenate(caches)
    answered = turn(model, joined, [torch.cat([row[:-2], random_ids(1, 9)[0]]) for row in answered])
    for part, row in zip(joined.split(), answered, strict=True):
        turn(model, part, [torch.cat([row, random_ids(1, 3)[0]])])
    pool.check_integrity()


def test_what_others_have_computed_is_found_where_it_is_more_than_what_stays(model):
    pool = PagePool.from_model(model, page_size=16, prefix_cache=True)
    shared = random_ids(1, 70)[0]
    first = PagedCache(pool=pool)
    first.prefill(model, shared[None])
    cache = PagedCache(pool=pool)
    row = torch.cat([shared[:20], random_ids(1, 30, 5)[0]])
    turn(model, cache, [row])
    assert_resumes(model, cache, shared[None], num_computed=69 - 64)
    assert_resumes(model, cache, torch.cat([shared, random_ids(1, 5)[0]])[None], num_computed=4)


def test_a_changed_history_is_found_by_others(model):
    pool = PagePool.from_model(model, page_size=16, prefix_cache=True)
    cache = PagedCache(pool=pool)
    cache.prefill(model, random_ids(1, 70))
    edited = random_ids(1, 70)
    edited[0, 60:] = 5
    cache.resume(model, edited)
    other = PagedCache(pool=pool)
    with Counter() as counter:
        other.prefill(model, edited)
    assert counter.num_tokens == 69 - 64
    assert torch.equal(go_on(model, other, edited), expected(model, edited))
    cache.commit(go_on(model, cache, edited))
    pool.check_integrity()


def test_rows_with_the_same_change_wait_for_the_first_one(llama):
    pool = PagePool.from_model(llama, page_size=16, prefix_cache=True)
    cache = PagedCache(pool=pool)
    ids = torch.cat([random_ids(1, 40).repeat(2, 1), random_ids(2, 8)], dim=1)
    cache.prefill(llama, ids)
    other = torch.cat([random_ids(1, 20).repeat(2, 1), random_ids(1, 90, 5).repeat(2, 1), random_ids(2, 8)], dim=1)
    other[:, :20] = ids[:, :20]
    assert_resumes(llama, cache, other, num_computed=(117 - 20) + (117 - 96))


def test_what_another_model_has_computed_does_not_stay(llama):
    pool = PagePool.from_model(llama, page_size=16, prefix_cache=True)
    cache = PagedCache(pool=pool)
    ids = random_ids(1, 50)
    cache.prefill(llama, ids)
    weight = llama.model.layers[0].mlp.down_proj.weight
    try:
        weight.data.neg_()
        edited = ids.clone()
        edited[0, 40] = 3
        assert_resumes(llama, cache, edited, num_computed=49)
    finally:
        weight.data.neg_()


# Not packed


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_other_attention_keeps_what_all_rows_have_in_common(model, attention):
    ids = random_ids(2, 30)
    cache = PagedCache.from_model(model, page_size=16)
    model.set_attn_implementation(attention)
    tokens = go_on(model, cache, ids, torch.ones_like(ids))
    later = torch.cat([tokens[:, :36], random_ids(2, 5)], dim=1)
    later[1, 34] = later[1, 34] % 199 + 1
    cache.resume(model, later, torch.ones_like(later))
    assert cache.get_seq_length() == 40
    assert torch.equal(
        go_on(model, cache, later, torch.ones_like(later)), expected(model, later, torch.ones_like(later))
    )
    cache.pool.check_integrity()


def test_hooked_models_go_on_from_a_column_of_the_new_batch(llama):
    cache = paged_cache(llama)
    rows = [random_ids(1, length, length)[0] for length in (30, 9, 17)]
    answered = turn(llama, cache, rows)
    passes = []
    handle = llama.model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs), with_kwargs=True
    )
    try:
        rows = [
            torch.cat([row[:-cut], random_ids(1, 4 + cut, cut)[0]])
            for row, cut in zip(answered, (1, 4, 5), strict=True)
        ]
        ids, mask = batch(rows)
        cache.resume(llama, ids, mask)
        assert passes[0]["input_ids"].shape == (3, 9)  # of 43 columns
    finally:
        handle.remove()
    assert torch.equal(go_on(llama, cache, ids, mask), expected(llama, ids, mask))
    cache.pool.check_integrity()


# prefill() of another prompt


def test_prefill_goes_on_with_another_prompt(model):
    cache = paged_cache(model)
    rows = [random_ids(1, length, length)[0] for length in (30, 9)]
    answered = turn(model, cache, rows)
    ids, mask = batch([torch.cat([row[:-3], random_ids(1, 6, len(row))[0]]) for row in answered])
    cache.prefill(model, ids, mask)
    assert torch.equal(go_on(model, cache, ids, mask), expected(model, ids, mask))


def test_generate_alone_names_the_way_out(llama):
    cache = paged_cache(llama)
    ids = random_ids(1, 30)
    cache.prefill(llama, ids)
    other = ids.clone()
    other[0, 10] = 3
    with pytest.raises(
        ValueError, match=r"holds another prompt.*Call cache.resume\(model, input_ids, attention_mask\)"
    ):
        go_on(llama, cache, other)
    cache.resume(llama, other)
    assert torch.equal(go_on(llama, cache, other), expected(llama, other))


# Mistakes


def by_hand(model, cache, ids):
    run(model, cache, ids, [ids.shape[1]])


def hidden(model, cache, ids):
    cache.prefill(model, ids)
    mask = torch.ones_like(ids)
    mask[:, 5:9] = 0
    go_on(model, cache, ids, mask)


def moved(model, cache, ids):
    go_on(model, cache, ids, position_ids=torch.arange(ids.shape[1])[None] + 3)


def edited(model, cache, ids):
    cache.prefill(model, ids)
    cache.layers[0].keys[:, :, 4] += 1


def assigned(model, cache, ids):
    cache.prefill(model, ids)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, 2:], layer.values[:, :, 2:]


def embedded(model, cache, ids):
    go_on(model, cache, None, inputs_embeds=model.get_input_embeddings()(ids))


def padded_unseen(model, cache, ids):
    model.set_attn_implementation("sdpa")
    go_on(model, cache, ids.repeat(2, 1), left_padded(ids.shape[1], [ids.shape[1], 10]))
    model.set_attn_implementation("paged_flex")
    cache.batch_select_indices(torch.tensor([1]))


@pytest.mark.parametrize("fill", [by_hand, hidden, moved, edited, assigned, embedded, padded_unseen])
def test_what_ids_alone_have_not_made_is_not_resumed(llama, fill):
    cache = paged_cache(llama)
    with torch.no_grad():
        fill(llama, cache, random_ids(1, 30))
    lengths = cache.lengths
    with pytest.raises(ValueError, match=r"resume\(\) was called on a cache of which it isn't known"):
        cache.resume(llama, random_ids(1, 40))
    assert cache.lengths == lengths
    cache.reset()
    assert_resumes(llama, cache, random_ids(1, 40))


def test_a_pass_of_the_caller_s_after_a_prompt_is_unknown(llama):
    cache = paged_cache(llama)
    go_on(llama, cache, random_ids(1, 30))
    with torch.no_grad():
        llama(random_ids(1, 2), **{CACHE: cache})
    with pytest.raises(ValueError, match="it isn't known"):
        cache.resume(llama, random_ids(1, 20))
    cache.crop(-2)
    assert_resumes(llama, cache, random_ids(1, 20), num_computed=0)


def test_other_numbers_of_rows_are_refused(llama):
    cache = paged_cache(llama)
    go_on(llama, cache, random_ids(2, 30))
    with pytest.raises(ValueError, match="holds 2 rows, but a batch of 3"):
        cache.resume(llama, random_ids(3, 30))


def test_a_cache_that_can_t_go_on_is_as_it_was(llama):
    pool = PagePool.from_model(llama, num_pages=6, page_size=16)
    cache = PagedCache(pool=pool)
    ids = random_ids(1, 40)
    cache.prefill(llama, ids)
    held = [cache.gather(layer) for layer in range(len(cache))]
    other = random_ids(1, 120)
    other[0, :20] = ids[0, :20]
    with pytest.raises(OutOfPagesError):
        cache.resume(llama, other)
    assert cache.lengths == [39]
    for layer, (keys, values) in enumerate(held):
        assert torch.equal(cache.gather(layer)[0], keys)
        assert torch.equal(cache.gather(layer)[1], values)
    assert torch.equal(go_on(llama, cache, ids), expected(llama, ids))
    pool.check_integrity()


def test_a_pass_that_fails_leaves_the_cache_as_it_was(llama):
    cache = paged_cache(llama)
    ids = random_ids(1, 40)
    cache.prefill(llama, ids)
    other = ids.clone()
    other[0, 35] = 3
    with (
        patch.object(type(llama.model.layers[0].mlp), "forward", side_effect=RuntimeError("broken")),
        pytest.raises(RuntimeError, match="broken"),
    ):
        cache.resume(llama, other)
    assert cache.lengths == [39]
    assert torch.equal(go_on(llama, cache, ids), expected(llama, ids))
    cache.pool.check_integrity()
