"""A prompt that can't be packed is computed as `generate()` does, says so, and goes on with its tokens."""

import copy
import functools
import logging

import pytest
import torch
import transformers
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask

from hf_paged import OutOfPagesError, PagedCache
from hf_paged.cache.prompt.prefill import _say
from tests.models import left_padded, random_ids, tiny_llama, tiny_model

SETTINGS = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
NUM_COLUMNS = 36
IMAGE = 199
TEXT = {
    "vocab_size": 200,
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture(autouse=True)
def said(caplog):
    """Begin with nothing said, and give the lines that prefill logs."""
    _say.cache_clear()
    caplog.set_level(logging.WARNING)
    return lambda: [record.message for record in caplog.records if record.name == "hf_paged.cache.prompt.prefill"]


def ragged() -> dict[str, Tensor]:
    return {"input_ids": random_ids(3, NUM_COLUMNS), "attention_mask": left_padded(NUM_COLUMNS, [NUM_COLUMNS, 9, 20])}


def after(prompt: dict[str, Tensor], *, without: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """What `generate()` is given after a prefill."""
    return {name: value for name, value in prompt.items() if name not in without}


def generate(model, attention: str, kv_cache, prompt, **arguments) -> Tensor:
    model.set_attn_implementation(attention)
    return model.generate(**prompt, past_key_values=kv_cache, **(SETTINGS | arguments))


def with_logits(*arguments, **named) -> tuple[Tensor, Tensor]:
    """Tokens, and the logits that they come from."""
    result = generate(*arguments, return_dict_in_generate=True, output_logits=True, **named)
    return result.sequences, torch.stack(result.logits)


def plain_cache(model) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def assert_prefills(model, prompt, *, without=(), attention="paged_flex", oracle="sdpa", **arguments) -> PagedCache:
    """Compare the tokens after a prefill with those of `DynamicCache`; state that a model keeps is that of before."""
    expected, logits = with_logits(copy.deepcopy(model), oracle, plain_cache(model), prompt, **arguments)
    model.set_attn_implementation(attention)
    kv_cache = PagedCache.from_model(model, page_size=16)
    kv_cache.prefill(model, **prompt, **{name: arguments[name] for name in ("adapter_names",) if name in arguments})
    num_rows, num_columns = prompt["input_ids"].shape
    assert kv_cache.get_seq_length() == num_columns - 1
    assert kv_cache.batch_size == num_rows
    actual, found = with_logits(model, attention, kv_cache, after(prompt, without=without), **arguments)
    torch.testing.assert_close(found, logits, atol=1e-3, rtol=1e-3)
    assert torch.equal(actual, expected)
    kv_cache.pool.check_integrity()
    return kv_cache


# Decoders


class WithPrefix(LlamaForCausalLM):
    """Looks at positions in its outer forward, as a soft prompt does."""

    def forward(self, input_ids=None, position_ids=None, inputs_embeds=None, **kwargs):
        embeds = self.get_input_embeddings()(input_ids)
        embeds = embeds * torch.where(position_ids < 5, 1.5, 1.0)[..., None]
        return super().forward(inputs_embeds=embeds, position_ids=position_ids, **kwargs)


class WithPositions(LlamaForCausalLM):
    """Gives other positions than the places of the tokens."""

    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        inputs["position_ids"] = inputs["position_ids"] * 2 + 1
        return inputs


class WithIds(LlamaForCausalLM):
    """Gives the decoder other ids than those of the prompt."""

    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        inputs["input_ids"] = (inputs["input_ids"] + 7) % 190
        return inputs


class WithMask(LlamaForCausalLM):
    """Makes masks of its own, of a kind that `paged_flex` takes."""

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, position_ids=None, **kwargs):
        kwargs = {name: kwargs[name] for name in ("cache", "past_key_values") if name in kwargs}
        arguments = {"attention_mask": attention_mask, "position_ids": position_ids, **kwargs}
        return create_causal_mask(
            config=config, inputs_embeds=inputs_embeds, or_mask_function=lambda b, h, q, k: k % 4 == 0, **arguments
        )


def subclass_of(kind, **changes) -> PreTrainedModel:
    return tiny_model(kind, LlamaConfig, **changes)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (WithPrefix, "its forward is that of tests.cache.test_padded_prefill"),
        (WithPositions, "its positions are not the places of the tokens"),
        (WithIds, "it is given other ids than those of the prompt"),
    ],
)
def test_a_class_that_changes_what_the_decoder_is_given_is_padded(kind, reason, said):
    assert_prefills(subclass_of(kind), ragged())
    (line,) = said()
    assert line.startswith(
        f"prefill() computes the prompt of {kind.__name__} at once and padded, as generate() does: "
    )
    assert reason in line


def test_a_class_that_makes_masks_is_padded(said):
    model, prompt = subclass_of(WithMask), {"input_ids": random_ids(2, 20)}
    kv_cache = PagedCache.from_model(model, page_size=16)
    model.set_attn_implementation("paged_flex")
    kv_cache.prefill(model, **prompt)
    alone = generate(model, "paged_flex", PagedCache.from_model(model, page_size=16), prompt)
    assert torch.equal(generate(model, "paged_flex", kv_cache, prompt), alone)
    assert "makes masks of its own" in said()[0]


@pytest.mark.parametrize(
    ("name", "config", "changes", "attention", "reason"),
    [
        (
            "WhisperForCausalLM",
            "WhisperConfig",
            {"d_model": 48, "decoder_layers": 2, "decoder_attention_heads": 3, "decoder_ffn_dim": 64, "init_std": 0.3}
            | {"bos_token_id": 1, "eos_token_id": 2, "max_target_positions": 99},
            "paged_flex",
            "WhisperDecoder is within a WhisperDecoderWrapper",
        ),
        (
            "OPTForCausalLM",
            "OPTConfig",
            {"ffn_dim": 64, "num_attention_heads": 3, "word_embed_proj_dim": 48, "init_std": 0.3},
            "paged_flex",
            "",
        ),
        ("BloomForCausalLM", "BloomConfig", {"n_head": 6, "n_layer": 2}, "eager", "attn_implementation='eager'"),
        ("MistralForCausalLM", "MistralConfig", {"sliding_window": 12}, "sdpa", "attn_implementation='sdpa'"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.endswith(("LM", "Model")) else "",
)
def test_a_decoder_that_is_not_told_positions_or_computes_attention_itself_is_padded(
    name, config, changes, attention, reason, said
):
    model = tiny_model(getattr(transformers, name), getattr(transformers, config), **changes)
    assert_prefills(model, ragged(), attention=attention, oracle="sdpa" if attention == "paged_flex" else attention)
    assert reason in said()[0]


@pytest.mark.parametrize("records_past", [False, True])
@pytest.mark.parametrize("attention", ["paged_flex", "sdpa"])
def test_padded_turns_go_on_and_leave_windows_as_they_are(attention, records_past):
    """Subclassing keeps Mistral from packing."""
    kind = type("Own", (transformers.MistralForCausalLM,), {"forward": transformers.MistralForCausalLM.forward})
    kind.forward = functools.wraps(kind.forward)(lambda self, **inputs: super(kind, self).forward(**inputs))
    kind.forward.__module__ = __name__
    model = tiny_model(kind, MistralConfig, sliding_window=24)

    def talk(kv_cache, attention):
        ids, mask = random_ids(3, 20), left_padded(20, [20, 1, 11])
        for turn in range(3):
            if isinstance(kv_cache, PagedCache):
                model.set_attn_implementation(attention)
                kv_cache.prefill(model, ids, mask)
                kv_cache.pool.check_integrity()
            ids = generate(model, attention, kv_cache, {"input_ids": ids, "attention_mask": mask}, max_new_tokens=6)
            new = torch.ones(3, ids.shape[1] - mask.shape[1], dtype=torch.long)
            mask = torch.cat([mask, new, left_padded(15, [9, 15, 4])], dim=1)
            ids = torch.cat([ids, random_ids(3, 15, seed=turn + 1)], dim=1)
        return ids

    expected = talk(plain_cache(model), "sdpa")
    model.set_attn_implementation(attention)
    kv_cache = PagedCache.from_model(model, page_size=16)
    if records_past:
        kv_cache.activate_past_recording()
    assert torch.equal(talk(kv_cache, attention), expected)
    assert records_past != any(table.starts.any() for table in kv_cache._sequences.rows.tables)


# Hooks


def look_at_columns(module, inputs, output):
    output = output.clone()
    if output.shape[1] > 5:
        output[:, 2:5] += 1
    return output


class Doubling(ModelHook):
    def post_forward(self, module, output):
        return output * 2


def with_a_hook(model):
    model.model.layers[0].register_forward_hook(look_at_columns)


def with_a_pre_hook(model):
    model.model.norm.register_forward_pre_hook(lambda module, inputs: (inputs[0].roll(1, dims=-1),))


def with_a_partial(model):
    model.model.layers[1].mlp.register_forward_hook(functools.partial(look_at_columns))


def with_another_forward(model):
    layer = model.model.layers[1]
    original = layer.forward
    layer.forward = lambda hidden, *args, **kwargs: look_at_columns(None, None, original(hidden, *args, **kwargs))


def with_a_hook_of_accelerate(model):
    add_hook_to_module(model.model.layers[1].mlp, Doubling())


def with_an_adapter_of_another_kind(model):
    get_peft_model(
        model, IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[], init_ia3_weights=False)
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_a_hook, "a hook of tests.cache.test_padded_prefill is on model.layers.0"),
        (with_a_pre_hook, "a hook of tests.cache.test_padded_prefill is on model.norm"),
        (with_a_partial, "a hook of tests.cache.test_padded_prefill is on model.layers.1.mlp"),
        (with_another_forward, "the forward of model.layers.1 was replaced"),
        (with_a_hook_of_accelerate, "a hook of tests.cache.test_padded_prefill is on model.layers.1.mlp"),
        (with_an_adapter_of_another_kind, "is an adapter of another kind than LoRA"),
    ],
)
def test_what_may_look_at_rows_and_columns_keeps_a_prompt_from_packing(change, reason, said):
    model, prompt = tiny_llama(), ragged()
    change(model)
    model.set_attn_implementation("sdpa")
    expected = model.generate(**prompt, past_key_values=plain_cache(model), **SETTINGS)
    model.set_attn_implementation("paged_flex")
    kv_cache = PagedCache.from_model(model, page_size=16)
    kv_cache.prefill(model, **prompt)
    assert torch.equal(generate(model, "paged_flex", kv_cache, prompt), expected)
    assert reason in said()[0]


def test_a_hook_on_all_modules_keeps_a_prompt_from_packing(said):
    model, prompt = tiny_llama(), ragged()

    def double(module, inputs, output):
        return output * 2 if isinstance(module, nn.SiLU) else output

    handle = nn.modules.module.register_module_forward_hook(double)
    try:
        assert_prefills(model, prompt)
    finally:
        handle.remove()
    assert "is on all modules" in said()[0]


def test_hooks_that_move_weights_or_note_outputs_don_t_keep_a_prompt_from_packing(said):
    model, prompt = tiny_llama(), ragged()
    generate(model, "sdpa", None, prompt, output_hidden_states=True, return_dict_in_generate=True)
    cpu_offload(model, torch.device("cpu"))
    expected = generate(tiny_llama(), "sdpa", plain_cache(model), prompt)
    model.set_attn_implementation("paged_flex")
    kv_cache = PagedCache.from_model(model, page_size=16)
    kv_cache.prefill(model, **prompt)
    assert said() == []
    assert torch.equal(generate(model, "paged_flex", kv_cache, prompt), expected)


# Adapters


def with_adapters(*names: str):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_llama(), lora, adapter_name=names[0]).eval()
    for name in names[1:]:
        model.add_adapter(name, lora)
    return model


@pytest.mark.parametrize(
    ("names", "adapter_names", "is_packed"),
    [
        (["a", "b"], ["a", "b", "__base__"], False),
        (["a", "b"], None, True),
        (["a"], None, True),
    ],
)
@pytest.mark.filterwarnings("ignore:Adapter name")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapters_of_each_row_are_those_of_generate(names, adapter_names, is_packed, said):
    assert_prefills(with_adapters(*names), ragged(), adapter_names=adapter_names)
    assert len(said()) == (not is_packed)


@pytest.mark.filterwarnings("ignore:Adapter name")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_several_adapters_must_be_told_apart():
    model, prompt = with_adapters("a", "b"), ragged()
    model.set_attn_implementation("paged_flex")
    kv_cache = PagedCache.from_model(model, page_size=16)
    with pytest.raises(ValueError, match=r"has several adapters: a, b\. Pass the adapter_names that generate"):
        kv_cache.prefill(model, **prompt)
    assert kv_cache.get_seq_length() == 0


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_columns_that_are_no_ids_raise_and_nothing_has_changed():
    tuned = get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    tuned.set_attn_implementation("sdpa")
    kv_cache = PagedCache.from_model(tuned, page_size=16)
    with pytest.raises(ValueError, match="was given 20 ids, after which the cache held 25 columns"):
        kv_cache.prefill(tuned, random_ids(2, 20), torch.ones(2, 20, dtype=torch.long))
    assert kv_cache.get_seq_length() == 0
    kv_cache.pool.check_integrity()


# Images


def with_images(num_tokens: int, places: list[int]) -> Tensor:
    """Rows of text with the tokens of one image from each of `places` on."""
    ids = random_ids(len(places), NUM_COLUMNS).clamp(max=190)
    for row, place in enumerate(places):
        ids[row, place : place + num_tokens] = IMAGE
    return ids


def paligemma():
    text, vision = transformers.GemmaConfig(**TEXT), transformers.SiglipVisionConfig(**VISION)
    config = transformers.PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, image_token_index=IMAGE, projection_dim=96
    )
    config.vision_config.projection_dim = 96
    ids = with_images(4, [0, 0, 0])
    prompt = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "pixel_values": torch.randn(3, 3, 28, 28)}
    return transformers.PaliGemmaForConditionalGeneration(config), prompt, ("pixel_values",)


def llava():
    text, vision = LlamaConfig(**TEXT), transformers.CLIPVisionConfig(**VISION)
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, image_token_index=IMAGE, vision_feature_layer=-1
    )
    prompt = {"input_ids": with_images(4, [3, 20, 14]), "pixel_values": torch.randn(3, 3, 28, 28)}
    prompt["attention_mask"] = left_padded(NUM_COLUMNS, [NUM_COLUMNS, 20, 30])
    return transformers.LlavaForConditionalGeneration(config), prompt, ("pixel_values",)


def gemma3():
    text = transformers.Gemma3TextConfig(
        **(TEXT | {"num_hidden_layers": 3}),
        sliding_window=12,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        query_pre_attn_scalar=16,
    )
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=transformers.SiglipVisionConfig(**VISION),
        image_token_id=IMAGE,
        image_token_index=IMAGE,
        mm_tokens_per_image=4,
    )
    ids = with_images(4, [3, 20, 14])
    prompt = {"input_ids": ids, "token_type_ids": (ids == IMAGE).long(), "pixel_values": torch.randn(3, 3, 28, 28)}
    prompt["attention_mask"] = left_padded(NUM_COLUMNS, [NUM_COLUMNS, 20, 30])
    return transformers.Gemma3ForConditionalGeneration(config), prompt, ("pixel_values",)


def qwen2_vl():
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 96, "num_heads": 4, "patch_size": 14, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=vision | {"spatial_merge_size": 2, "temporal_patch_size": 2},
        image_token_id=IMAGE,
        video_token_id=196,
        vision_start_token_id=198,
        vision_end_token_id=197,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    ids = with_images(4, [3, 22, 14])
    for row, place in enumerate([3, 22, 14]):
        ids[row, place - 1], ids[row, place + 4] = 198, 197
    prompt = {
        "input_ids": ids,
        "pixel_values": torch.randn(48, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 3),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "attention_mask": left_padded(NUM_COLUMNS, [NUM_COLUMNS, 20, 30]),
    }
    return transformers.Qwen2VLForConditionalGeneration(config), prompt, ("pixel_values", "image_grid_thw")


SEEING = {make.__name__: make for make in (paligemma, llava, gemma3, qwen2_vl)}


def seeing(name: str):
    torch.manual_seed(0)
    model, prompt, of_prompt = SEEING[name]()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.ndim > 1:
                std = 0.03 if isinstance(module, nn.Embedding) else 0.3  # or else a token asks for itself
                nn.init.normal_(parameter, std=std, generator=torch.Generator().manual_seed(parameter.numel()))
    return model.eval(), prompt, of_prompt


@pytest.mark.parametrize("name", SEEING)
def test_a_prompt_with_images_goes_on_without_the_pixels(name, said):
    model, prompt, of_prompt = seeing(name)
    assert_prefills(model, prompt, without=of_prompt)
    assert len(said()) == 1


@pytest.mark.parametrize("name", SEEING)
def test_a_prompt_with_images_is_seen(name):
    """So that the test before shows something."""
    model, prompt, _ = seeing(name)
    _, first = with_logits(model, "sdpa", plain_cache(model), prompt)
    prompt["pixel_values"] = prompt["pixel_values"].roll(1, dims=0)
    _, second = with_logits(model, "sdpa", plain_cache(model), prompt)
    assert (first - second)[0].abs().amax(dim=1).min() > 0.01


@pytest.mark.parametrize("name", SEEING)
def test_a_prompt_of_text_goes_on_after_one_with_images(name):
    model, prompt, _ = seeing(name)
    generate(model, "sdpa", plain_cache(model), prompt)
    text = {"input_ids": random_ids(2, 24).clamp(max=190), "attention_mask": left_padded(24, [24, 15])}
    if name == "paligemma":
        text = {"input_ids": text["input_ids"], "token_type_ids": torch.zeros(2, 24, dtype=torch.long)}
    assert_prefills(model, text)


@pytest.mark.parametrize("name", ["gemma3", "llava"])
def test_a_failure_leaves_the_cache_as_it_was(name):
    model, prompt, of_prompt = seeing(name)
    expected = generate(copy.deepcopy(model), "sdpa", plain_cache(model), prompt)
    model.set_attn_implementation("paged_flex")
    kv_cache = PagedCache.from_model(model, page_size=16)
    handle = model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        kv_cache.prefill(model, **prompt)
    handle.remove()
    assert kv_cache.get_seq_length() == 0
    kv_cache.pool.check_integrity()
    small = PagedCache.from_model(model, page_size=16, num_pages=4)
    with pytest.raises(OutOfPagesError):
        small.prefill(model, **prompt)
    assert small.pool.stats().num_active_pages == 0
    kv_cache.prefill(model, **prompt)
    assert torch.equal(generate(model, "paged_flex", kv_cache, after(prompt, without=of_prompt)), expected)


def test_a_padded_turn_takes_no_page_to_copy_what_the_cache_alone_holds():
    model, ids = subclass_of(WithPositions), random_ids(2, 31)
    model.set_attn_implementation("paged_flex")
    kv_cache = PagedCache.from_model(model, page_size=16, num_pages=4)
    kv_cache.prefill(model, ids[:, :21])
    assert kv_cache.pool.stats().num_free_pages == 0
    kv_cache.prefill(model, ids)
    assert kv_cache.pool.stats().num_copied_pages == 0
    assert kv_cache.lengths == [30, 30]
