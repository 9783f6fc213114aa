"""What is refused before anything has changed, and what goes on to work."""

import threading

import peft
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.flex_attention import BlockMask
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig

from hf_paged import PagedCache, PagePool, compiled
from hf_paged._torch.host_memory import untouched_memory
from hf_paged.attention.mask import PagedMask
from tests.models import generate, left_padded, random_ids, tiny_llama, tiny_model

IDS, MASK = random_ids(2, 20), left_padded(20, [20, 11])
GPT_NEO = {"hidden_size": 48, "num_layers": 2, "num_heads": 3, "attention_types": [[["global", "local"], 1]]}


def llama(attention="paged_flex", **sizes):
    model = tiny_llama(**sizes)
    model.set_attn_implementation(attention)
    return model.requires_grad_(False)


def cache_of(model, **arguments):
    return PagedCache.from_model(model, page_size=16, **arguments)


def run(model, cache, ids=IDS, **arguments):
    return generate(model, model.config._attn_implementation, cache, ids, max_new_tokens=3, **arguments)


def prompt_tuned(config_class, attention):
    model = tiny_llama()
    model.set_attn_implementation(attention)
    config = config_class(task_type="CAUSAL_LM", num_virtual_tokens=4)
    return peft.get_peft_model(model, config).eval()


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


@pytest.mark.parametrize("attention", ["sdpa", "paged_flex"])
def test_more_memory_than_there_is_is_refused_before_anything_is_held(attention):
    # A configuration that says in words of its own how large keys are.
    model = GPT2LMHeadModel(GPT2Config(vocab_size=200, n_layer=2, n_embd=48, n_head=3)).eval()
    model.set_attn_implementation(attention)
    cache = cache_of(model, num_pages=10**7)
    with pytest.raises(ValueError, match=r"num_pages=10000000 was asked for, .* on cpu. Ask for fewer"):
        run(model, cache)
    assert cache.lengths == []
    assert cache.pool.storage(0) is None
    cache.pool.check_integrity()


def test_memory_that_the_system_does_not_give_is_named():
    with pytest.raises(MemoryError, match=r"can't give .* GiB at once.*ask for fewer \(num_pages\)"):
        untouched_memory(2**62)


def data_parallel(model):
    return torch.nn.DataParallel(model)


def distributed(model):
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    return torch.nn.parallel.DistributedDataParallel(model.requires_grad_(True))


def accelerated(model):
    return Accelerator(cpu=True, mixed_precision="no").prepare(model)


@pytest.fixture
def no_group_left():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("no_group_left")
@pytest.mark.parametrize("wrap", [data_parallel, distributed, accelerated, torch.compile])
def test_a_wrapped_model_is_taken_as_the_model_inside(wrap):
    model = llama()
    expected = generate(llama("sdpa"), "sdpa", DynamicCache(), IDS, attention_mask=MASK, max_new_tokens=3)
    wrapped = wrap(model)
    cache = PagedCache(pool=PagePool.from_model(wrapped))
    assert len(PagedCache.from_model(wrapped)) == len(cache)
    cache.prefill(wrapped, IDS, MASK)
    with torch.no_grad():
        assert torch.equal(run(model, cache, attention_mask=MASK), expected)
    with compiled(wrapped) as within:
        assert within.generate


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
