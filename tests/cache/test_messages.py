"""Plausible mistakes: each raises one error that says what was found and what to do, before anything has changed."""

import re
import threading

import peft
import pytest
import torch
import transformers
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.flex_attention import BlockMask
from transformers import AutoModelForCausalLM, BartConfig, DynamicCache, EncoderDecoderCache, LlamaConfig, pipeline

from hf_paged import PagedCache, PagedEncoderDecoderCache, PagePool, ReleaseFinished, compiled
from hf_paged.attention.mask import PagedMask
from tests.models import generate, left_padded, letter_tokenizer, random_ids, tiny_llama, tiny_model

IDS, MASK = random_ids(2, 20), left_padded(20, [20, 11])
BART = {
    "vocab_size": 200,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
MLLAMA = {"num_hidden_layers": 4, "cross_attention_layers": [1, 3]}
GPT_NEO = {"hidden_size": 48, "num_layers": 2, "num_heads": 3, "attention_types": [[["global", "local"], 1]]}


def llama(attention="paged_flex", **sizes):
    model = tiny_llama(**sizes)
    model.set_attn_implementation(attention)
    return model.requires_grad_(False)


def bart():
    return transformers.BartForConditionalGeneration(BartConfig(**BART)).eval()


def cache_of(model, **arguments):
    return PagedCache.from_model(model, page_size=16, **arguments)


def run(model, cache, ids=IDS, **arguments):
    return generate(model, model.config._attn_implementation, cache, ids, max_new_tokens=3, **arguments)


def filled(cache):
    """Two rows of 17 tokens."""
    keys = torch.randn(2, 2, 17, 16)
    for layer in range(len(cache)):
        cache.update(keys, keys, layer)
    return cache


def checkpointed():
    model = llama().train()
    model.gradient_checkpointing_enable()
    return model


def prompt_tuned(config_class, attention):
    model = tiny_llama()
    model.set_attn_implementation(attention)
    config = config_class(task_type="CAUSAL_LM", num_virtual_tokens=4)
    return peft.get_peft_model(model, config).eval()


def of_model(model_class, config_class, **sizes):
    config = getattr(transformers, config_class)(**sizes, attn_implementation="paged_flex")
    return AutoModelForCausalLM.from_config(config)


def with_pipeline():
    made = pipeline("text-generation", model=llama(), tokenizer=letter_tokenizer())
    return PagedCache.from_model(made)


def twice(cache, layer=0):
    keys = torch.randn(2, 2, 17, 16)
    cache.update(keys, keys, layer)
    cache.update(keys, keys, layer)


def written_with(**changes):
    """Give a layer keys that are made from ordinary ones."""

    def write():
        keys = torch.randn(1, 2, 5, 16)
        cache_of(llama()).update(changes["keys"](keys), changes.get("values", changes["keys"])(keys), 0)

    return write


MISTAKES = {
    # what was given to whom
    "PagedCache(model)": (lambda: PagedCache(llama()), "but a LlamaForCausalLM was given. Pass model.config, or call"),
    "PagedCache('gpt2')": (lambda: PagedCache("gpt2"), "A model's configuration is needed, but a str was given"),
    "PagedCache(dict)": (
        lambda: PagedCache({"num_hidden_layers": 2}),
        "configuration is needed, but a dict was given",
    ),
    "PagedCache()": (lambda: PagedCache(), "needs either a model's config or a pool"),
    "PagePool(model)": (lambda: PagePool(llama()), "but a LlamaForCausalLM was given. Pass model.config"),
    "pool=cache": (lambda: PagedCache(pool=cache_of(llama())), "was given a PagedCache, but it takes a PagePool"),
    "from_model(config)": (
        lambda: PagedCache.from_model(LlamaConfig()),
        "was given a LlamaConfig, but it takes a model of Transformers. With a configuration alone, use PagedCache(",
    ),
    "from_model(name)": (lambda: PagedCache.from_model("gpt2"), "was given a str, but it takes a model"),
    "from_model(pipeline)": (with_pipeline, "was given a TextGenerationPipeline, but it takes a model"),
    "num_pages=1.5": (lambda: cache_of(llama(), num_pages=1.5), "num_pages=1.5 was asked for, but a whole number"),
    "num_pages='8'": (lambda: cache_of(llama(), num_pages="8"), "num_pages='8' was asked for, but a whole number"),
    "num_pages=0": (
        lambda: cache_of(llama(), num_pages=0),
        "num_pages=0 was asked for, but a whole number of at leas",
    ),
    "page_size=100": (lambda: PagedCache.from_model(llama(), page_size=100), "choose one of 16, 32, 64, 128, 256"),
    "page_size=16.0": (lambda: PagedCache.from_model(llama(), page_size=16.0), "page_size=16.0 was asked for"),
    # models
    "a codec's configuration": (
        lambda: PagedCache(transformers.EncodecConfig()),
        "this 'encodec' model says nothing of a decoder's layers",
    ),
    "recurrent state": (
        lambda: PagedCache(transformers.MambaConfig(num_hidden_layers=2)),
        "which keeps another state",
    ),
    "keys of images": (
        lambda: PagedCache(transformers.MllamaConfig(text_config=MLLAMA)),
        r"layers [1, 3] of this 'mllama' model keep those of its images instead. Use Transformers' DynamicCache(",
    ),
    "keys of images, the text part alone": (
        lambda: PagedCache(transformers.models.mllama.MllamaTextConfig(**MLLAMA)),
        "layers [1, 3] of this 'mllama_text_model' model keep those of its images instead",
    ),
    "an encoder, without room for it": (
        lambda: PagedCache(BartConfig(**BART)),
        "Use PagedCache.from_model(model), or",
    ),
    "a cache around the cache": (
        lambda: bart().generate(
            IDS, past_key_values=EncoderDecoderCache(PagedCache.from_model(bart()), DynamicCache()), max_new_tokens=2
        ),
        "it needs no EncoderDecoderCache around it",
    ),
    "an encoder's cache for a decoder": (
        lambda: run(llama(), PagedEncoderDecoderCache(BartConfig(**BART))),
        "Pass the cache to a model with an encoder",
    ),
    "a layer updated twice": (lambda: twice(cache_of(llama())), "Layer 0 was updated twice in one forward pass"),
    "attention by itself, set by hand": (
        lambda: set_by_hand(transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**GPT_NEO))),
        "it computes attention by itself instead of through Transformers' attention interface",
    ),
    "attention weights": (
        lambda: run(llama(), cache_of(llama()), output_attentions=True, return_dict_in_generate=True),
        "output_attentions",
    ),
    # modes of torch
    "training with gradients": (
        lambda: llama().requires_grad_()(IDS, past_key_values=cache_of(llama())),
        "Keys that require gradients were given to a PagedCache",
    ),
    "checkpointing": (
        lambda: checkpointed()(IDS, past_key_values=cache_of(llama())),
        "in training mode over keys that were not given to the PagedCache",
    ),
    "checkpointing, padded": (
        lambda: checkpointed()(IDS, past_key_values=cache_of(llama()), attention_mask=MASK),
        "Call model.eval() before generating",
    ),
    "compiled in training mode": (lambda: compiled(llama().train()).__enter__(), "Call model.eval()"),
    "compiled(model).generate": (
        lambda: compiled(llama()).generate(IDS),
        "was asked for its 'generate', but it is a context. Write `with compiled(model): model.generate(...)`",
    ),
    "compiled(model)(ids)": (lambda: compiled(llama())(IDS), "was called like a model, but it is a context"),
    "sparse keys": (written_with(keys=lambda keys: keys.to_sparse()), "as a sparse tensor (torch.sparse_coo)"),
    "sparse values": (
        written_with(keys=lambda keys: keys, values=lambda values: values.to_sparse()),
        "as a sparse tensor (torch.sparse_coo)",
    ),
    "quantised keys": (
        written_with(keys=lambda keys: torch.quantize_per_tensor(keys, 0.1, 0, torch.qint8)),
        "as a quantised tensor (torch.qint8)",
    ),
    "nested keys": (
        written_with(keys=lambda keys: torch.nested.nested_tensor(list(keys), layout=torch.jagged)),
        "as a NestedTensor",
    ),
    "nested keys, strided": (
        written_with(keys=lambda keys: torch.nested.nested_tensor(list(keys))),
        "a nested tensor",
    ),
    # calls
    "crop(5)": (lambda: filled(cache_of(llama())).crop(5), "call crop(n - cache.get_seq_length())"),
    "crop(-18)": (lambda: filled(cache_of(llama())).crop(-18), "Give 0 or a negative number, not below -17"),
    "a row too many": (lambda: filled(cache_of(llama())).reorder_cache(torch.tensor([0, 2])), "holds 2 rows"),
    "crop of a layer": (lambda: filled(cache_of(llama())).layers[0].crop(-1), "the layers of a PagedCache share"),
    "another batch": (
        lambda: run(llama(), filled(cache_of(llama())), random_ids(3, 20)),
        "holds 2 rows, but a batch o",
    ),
    "nothing new": (lambda: run(llama(), filled(cache_of(llama())), IDS[:, :17]), "so no token is left to compute"),
    "no end": (lambda: ReleaseFinished(cache_of(llama())), "Pass eos_token_id=model.generation_config.eos_token_id"),
}


def set_by_hand(model):
    model.config._attn_implementation = "paged_flex"
    return PagedCache.from_model(model)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_with_what_to_do(mistake):
    call, message = MISTAKES[mistake]
    with pytest.raises((ValueError, AttributeError), match=re.escape(message)):
        call()


def under_vmap(run):
    torch.func.vmap(run)(IDS[:, None])


def under_grad(run):
    torch.func.grad(lambda scale: run(IDS).sum() * scale)(torch.tensor(1.0))


def under_jvp(run):
    torch.func.jvp(lambda scale: run(IDS) * scale, (torch.tensor(1.0),), (torch.tensor(1.0),))


def in_a_dual_level(run):
    with forward_ad.dual_level():
        run(IDS)


def faked(run):
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        run(IDS)


def traced_by_jit(run):
    torch.jit.trace(run, (IDS,), check_trace=False)


def traced_by_fx(run):
    make_fx(run)(IDS)


def exported(run):
    class Model(torch.nn.Module):
        def forward(self, ids):
            return run(ids)

    torch.export.export(Model(), (IDS,), strict=False)


WAYS = [under_vmap, under_grad, under_jvp, in_a_dual_level, faked, traced_by_jit, traced_by_fx, exported]


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("attention", "num_cached"), [("paged_flex", 0), ("paged_flex", 17), ("sdpa", 17)])
def test_a_pass_that_pages_cannot_take_part_in_changes_nothing(way, attention, num_cached):
    model = llama(attention)
    cache = cache_of(model)
    first = random_ids(1 if way is under_vmap else 2, 17)
    with torch.no_grad():
        if num_cached:
            model(first, past_key_values=cache)
        held = [tensor.clone() for tensor in cache.gather(0)] if num_cached else [None, None]
        with pytest.raises(ValueError, match=r"writ|FakeTensor|FunctionalTensor|dense") as raised:
            way(lambda ids: model(ids, past_key_values=cache).logits)
        assert "DynamicCache" in str(raised.value)
        assert cache.lengths == ([num_cached] * len(first) if num_cached else [])
        assert all(
            found is kept or torch.equal(found, kept) for found, kept in zip(cache.gather(0), held, strict=True)
        )
        cache.crop(0)
        cache.pool.check_integrity()
        prompt = torch.cat([first, random_ids(len(first), 1, seed=1)], dim=1)
        expected = generate(llama("sdpa"), "sdpa", DynamicCache(), prompt, max_new_tokens=3)
        assert torch.equal(generate(model, attention, cache, prompt, max_new_tokens=3), expected)


@pytest.mark.parametrize("attention", ["paged_flex", "sdpa"])
def test_on_the_meta_device_pages_are_counted_and_nothing_is_computed(attention):
    model = llama(attention).to("meta")
    cache = cache_of(model)
    ids = IDS.to("meta")
    model(ids, past_key_values=cache)
    assert model(ids[:, :1], past_key_values=cache).logits.shape == (2, 1, 200)
    assert cache.lengths == [21, 21]
    assert cache.stats().num_active_pages == 4


def test_mask_sizes_are_plain_numbers_for_a_mask_function_that_is_compiled():
    model = tiny_llama()
    model.config._attn_implementation = "flex_attention"
    length, _ = PagedCache(model.config).get_mask_sizes(5, 0)
    assert type(length) is int


def test_more_memory_than_there_is_is_refused_before_anything_is_held():
    model = llama()
    cache = cache_of(model, num_pages=10**8)
    with pytest.raises(MemoryError, match=r"can't give .* GiB at once.*ask for fewer \(num_pages\)"):
        run(model, cache)
    assert cache.lengths == []


def test_a_mask_says_who_looks_into_it():
    mask = object.__new__(PagedMask)
    assert isinstance(mask, BlockMask)
    with pytest.raises(AttributeError, match="as PEFT's prompt tuning and p-tuning do, needs the model loaded with"):
        _ = mask.dtype


@pytest.mark.parametrize("config", [peft.PromptTuningConfig, peft.PromptEncoderConfig])
def test_virtual_tokens_work_with_sdpa_and_are_refused_over_pages(config):
    torch.manual_seed(0)
    model = prompt_tuned(config, "sdpa")
    arguments = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 5, "eos_token_id": None}
    arguments |= {"pad_token_id": 0, "do_sample": False}
    expected = model.generate(past_key_values=DynamicCache(), **arguments)
    assert torch.equal(model.generate(past_key_values=cache_of(model), **arguments), expected)
    model.base_model.set_attn_implementation("paged_flex")
    with pytest.raises(AttributeError, match="prompt tuning and p-tuning"):
        model.generate(past_key_values=cache_of(model), **arguments)


def test_the_context_of_compiled_gives_the_model():
    model = llama()
    with compiled(model) as within:
        assert within is model


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        ("FalconConfig", {"vocab_size": 200, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}),
        ("GPTNeoConfig", GPT_NEO),
    ],
)
def test_families_that_look_attention_up_run_what_they_were_loaded_with(config, sizes):
    settings = getattr(transformers, config)(**sizes, pad_token_id=0)
    with pytest.raises(KeyError, match="paged_flex"):  # what docs/how-to/troubleshoot.md quotes
        AutoModelForCausalLM.from_config(settings, attn_implementation="paged_flex")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(settings, attn_implementation="eager").eval()
    expected = generate(model, "eager", DynamicCache(), IDS, attention_mask=MASK, max_new_tokens=5)
    cache = cache_of(model)
    assert torch.equal(generate(model, "paged_flex", cache, IDS, attention_mask=MASK, max_new_tokens=5), expected)
    assert model.config._attn_implementation == "eager"


def test_transformers_names_what_it_knows_where_the_import_was_forgotten():
    with pytest.raises(ValueError, match=r'Specified `attn_implementation="paged_flexx"` is not supported'):
        tiny_model(
            transformers.LlamaForCausalLM, LlamaConfig, attn_implementation="paged_flexx"
        )  # a name that nobody registered, as ours without `import hf_paged`


def test_the_checks_are_of_the_thread_that_runs_the_model():
    model = llama()
    expected = run(model, cache_of(model))
    found = []

    def elsewhere():
        found.append(run(model, cache_of(model)))

    with torch._subclasses.FakeTensorMode():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert torch.equal(found[0], expected)
