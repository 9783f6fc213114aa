"""Models that see and hear generate with a paged cache what they do with Transformers' own."""

import copy
from functools import cache

import pytest
import torch
import transformers
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from hf_paged import PagedCache, PagePool, enable, generate_many, prompt_lookup
from tests.sweep.checks import greedy
from tests.sweep.media import media_inputs
from tests.sweep.subjects import words
from tests.sweep.tiny import config_class_of, tiny_config, tiny_model

SETTINGS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 10}
FAMILIES = ["Qwen2_5_VL", "Qwen3VL", "Llava", "Gemma3", "Idefics3", "SmolVLM", "PaliGemma", "Qwen2Audio"]
CONTINUED = [name for name in FAMILIES if name not in ("Qwen2_5_VL", "Qwen3VL")]  # else Transformers fails
KINDS = ("token_type_ids", "mm_token_type_ids")
MEDIA = ("pixel_values", "input_features")
NO_SDPA = {"PaliGemma": "eager"}  # with "sdpa" Transformers computes something else
CHANGES = {
    "Qwen2Audio": {"audio_config": {"max_source_positions": 30}},
    "Qwen3VL": {"vision_config": {"deepstack_visual_indexes": [0]}},  # without any Transformers has no beams
}

Parts = tuple[int | str, ...]
IMAGE = "an image, or a sound"


@cache
def load(family: str, attention: str) -> PreTrainedModel:
    model_class = getattr(transformers, f"{family}ForConditionalGeneration")
    changes = CHANGES.get(family, {})
    model = tiny_model(model_class, attention, tiny_config(config_class_of(model_class), changes))
    model.generation_config = greedy(model)
    return model


def oracle(family: str) -> PreTrainedModel:
    return load(family, NO_SDPA.get(family, "sdpa"))


def paged(family: str) -> tuple[PreTrainedModel, PagedCache]:
    model = load(family, "paged_flex")
    return model, PagedCache.from_model(model, page_size=16)


@cache
def example(family: str) -> tuple[dict[str, Tensor], int, int]:
    """Inputs with one image or sound, the token that stands for it, and how many of these there are."""
    if family == "Qwen2Audio":
        config = oracle(family).config
        bins, token = config.audio_config.num_mel_bins, config.audio_token_id
        frames = {"input_features": torch.ones(1, bins, 60), "feature_attention_mask": torch.ones(1, 60).long()}
        return frames, token, 15
    (inputs,) = media_inputs(oracle(family), words(1, 14)).values()
    ids = inputs.pop("input_ids")[0]
    token, count = max((int(token), int((ids == token).sum())) for token in ids if token >= 160)
    return inputs, token, count


def batch(family: str, rows: list[Parts], seed: int = 0) -> dict[str, Tensor]:
    """Rows of so many words, and images where `IMAGE` is, all of them different; padded on the left."""
    _, token, count = example(family)
    parts = [
        [id for part in row for id in ([token] * count if part == IMAGE else words(1, part, seed=part)[0].tolist())]
        for row in rows
    ]
    width = max(map(len, parts))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in parts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in parts])
    return {"input_ids": ids, "attention_mask": mask} | media(family, ids, sum(row.count(IMAGE) for row in rows), seed)


def media(family: str, ids: Tensor, num_images: int, seed: int) -> dict[str, Tensor]:
    one, token, _ = example(family)
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, value in one.items():
        if name in KINDS:
            found[name] = (ids == token).to(value.dtype) * int(value.max())
        elif name in MEDIA:
            found[name] = torch.randn(value.shape[0] * num_images, *value.shape[1:], generator=generator)
        else:
            found[name] = value.repeat(num_images, *[1] * (value.ndim - 1))
    return found


def tokens(model: PreTrainedModel, cache: Cache | None, inputs: dict, **settings) -> Tensor:
    return model.generate(**inputs, past_key_values=cache, **SETTINGS | settings)


def plain(family: str, inputs: dict, **settings) -> Tensor:
    model = oracle(family)
    return tokens(model, DynamicCache(config=model.config), inputs, **settings)


ROWS: dict[str, list[Parts]] = {
    "several images": [(3, IMAGE, 5), (2, IMAGE, 4, IMAGE, 7), (1, IMAGE, 1)],
    "one row without": [(3, IMAGE, 5), (20,)],
    "images at page edges": [(16 - 4, IMAGE, 1, IMAGE, 15, IMAGE, 13), (31, IMAGE, 2)],
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_batches_give_the_tokens_of_dynamic_cache(family, rows):
    inputs = batch(family, ROWS[rows])
    model, cache = paged(family)
    assert torch.equal(tokens(model, cache, inputs), plain(family, inputs))
    assert cache.lengths == (inputs["attention_mask"].sum(1) + 9).tolist()
    cache.pool.check_integrity()


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"prefill_chunk_size": 9}], ids=str)
@pytest.mark.parametrize("family", ["Qwen2_5_VL", "Qwen3VL", "Llava", "Gemma3", "Idefics3"])
def test_beams_and_chunks_give_the_tokens_of_dynamic_cache(family, settings):
    inputs = batch(family, [(3, IMAGE, 5), (2, IMAGE, 4, IMAGE, 7)])
    model, cache = paged(family)
    assert torch.equal(tokens(model, cache, inputs, **settings), plain(family, inputs, **settings))


def test_beams_over_sound_give_the_tokens_of_dynamic_cache():
    inputs = batch("Qwen2Audio", [(3, IMAGE, 5), (2, IMAGE, 4, IMAGE, 7)])
    model, cache = paged("Qwen2Audio")
    assert torch.equal(tokens(model, cache, inputs, num_beams=3), plain("Qwen2Audio", inputs, num_beams=3))


@pytest.mark.parametrize("family", CONTINUED)
def test_a_conversation_goes_on_with_another_image(family):
    turns = []
    model, cache = paged(family)
    of_oracle = oracle(family)
    for each, kept in ((of_oracle, DynamicCache(config=of_oracle.config)), (model, cache)):
        inputs = batch(family, [(3, IMAGE, 5), (2, IMAGE, 4)])
        first = tokens(each, kept, inputs)
        more = batch(family, [(4, IMAGE, 2), (4, IMAGE, 2)], seed=1)
        ids = torch.cat([first, more["input_ids"]], dim=1)
        mask = torch.nn.functional.pad(
            inputs["attention_mask"], (0, ids.shape[1] - len(inputs["input_ids"][0])), value=1
        )
        inputs = {"input_ids": ids, "attention_mask": mask} | media(family, ids, 2, seed=1)
        turns.append(tokens(each, kept, inputs))
    assert torch.equal(*turns)


@pytest.mark.parametrize("family", ["Qwen2_5_VL", "Gemma3"])
def test_passes_over_another_image_give_the_logits_of_dynamic_cache(family):
    """With positions of several dimensions, and with image tokens that see each other."""
    first, second = batch(family, [(3, IMAGE, 5)]), batch(family, [(4, IMAGE, 2)], seed=1)
    found = []
    model, cache = paged(family)
    of_oracle = oracle(family)
    for each, kept in ((of_oracle, DynamicCache(config=of_oracle.config)), (model, cache)):
        start = 0
        for part in (first, second):
            inputs = {name: value for name, value in part.items() if name != "attention_mask"}
            stop = start + part["input_ids"].shape[1]
            places = torch.arange(start, stop)
            if family == "Qwen2_5_VL":
                places = torch.stack([places, places // 2, places % 5])[:, None]
                inputs["position_ids"] = places
            with torch.no_grad():
                found.append(each(**inputs, past_key_values=kept).logits)
            start = stop
    for expected, actual in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(actual, expected, atol=5e-4, rtol=1e-3)


def test_an_image_is_seen_from_before_it_where_its_tokens_see_each_other():
    """Else the tests here would show nothing of Gemma's masks."""
    _, _, count = example("Gemma3")
    inputs, kept = batch("Gemma3", [(3, IMAGE, 5)]), {}
    model = load("Gemma3", "paged_flex")
    for name, kinds in (
        ("bidirectional", inputs["token_type_ids"]),
        ("causal", torch.zeros_like(inputs["input_ids"])),
    ):
        kept[name] = PagedCache.from_model(model, page_size=16)
        with torch.no_grad():
            model(**inputs | {"token_type_ids": kinds}, past_key_values=kept[name])
    keys = [cache.gather(1)[0][0, :, 3 : 3 + count] for cache in kept.values()]
    assert (keys[0] - keys[1])[:, :-1].abs().max() > 1e-3


def test_embeddings_that_hold_an_image_are_a_prompt():
    family = "Llava"
    inputs = batch(family, [(3, IMAGE, 5), (9, IMAGE, 2)])
    model, cache = paged(family)
    _, token, _ = example(family)
    with torch.no_grad():
        features = model.model.get_image_features(inputs["pixel_values"]).pooler_output
        embeddings = model.get_input_embeddings()(inputs["input_ids"])
        features = torch.cat([part.flatten(0, -2) for part in features])
        embeddings[inputs["input_ids"] == token] = features
    given = {name: value for name, value in inputs.items() if name not in ("pixel_values", "input_ids")}
    given["inputs_embeds"] = embeddings
    assert torch.equal(tokens(model, cache, given), plain(family, given))


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_with_other_images_share_no_pages(family):
    """All of them have the same ids, whole pages of them before the image, too."""
    model = load(family, "paged_flex")
    pool = PagePool.from_model(model, num_pages=99, page_size=16, prefix_cache=True)
    prompts = [batch(family, [(20, IMAGE, 40)], seed) for seed in (1, 2)]
    assert torch.equal(prompts[0]["input_ids"], prompts[1]["input_ids"])
    expected = [plain(family, prompt) for prompt in prompts]
    if family in ("Qwen2_5_VL", "Qwen3VL", "Llava", "Qwen2Audio"):
        assert not torch.equal(*expected)
    for turn in (0, 1, 0):
        with PagedCache(pool=pool) as cache:
            assert torch.equal(tokens(model, cache, prompts[turn]), expected[turn])
        pool.check_integrity()
    with enable(model, prefix_cache=True):
        for turn in (0, 1, 0):
            assert torch.equal(model.generate(**prompts[turn], **SETTINGS), expected[turn])


@pytest.mark.parametrize("family", ["Llava", "Gemma3"])
def test_many_prompts_without_images_are_answered(family):
    model, ids = load(family, "paged_flex"), words(1, 12)
    (result,) = generate_many(model, [ids[0]], **SETTINGS).in_order()
    assert result.error is None
    assert result.tokens == plain(family, {"input_ids": ids})[0, 12:].tolist()


def test_drafts_of_models_that_prepare_inputs_in_their_own_way_are_refused_at_once():
    with pytest.raises(ValueError, match="prepares its inputs in a way of its own"):
        generate_many(load("Gemma3", "paged_flex"), [[7, 8]], custom_generate=prompt_lookup(), **SETTINGS)


def test_embeddings_beside_ids_share_no_pages_with_those_ids():
    """`generate()` computes the embeddings, and knows the ids."""
    model = load("Llava", "paged_flex").model.language_model
    decoder = transformers.LlamaForCausalLM(copy.deepcopy(model.config)).eval()
    decoder.set_attn_implementation("paged_flex")
    ids, others = words(1, 60), words(1, 60, seed=1)
    prompts = {"ids": {"input_ids": ids}, "both": {"input_ids": ids}}
    prompts["both"]["inputs_embeds"] = decoder.get_input_embeddings()(others).detach()
    expected = {name: tokens(decoder, DynamicCache(config=decoder.config), prompt) for name, prompt in prompts.items()}
    assert not torch.equal(*expected.values())
    with enable(decoder, prefix_cache=True):
        for name in ("both", "ids", "both", "ids"):
            assert torch.equal(decoder.generate(**prompts[name], **SETTINGS), expected[name])


@pytest.mark.parametrize("family", ["Qwen2_5_VL", "Llava", "Idefics3"])
def test_samples_of_one_image_hold_its_pages_once(family):
    inputs = batch(family, [(20, IMAGE, 40)])
    model, cache = paged(family)
    tokens(model, cache, inputs, do_sample=True, num_return_sequences=3)
    num_shared = inputs["input_ids"].shape[1] // 16
    assert cache.stats().num_active_pages == num_shared + 3 * (-(-cache.lengths[0] // 16) - num_shared)


QWEN = "Qwen3VL"


def text_turn(model: PreTrainedModel, cache: PagedCache, answers: Tensor) -> Tensor:
    return tokens(model, cache, {"input_ids": torch.cat([answers, words(len(answers), 6, seed=3)], dim=1)})


def test_a_conversation_refuses_the_positions_of_another_one():
    """The model keeps those of the prompt that it computed last."""
    inputs, other = batch(QWEN, [(3, IMAGE, 5), (2, IMAGE, 6)]), {"input_ids": words(2, 30)}
    del inputs["attention_mask"]
    model, cache = paged(QWEN)
    answers = tokens(model, cache, inputs)
    offsets, fork = model.model.rope_deltas, cache.fork()
    assert offsets.all()
    expected = text_turn(model, cache, answers)
    tokens(model, None, other)
    held = fork.lengths
    with pytest.raises(ValueError, match="has computed another prompt since"):
        text_turn(model, fork, answers)
    assert fork.lengths == held
    model.model.rope_deltas = offsets
    assert torch.equal(text_turn(model, fork, answers), expected)
    fork.crop(-fork.get_seq_length())
    assert torch.equal(tokens(model, fork, other), plain(QWEN, other))


def test_rows_keep_to_their_own_positions():
    inputs = batch(QWEN, [(3, IMAGE, 5), (2, IMAGE, 4, IMAGE, 7)])
    model, cache = paged(QWEN)
    tokens(model, cache, inputs)
    cache.batch_select_indices(torch.tensor([1]))
    new, place = words(1, 1), torch.full((3, 1, 1), 20)
    with pytest.raises(ValueError, match="goes on with positions that are offset by"), torch.no_grad():
        model(new, past_key_values=cache, position_ids=place)
    model.model.rope_deltas = model.model.rope_deltas[1:]
    with torch.no_grad():
        model(new, past_key_values=cache, position_ids=place)
    joined = PagedCache.concatenate([cache, cache.fork()])
    with torch.no_grad():
        model(new.repeat(2, 1), past_key_values=joined, position_ids=place.repeat(1, 2, 1))
