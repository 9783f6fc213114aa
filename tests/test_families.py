"""Every family does with a `PagedCache` what the table of families says."""

import pytest
import torch
import transformers

from hf_paged import PagedCache, PagedEncoderDecoderCache
from tests.families import FAMILIES, Family, Outcome, new_cache
from tests.models import generate, left_padded, random_ids, run
from tests.sweep.answer import answers
from tests.sweep.page import PAGE, outcome, page
from tests.sweep.results import RESULTS, Results
from tests.sweep.subjects import classes

SPLITS = [30, 1, 1, 1, 27]
LENGTHS = [60, 41, 52]
CLOSE = {"atol": 5e-4, "rtol": 1e-4}


def cases(outcome: Outcome, has_encoder: bool | None = None, over_pages: bool | None = None):
    return [
        pytest.param(family, attention, id=f"{family.name}-{attention}")
        for family in FAMILIES
        for attention in (family.oracle, "paged_flex")
        if family.outcome(attention) == outcome
        and has_encoder in (None, family.has_encoder)
        and over_pages in (None, attention == "paged_flex")
    ]


def cached(model) -> PagedCache | PagedEncoderDecoderCache:
    return PagedCache.from_model(model, page_size=16)


@pytest.mark.parametrize(("family", "attention"), cases(Outcome.SAME, has_encoder=False, over_pages=True))
def test_logits_of_a_ragged_batch_are_those_of_dynamic_cache(family: Family, attention):
    ids, mask = random_ids(3, 60), left_padded(60, LENGTHS)
    real = mask.bool()
    oracle = family.load(family.oracle)
    expected = run(oracle, new_cache(oracle), ids, SPLITS, mask)[real]
    model = family.load(attention)
    cache = cached(model)
    torch.testing.assert_close(run(model, cache, ids, SPLITS, mask)[real], expected, **CLOSE)
    cache.pool.check_integrity()


@pytest.mark.parametrize(("family", "attention"), cases(Outcome.SAME, has_encoder=False, over_pages=False))
def test_greedy_tokens_are_those_of_dynamic_cache(family: Family, attention):
    ids, mask = random_ids(3, 18), left_padded(18, [18, 5, 11])
    oracle = family.load(family.oracle)
    expected = generate(oracle, family.oracle, new_cache(oracle), ids, attention_mask=mask, max_new_tokens=28)
    model = family.load(attention)
    cache = cached(model)
    actual = generate(model, attention, cache, ids, attention_mask=mask, max_new_tokens=28)
    assert torch.equal(actual, expected)
    cache.pool.check_integrity()


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize(("family", "attention"), cases(Outcome.SAME, has_encoder=True))
def test_a_decoder_with_an_encoder_generates_what_it_does_with_dynamic_cache(family: Family, attention, num_beams):
    oracle, model = family.load(family.oracle), family.load(attention)
    arguments = {
        **family.encoder_inputs(),
        "decoder_input_ids": torch.cat([torch.full((3, 1), 2), random_ids(3, 6)], dim=1),
        "num_beams": num_beams,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "max_new_tokens": 28,
    }
    expected = oracle.generate(past_key_values=new_cache(oracle), **arguments)
    cache = cached(model)
    assert torch.equal(model.generate(past_key_values=cache, **arguments), expected)
    cache.pool.check_integrity()


@pytest.mark.parametrize(("family", "attention"), cases(Outcome.REFUSED))
def test_what_is_not_supported_is_refused(family: Family, attention):
    model = family.load(attention)
    inputs = family.encoder_inputs() if family.has_encoder else {"inputs": random_ids(3, 18)}
    with pytest.raises(ValueError, match=family.message):
        model.generate(**inputs, past_key_values=cached(model), max_new_tokens=4, eos_token_id=None)


@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if "by itself" in family.note], ids=lambda family: family.name
)
def test_setting_paged_flex_later_leaves_a_family_that_cannot_take_it_as_it_was(family: Family):
    model, ids = family.load(family.oracle), random_ids(3, 18)
    expected = generate(model, family.oracle, new_cache(model), ids)
    assert torch.equal(generate(model, "paged_flex", cached(model), ids), expected)
    assert model.config._attn_implementation == family.oracle


# Of those that the sweep runs: what asks of a cache what no record of `FAMILIES` does.
CHOSEN = {
    "BigBirdPegasusForCausalLM": "causal by its mask alone",
    "BltForCausalLM": "no number of layers in the configuration",
    "DeepseekV32ForCausalLM": "an index of keys",
    "GitForCausalLM": "an attention class for each name",
    "HrmTextForCausalLM": "layers that run several times",
    "IdeficsForVisionText2Text": "keys normalized behind the cache",
    "MllamaForConditionalGeneration": "keys of images in the same cache",
    "ModernBertDecoderForCausalLM": "a head that is named decoder",
    "MoonshineForConditionalGeneration": "an encoder of sound",
    "MoshiForCausalLM": "a window that the mask does not have",
    "PaliGemmaForConditionalGeneration": "a prompt seen as a whole",
    "Qwen2MoeForCausalLM": "a mask of a window without tokens",
    "Qwen2VLForConditionalGeneration": "positions in three dimensions",
    "UnlimitedOcrForConditionalGeneration": "a window of what is decoded alone",
}


@pytest.mark.parametrize("name", [name for name in CHOSEN if hasattr(transformers, name)])
def test_the_table_holds_for_what_is_chosen_from_it(name):
    results = Results(RESULTS)
    entry = results.models[name]
    modes = ["uncompiled", "prefill", "gathered"]
    _, *found = answers(name, entry["kind"], modes)
    for mode, cases in zip(modes, found, strict=True):
        assert outcome(cases) == outcome(entry["modes"][mode]), (mode, cases)


def test_the_page_on_families_is_what_the_sweep_left():
    assert PAGE.read_text() == page(Results(RESULTS)), "write it anew: python -m tests.sweep.page > docs/families.md"


def test_no_class_gives_other_tokens_without_an_error():
    wrong = {
        name: mode
        for name, entry in Results(RESULTS).models.items()
        for mode, cases in entry.get("modes", {}).items()
        if "wrong" in outcome(cases)
    }
    assert not wrong


def test_every_class_that_generates_tokens_is_in_the_results():
    results = Results(RESULTS)
    if results.versions["transformers"] != transformers.__version__:
        pytest.skip(f"the sweep ran with Transformers {results.versions['transformers']}")
    assert set(results.models) == set(classes())
