"""A cache notices that it is given another prompt than the one that it holds, and nothing else."""

import functools

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, PreTrainedModel, pipeline

from hf_paged import PagedCache, ReleaseFinished, compiled
from hf_paged.batch.known_ids import KnownIds
from hf_paged.compile import api
from tests.models import generate, left_padded, letter_tokenizer, paged_cache, random_ids, run, tiny_llama, tiny_model
from tests.models import plain_tokens as plain

ATTENTION = pytest.mark.parametrize("attention", ["paged_flex", "sdpa"])


@functools.cache
def llama() -> PreTrainedModel:
    return tiny_llama()


@functools.cache
def mistral() -> PreTrainedModel:
    return tiny_model(MistralForCausalLM, MistralConfig, sliding_window=24)


def known(cache: PagedCache) -> tuple[int, int]:
    """Columns that are known, from and to."""
    record: KnownIds = cache._sequences.rows.known_ids
    return (record._first, record._end) if record._ids is not None else (0, 0)


def other_in(ids: Tensor, row: int, column: int) -> Tensor:
    """The same ids but for one."""
    other = ids.clone()
    other[row, column] = 3 if other[row, column] != 3 else 4
    return other


def longer(ids: Tensor, count: int = 5) -> Tensor:
    return torch.cat([ids, random_ids(len(ids), count, seed=9)], dim=1)


def assert_goes_on(model, attention: str, cache: PagedCache, ids: Tensor, **arguments) -> Tensor:
    expected = plain(model, ids, **arguments)
    actual = generate(model, attention, cache, ids, **arguments)
    assert torch.equal(actual, expected)
    cache.pool.check_integrity()
    return actual


# What is noticed


@ATTENTION
@pytest.mark.parametrize(("row", "column"), [(0, 0), (1, 15), (1, 16), (0, 19), (1, 22), (0, 26)])
def test_another_token_in_any_cached_column_raises_and_nothing_has_changed(attention, row, column):
    model, ids = llama(), random_ids(2, 20)
    cache = paged_cache(model)
    said = generate(model, attention, cache, ids, max_new_tokens=8)  # 27 columns are cached
    before, lengths = cache.gather(1), cache.lengths
    wanted = other_in(longer(said), row, column)
    with pytest.raises(
        ValueError, match=rf"row {row} has token {said[row, column]} in column {column}, but input_ids"
    ):
        generate(model, attention, cache, wanted)
    assert cache.lengths == lengths
    assert all(torch.equal(found, held) for found, held in zip(cache.gather(1), before, strict=True))
    assert_goes_on(model, attention, cache, longer(said))


@ATTENTION
def test_the_error_says_what_makes_the_cache_right(attention):
    model, ids = llama(), random_ids(2, 20)
    cache = paged_cache(model)
    said = generate(model, attention, cache, ids, max_new_tokens=8)
    wanted = other_in(other_in(longer(said), 0, 21), 1, 18)
    with pytest.raises(ValueError, match=r"call cache.crop\(-9\) to go on from the 18 columns") as caught:
        generate(model, attention, cache, wanted)
    assert all(remedy in str(caught.value) for remedy in ("a new cache", "cache.reset()", "cache.fork()"))
    cache.crop(-9)
    assert_goes_on(model, attention, cache, wanted)


@ATTENTION
def test_a_pipeline_over_a_list_raises_at_the_second_entry(attention):
    model = llama()
    model.set_attn_implementation(attention)
    write = pipeline("text-generation", model=model, tokenizer=letter_tokenizer())
    texts = ["hello there", "the quick brown fox jumps over the lazy dog"]
    cache = PagedCache.from_model(model, page_size=16)
    with pytest.raises(ValueError, match="holds another prompt: row 0 has token"):
        write(texts, past_key_values=cache, max_new_tokens=6, do_sample=False, eos_token_id=None)


@pytest.mark.parametrize("max_new_tokens", [1, 9])
def test_a_shorter_prompt_or_the_same_one_raises(max_new_tokens):
    model, ids = llama(), random_ids(1, 20)
    cache = paged_cache(model)
    generate(model, "paged_flex", cache, ids, max_new_tokens=max_new_tokens)
    with pytest.raises(ValueError, match="holds another prompt"):
        generate(model, "paged_flex", cache, random_ids(1, 12, seed=5))
    with pytest.raises(ValueError, match="no token is left to compute"):
        generate(model, "paged_flex", cache, ids)


def test_what_prefill_has_computed_is_noticed():
    model, ids, mask = llama(), random_ids(3, 30), left_padded(30, [30, 20, 7])
    cache = paged_cache(model)
    cache.prefill(model, ids[:, :20], mask[:, :20])
    assert known(cache) == (0, 19)
    for row, column in ((0, 0), (1, 12)):
        with pytest.raises(ValueError, match=f"row {row} has token .* in column {column}"):
            generate(model, "paged_flex", cache, other_in(ids, row, column), attention_mask=mask)
    cache.prefill(model, other_in(ids, 2, 3), mask)  # padding may be anything
    assert known(cache) == (0, 29)
    assert_goes_on(model, "paged_flex", cache, ids, attention_mask=mask)


def test_only_new_ids_without_a_mask_of_all_columns_raise():
    model, ids = llama(), random_ids(1, 20)
    cache = paged_cache(model)
    said = generate(model, "paged_flex", cache, ids, max_new_tokens=4)
    with pytest.raises(ValueError, match="holds another prompt"):
        generate(model, "paged_flex", cache, random_ids(1, 40, seed=5))
    new = random_ids(1, 40, seed=5)
    both = torch.cat([said[:, :23], new], dim=1)
    actual = generate(model, "paged_flex", cache, new, attention_mask=torch.ones(1, 63, dtype=torch.long))
    assert torch.equal(actual[:, 40:], plain(model, both)[:, 63:])


@pytest.mark.parametrize(
    "mode", [{"prompt_lookup_num_tokens": 4}, {"assistant_model": llama}], ids=["lookup", "draft"]
)
def test_assistance_on_a_cache_that_holds_tokens_raises(mode):
    """`generate()` computes the whole prompt there, behind what is cached."""
    model, ids = llama(), random_ids(1, 20)
    mode = {name: value() if callable(value) else value for name, value in mode.items()}
    cache = paged_cache(model)
    cache.prefill(model, ids)
    with pytest.raises(ValueError, match="computes the whole prompt once more where it is assisted"):
        generate(model, "paged_flex", cache, ids, **mode)
    assert_goes_on(model, "paged_flex", cache, ids)


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_row_of_a_batch_is_compared(side):
    model, ids = llama(), random_ids(3, 24)
    mask = left_padded(24, [24, 9, 17])
    mask = mask.flip(1) if side == "right" else mask
    mask[:, -1] = 1
    cache = paged_cache(model)
    said = generate(model, "paged_flex", cache, ids, attention_mask=mask, max_new_tokens=5)
    ids = longer(said)
    mask = torch.cat([mask, torch.ones(3, 10, dtype=torch.long)], dim=1)
    for row in range(3):
        column = int(mask[row].nonzero()[2])
        with pytest.raises(ValueError, match=f"row {row} has token .* in column {column}"):
            generate(model, "paged_flex", cache, other_in(ids, row, column), attention_mask=mask)
    assert_goes_on(model, "paged_flex", cache, ids, attention_mask=mask)


def test_beams_that_lost_are_not_gone_on_from_silently():
    model, ids = llama(), random_ids(1, 20)
    cache = paged_cache(model)
    best = generate(model, "paged_flex", cache, ids, num_beams=3, max_new_tokens=8)
    with pytest.raises(ValueError, match=r"cache.crop\(-\d+\) to go on from the \d+ columns"):
        generate(model, "paged_flex", cache, longer(best.repeat(3, 1)))
    cache.crop(20 - cache.get_seq_length())
    assert_goes_on(model, "paged_flex", cache, longer(ids), num_beams=3)


def test_what_is_known_follows_the_rows():
    model, ids = llama(), random_ids(3, 20)
    cache = paged_cache(model)
    said = generate(model, "paged_flex", cache, ids, max_new_tokens=6)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    with pytest.raises(ValueError, match="row 0 has token"):
        generate(model, "paged_flex", cache, longer(said))
    cache.batch_select_indices(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    turned = said[[0, 0, 2, 2]]
    with pytest.raises(ValueError, match="row 2 has token"):
        generate(model, "paged_flex", cache, longer(said[[0, 0, 1, 2]]))
    fork = cache.fork()
    fork.crop(-3)
    assert known(fork) == (0, 22)
    assert known(cache) == (0, 25)
    assert_goes_on(model, "paged_flex", fork, longer(turned[:, :22]))
    assert_goes_on(model, "paged_flex", cache, longer(turned))
    cache.reset()
    assert known(cache) == (0, 0)
    assert_goes_on(model, "paged_flex", cache, random_ids(2, 30, seed=4))


def test_tokens_that_were_made_in_compiled_steps_are_known(monkeypatch):
    graphs = []
    monkeypatch.setattr(api, "compile_graph", lambda graph, *_: graphs.append(graph) or graph)  # dynamo's part alone
    model, ids = llama(), random_ids(1, 20)
    cache = paged_cache(model)
    model.set_attn_implementation("paged_flex")
    with compiled(model):
        said = generate(model, "paged_flex", cache, ids, max_new_tokens=6)
        assert known(cache) == (0, 25)
        for column in (3, 24):
            with pytest.raises(ValueError, match=f"in column {column}"):
                generate(model, "paged_flex", cache, other_in(longer(said), 0, column))
        actual = generate(model, "paged_flex", cache, longer(said))
    assert torch.equal(actual, plain(model, longer(said)))
    assert graphs


# What is no mistake


MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams-of-several": {"num_beams": 3, "num_return_sequences": 2},
    "chunks": {"prefill_chunk_size": 7},
    "lookup": {"prompt_lookup_num_tokens": 4},
    "draft-that-is-right": {"assistant_model": mistral},
    "draft-that-is-wrong": {"assistant_model": llama},
    "dictionary": {"return_dict_in_generate": True, "output_logits": True},
}


@ATTENTION
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_goes_on_over_a_new_cache_and_leaves_what_it_computed_known(attention, mode):
    model = mistral()
    arguments = {name: value() if callable(value) else value for name, value in MODES[mode].items()}
    ids = random_ids(1 if "draft" in mode or mode == "lookup" else 2, 20)
    ids[:, 10:] = ids[:, :10]
    expected = plain(model, ids, **arguments)
    cache = paged_cache(model)
    actual = generate(model, attention, cache, ids, **arguments)
    if mode == "dictionary":
        expected, actual = expected.sequences, actual.sequences
    assert torch.equal(actual, expected)
    assert known(cache) == (0, cache.get_seq_length())
    if "beams" not in mode:
        assert_goes_on(model, attention, cache, longer(actual))


@ATTENTION
def test_samples_of_one_prompt_go_on(attention):
    model, ids = llama(), random_ids(2, 20)
    cache = paged_cache(model)
    said = generate(model, attention, cache, ids, do_sample=True, num_return_sequences=3, max_new_tokens=6)
    assert_goes_on(model, attention, cache, longer(said))


@ATTENTION
@pytest.mark.parametrize("arguments", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 3}], ids=str)
def test_one_cached_row_becomes_many(attention, arguments):
    model, ids = llama(), random_ids(1, 20)
    model.set_attn_implementation(attention)
    cache = PagedCache.from_model(model, page_size=16)
    cache.prefill(model, ids)
    with pytest.raises(ValueError, match=r"row 0 has token .* in column 7"):
        generate(model, attention, cache, other_in(ids, 0, 7), **arguments)
    assert_goes_on(model, attention, cache, ids, **arguments)


def test_one_cached_row_becomes_prompts_that_part_with_padding_in_between():
    model, prefix = llama(), random_ids(1, 20)
    cache = paged_cache(model)
    generate(model, "paged_flex", cache, prefix, max_new_tokens=1)
    assert known(cache) == (0, 20)
    ids = torch.cat([prefix.repeat(3, 1), random_ids(3, 12, seed=2)], dim=1)
    mask = torch.cat([torch.ones(3, 20, dtype=torch.long), left_padded(12, [12, 5, 1])], dim=1)
    with pytest.raises(ValueError, match=r"row 1 has token .* in column 19"):
        generate(model, "paged_flex", cache.fork(), other_in(ids, 1, 19), attention_mask=mask)
    assert_goes_on(model, "paged_flex", cache, ids, attention_mask=mask)


def test_hidden_tokens_may_be_anything():
    model, ids, mask = llama(), random_ids(2, 30), torch.ones(2, 30, dtype=torch.long)
    cache = paged_cache(model)
    generate(model, "paged_flex", cache, ids[:, :20], max_new_tokens=1)
    mask[0, 4] = 0
    generate(model, "paged_flex", cache, other_in(ids, 0, 4), attention_mask=mask)


@ATTENTION
def test_three_turns_of_a_ragged_batch_go_on(attention):
    model = llama()

    def talk(cache, attention):
        ids, mask = random_ids(3, 20), left_padded(20, [20, 6, 11])
        for turn in range(3):
            ids = generate(model, attention, cache, ids, attention_mask=mask, max_new_tokens=6)
            new = torch.ones(3, ids.shape[1] - mask.shape[1], dtype=torch.long)
            mask = torch.cat([mask, new, left_padded(9, [9, 4, 2])], dim=1)
            ids = torch.cat([ids, random_ids(3, 9, seed=turn + 1)], dim=1)
        return ids

    expected = talk(DynamicCache(config=model.config), "sdpa")
    assert torch.equal(talk(paged_cache(model), attention), expected)


def test_released_rows_may_be_given_anything():
    model, ids = llama(), random_ids(3, 20)
    cache = paged_cache(model)
    end = int(plain(model, ids, max_new_tokens=4)[1, -1])
    finished = ReleaseFinished(cache, eos_token_id=end)
    settings = {"stopping_criteria": [finished], "eos_token_id": end, "max_new_tokens": 8}
    said = generate(model, "paged_flex", cache, ids, **settings)
    assert cache.lengths[1] == 0
    ids = longer(other_in(said, 1, 2))
    mask = torch.ones_like(ids)
    mask[1, said.shape[1] - 1 :] = 0
    actual = generate(model, "paged_flex", cache, ids, attention_mask=mask, eos_token_id=None)
    assert torch.equal(actual[[0, 2]], plain(model, ids)[[0, 2]])


def test_ids_that_are_changed_afterwards_are_remembered_as_they_were():
    model, ids = llama(), random_ids(1, 20)
    cache = paged_cache(model)
    generate(model, "paged_flex", cache, ids, max_new_tokens=1)
    whole = longer(ids)
    ids.fill_(7)
    assert_goes_on(model, "paged_flex", cache, whole)


# What is unknown


def test_columns_of_passes_by_hand_are_not_compared():
    model, ids = llama(), random_ids(2, 40)
    cache = paged_cache(model)
    run(model, cache, ids[:, :20], [20])
    assert known(cache) == (0, 0)
    actual = generate(model, "paged_flex", cache, other_in(ids[:, :30], 0, 5), max_new_tokens=4)
    assert torch.equal(actual[:, 30:], plain(model, ids[:, :30], max_new_tokens=4)[:, 30:])
    assert known(cache) == (20, 33)
    with pytest.raises(ValueError, match=r"row 1 has token .* in column 32"):
        generate(model, "paged_flex", cache, other_in(longer(actual), 1, 32))
    run(model, cache, ids[:, 33:], [7])
    assert known(cache) == (20, 33)
    cache.crop(-25)
    assert known(cache) == (0, 0)


def test_a_pass_that_failed_makes_nothing_known():
    model, ids = llama(), random_ids(2, 20)
    cache = paged_cache(model)
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, "paged_flex", cache, ids)
    hook.remove()
    cache.roll_back()
    run(model, cache, ids.flip(1)[:, :20], [20])
    assert known(cache) == (0, 0)
    assert_goes_on(model, "paged_flex", cache, longer(ids.flip(1)))


def test_embeddings_are_not_compared():
    model, ids = llama(), random_ids(2, 20)
    model.set_attn_implementation("sdpa")
    embeds = model.get_input_embeddings()(ids)
    expected = generate(model, "sdpa", DynamicCache(config=model.config), None, inputs_embeds=embeds)
    cache = paged_cache(model)
    actual = generate(model, "paged_flex", cache, None, inputs_embeds=embeds)
    assert torch.equal(actual, expected)
    assert known(cache) == (0, 0)
    whole = torch.cat([ids, actual], dim=1)
    assert_goes_on(model, "paged_flex", cache, whole, max_new_tokens=5)


def test_a_loop_of_ones_own_is_not_looked_into():
    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        kv_cache = next(kwargs[name] for name in ("cache", "past_key_values") if name in kwargs)
        for _ in range(4):
            new = input_ids[:, kv_cache.get_seq_length() :]
            output = model(new, **{name: kv_cache for name in ("cache", "past_key_values") if name in kwargs})
            input_ids = torch.cat([input_ids, output.logits[:, -1:].argmax(-1)], dim=1)
        return input_ids

    model, ids = llama(), random_ids(2, 20)
    cache = paged_cache(model)
    said = generate(model, "paged_flex", cache, ids, custom_generate=loop)
    assert torch.equal(said, plain(model, ids, max_new_tokens=4))
    assert known(cache) == (0, 0)
    assert_goes_on(model, "paged_flex", cache, longer(said))


def test_another_cache_that_is_filled_meanwhile_is_not_told_these_ids():
    model, ids = llama(), random_ids(1, 20)
    cache, inner = paged_cache(model), paged_cache(model)

    def look(input_ids, scores):
        with torch.no_grad():
            model(random_ids(1, 1, seed=int(input_ids.shape[1])), use_cache=True, past_key_values=inner)
        return scores

    said = generate(model, "paged_flex", cache, ids, logits_processor=[look], max_new_tokens=6)
    assert known(cache) == (0, 25)
    assert known(inner) == (0, 0)
    assert_goes_on(model, "paged_flex", cache, longer(said))
