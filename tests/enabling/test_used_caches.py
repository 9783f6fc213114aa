"""A used cache that an enabled model is given another prompt with goes on with that prompt."""

from functools import wraps

import pytest
import torch
from transformers import LlamaModel

import hf_paged
from hf_paged import PagedCache, PagePool
from hf_paged._transformers import CACHE
from tests.models import random_ids, tiny_gemma, tiny_llama

NUM_NEW = 6


@pytest.fixture
def llama():
    return tiny_llama()


@pytest.fixture
def num_computed(monkeypatch):
    """Tokens that decoders were given, pass by pass, since the list was cleared."""
    counts, forward = [], LlamaModel.forward

    @wraps(forward)
    def counting(self, input_ids=None, *args, **kwargs):
        counts.append(input_ids.numel())
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", counting)
    return counts


def generate(model, ids, mask=None, **arguments):
    torch.manual_seed(0)
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": NUM_NEW}
    return model.generate(ids, attention_mask=mask, **(settings | arguments))


def padded(rows):
    """The ids and the mask of rows of different lengths, padded on the left."""
    width = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
    masks = [torch.nn.functional.pad(torch.ones_like(row), (width - row.shape[1], 0)) for row in rows]
    return ids, torch.cat(masks)


def changed(ids, column):
    other = ids.clone()
    other[:, column] = (other[:, column] + 1) % 100
    return other


@pytest.mark.parametrize("attention", ["full", "windowed"])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}, {"custom_generate": hf_paged.sample}],
    ids=["greedy", "beams", "samples", "sample"],
)
def test_another_prompt_gives_the_tokens_of_a_new_cache(attention, arguments):
    model = tiny_llama() if attention == "full" else tiny_gemma(24)
    first = random_ids(1, 40)
    others = [first, first[:, :20], changed(first, 15), random_ids(1, 70, 1), changed(random_ids(1, 70, 1), 69)]
    expected = [generate(model, ids, **arguments) for ids in others]
    with hf_paged.enable(model, compile=False):
        cache = PagedCache(pool=PagePool(model.config, page_size=16))
        generate(model, first, **{CACHE: cache}, **arguments)
        for ids, tokens in zip(others, expected, strict=True):
            assert torch.equal(generate(model, ids, **{CACHE: cache}, **arguments), tokens)
            assert "another one than the cache held" in hf_paged.explain(model)
        cache.pool.check_integrity()


def test_a_growing_conversation_computes_what_is_new(llama, num_computed):
    with hf_paged.enable(llama, compile=False, prefix_cache=False):
        cache, conversation, num_known = PagedCache(pool=PagePool(llama.config)), random_ids(1, 40), 0
        for turn in range(3):
            num_computed.clear()
            answer = generate(llama, conversation, **{CACHE: cache})
            assert sum(num_computed) == answer.shape[1] - 1 - num_known
            num_known = answer.shape[1] - 1
            conversation = torch.cat([answer, random_ids(1, 10, turn)], dim=1)


def test_a_changed_history_is_computed_from_the_change_on(llama, num_computed):
    with hf_paged.enable(llama, compile=False):
        cache, ids = PagedCache(pool=PagePool(llama.config)), random_ids(1, 60)
        generate(llama, ids, **{CACHE: cache})
        num_computed.clear()
        generate(llama, changed(ids, 50), **{CACHE: cache})
        assert sum(num_computed) == 60 - 50 + NUM_NEW - 1
        num_computed.clear()
        generate(llama, changed(ids, 50), **{CACHE: cache})  # once more
        assert sum(num_computed) == NUM_NEW


def test_a_batch_goes_on_though_its_padding_moves_and_rows_have_ended(llama, num_computed):
    rows = [random_ids(1, 20 + 7 * row, row) for row in range(3)]
    first, mask = padded(rows)
    ends = generate(llama, first, mask)[0, first.shape[1] + 1].item()  # what the first row says second
    with hf_paged.enable(llama, compile=False):
        cache = PagedCache(pool=PagePool(llama.config, page_size=16))
        answers = generate(llama, first, mask, eos_token_id=ends, **{CACHE: cache})[:, first.shape[1] :]
        said = [answers[row : row + 1, : 2 if row == 0 else NUM_NEW] for row in range(3)]
        rows = [torch.cat([row, answer, random_ids(1, 5, 9)], 1) for row, answer in zip(rows, said, strict=True)]
        second, mask = padded(rows)
        num_computed.clear()
        found = generate(llama, second, mask, **{CACHE: cache})
        # Five new tokens each, but for the last one; what was said last was not computed either, but by the row that
        # had ended.
        assert num_computed[0] == 4 + 5 + 5
    assert torch.equal(found, generate(llama, second, mask))


def test_a_mask_that_hides_what_is_cached_is_another_prompt(llama):
    ids, mask = torch.full((1, 40), 7), torch.ones(1, 40, dtype=torch.long)
    mask[:, :5] = 0
    with hf_paged.enable(llama, compile=False):
        cache = PagedCache(pool=PagePool(llama.config))
        generate(llama, ids[:, :30], max_new_tokens=1, **{CACHE: cache})
        found = generate(llama, ids, mask, **{CACHE: cache}, return_dict_in_generate=True, output_logits=True)
    expected = generate(llama, ids, mask, return_dict_in_generate=True, output_logits=True)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)


def test_what_each_pass_gives_is_shown_as_with_a_new_cache(llama):
    ids, shown = random_ids(1, 40), {"return_dict_in_generate": True, "output_hidden_states": True}
    expected = generate(llama, ids, **shown)
    with hf_paged.enable(llama, compile=False):
        cache = PagedCache(pool=PagePool(llama.config))
        generate(llama, changed(ids, 30), **{CACHE: cache})
        found = generate(llama, ids, **{CACHE: cache}, **shown)
    torch.testing.assert_close(found.hidden_states, expected.hidden_states, atol=1e-4, rtol=1e-4)


def test_positions_of_the_callers_are_computed_anew(llama):
    ids = random_ids(1, 40)
    positions = 2 * torch.arange(40)[None]
    expected = generate(llama, ids, position_ids=positions)
    with hf_paged.enable(llama, compile=False):
        cache = PagedCache(pool=PagePool(llama.config))
        generate(llama, changed(ids, 30), **{CACHE: cache})
        assert torch.equal(generate(llama, ids, position_ids=positions, **{CACHE: cache}), expected)


def test_prompts_that_cannot_be_packed_go_on_too(llama):
    ids = random_ids(1, 40)
    expected = generate(llama, ids)
    llama.model.register_forward_pre_hook(lambda *_: None)
    with hf_paged.enable(llama, compile=False):
        cache = PagedCache(pool=PagePool(llama.config))
        generate(llama, changed(ids, 30), **{CACHE: cache})
        assert torch.equal(generate(llama, ids, **{CACHE: cache}), expected)


def test_new_tokens_alone_go_on_behind_what_is_cached(llama):
    ids, new = random_ids(1, 40), random_ids(1, 3, 1)
    with hf_paged.enable(llama, compile=False):
        cache = PagedCache(pool=PagePool(llama.config))
        answer = generate(llama, ids, **{CACHE: cache})[:, :-1]
        found = generate(llama, new, torch.ones(1, answer.shape[1] + 3, dtype=torch.long), **{CACHE: cache})
    assert torch.equal(found[:, 3:], generate(llama, torch.cat([answer, new], 1))[:, answer.shape[1] + 3 :])


# What is refused, and what stays then


def used(llama, num_rows=1, **arguments):
    cache = PagedCache(pool=PagePool(llama.config, page_size=16, **arguments))
    generate(llama, random_ids(num_rows, 40), **{CACHE: cache})
    return cache


def test_other_numbers_of_rows_are_refused(llama):
    with hf_paged.enable(llama, compile=False):
        cache = used(llama, num_rows=3)
        with pytest.raises(ValueError, match="holds 3 rows, but a batch of 2 was given"):
            generate(llama, random_ids(2, 40, 1), **{CACHE: cache})
        assert cache.lengths == [45] * 3


def test_a_draft_beside_another_prompt_is_refused(llama):
    with hf_paged.enable(llama, compile=False):
        cache = used(llama)
        with pytest.raises(ValueError, match=r"computes the whole prompt once more .* \(cache.reset\(\)"):
            generate(llama, random_ids(1, 30, 1), prompt_lookup_num_tokens=2, **{CACHE: cache})


def test_a_cache_of_unknown_tokens_is_refused(llama):
    ids = random_ids(1, 40)
    with hf_paged.enable(llama, compile=False):
        cache = used(llama)
        cache.layers[0].values[:, :, 3:6] = 0
        with pytest.raises(ValueError, match="The cache holds another prompt"):
            generate(llama, random_ids(1, 50, 1), **{CACHE: cache})
        assert torch.equal(generate(llama, ids, **{CACHE: cache.reset() or cache}), generate(llama, ids))


def test_a_pool_that_is_too_small_leaves_the_cache_as_it_was(llama):
    with hf_paged.enable(llama, compile=False):
        cache = used(llama, num_pages=6)
        with pytest.raises(hf_paged.OutOfPagesError, match="more pages"):
            generate(llama, random_ids(1, 90, 1), **{CACHE: cache})
        assert cache.lengths == [45]
        cache.pool.check_integrity()


def test_without_enable_another_prompt_is_refused(llama):
    llama.set_attn_implementation("paged_flex")
    with pytest.raises(ValueError, match=r"holds another prompt: row 0 .* cache.resume\(model"):
        generate(llama, random_ids(1, 60, 1), **{CACHE: used(llama)})
