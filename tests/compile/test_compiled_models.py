"""Which models' steps are compiled: the same tokens, or one clear error."""

import pytest
import torch
from accelerate import dispatch_model
from torch.nn.functional import layer_norm
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    CTRLConfig,
    CTRLLMHeadModel,
    DynamicCache,
    LlamaModel,
)
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from hf_paged import PagedCache
from hf_paged.compile.api import compiled
from hf_paged.compile.linear import choose_linear_layers
from tests.families import ENCODER, FAMILIES, new_cache
from tests.models import generate, left_padded, random_ids, tiny_llama, tiny_model

pytestmark = pytest.mark.usefixtures("graphs")
CHANGED = r"Layer 0 changes keys or values between cache.update.. and its attention.*leave out compiled"


class Attention(LlamaAttention):
    """A Llama's attention with something between its parts, which stand here as methods."""

    def forward(self, hidden_states, position_embeddings, attention_mask, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (project(hidden_states).view(shape).transpose(1, 2) for project in projections)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        cache = (
            kwargs["cache"] if "cache" in kwargs else kwargs["past_key_values"]
        )  # from Transformers 5.24 on; before
        key, value = self.update(cache, key, value)
        output = self.attend(query, key, value, attention_mask)
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), None

    def update(self, cache, key, value):
        return cache.update(key, value, self.layer_idx)

    def attend(self, query, key, value, mask):
        function = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        return function(self, query, key, value, mask, dropout=0.0, scaling=self.scaling)[0]


class ReadsScaledValues(Attention):
    def attend(self, query, key, value, mask):
        return super().attend(query, key, value * 2, mask)


class ReadsNormedKeys(Attention):
    def attend(self, query, key, value, mask):
        return super().attend(query, layer_norm(key, key.shape[-1:]), value, mask)


class ReadsKeysAsValues(Attention):
    def attend(self, query, key, value, mask):
        return super().attend(query, key, key, mask)


class ReadsOneHeadForAll(Attention):
    def attend(self, query, key, value, mask):
        return super().attend(query, key[:, :1].expand_as(key), value[:, :1].expand_as(value), mask)


class ReadsInAnotherOrder(Attention):
    def attend(self, query, key, value, mask):
        return super().attend(query, key.flip(1), value.flip(1), mask)


class ReadsTwice(Attention):
    """One difference of two attentions, over the same keys."""

    def attend(self, query, key, value, mask):
        return super().attend(query, key, value, mask) - 0.5 * super().attend(query.flip(1), key, value, mask)


class ReadsThoseOfTheFirstLayer(Attention):
    """The first layer's keys and values serve all layers, though the others keep theirs, too."""

    def update(self, cache, key, value):
        key, value = super().update(cache, key, value)
        if self.layer_idx == 0:
            self.config.first = key, value
        return self.config.first


class LooksAtItsKeys(Attention):
    def update(self, cache, key, value):
        key, value = super().update(cache, key, value)
        self.config.seen = key.shape[1], key.sum()
        return key, value

    def attend(self, query, key, value, mask):
        return super().attend(query, key, value, mask) + 0 * self.config.seen[1]


def llama_with(attention, **changes):
    model = tiny_llama(**changes)
    for layer in model.model.layers:
        layer.self_attn.__class__ = attention
    return model


def tokens_of(model, attention, cache, **inputs):
    model.set_attn_implementation(attention)
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 20}
    return model.generate(past_key_values=cache, **inputs, **settings)


def check_same(make, graphs, num_graphs=1, **inputs):
    reference, model = make(), make()
    expected = tokens_of(reference, "sdpa", None, **inputs)
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    with compiled(model):
        tokens = tokens_of(model, "paged_flex", cache, **inputs)
    assert torch.equal(tokens, expected)
    assert 1 <= len(graphs) <= num_graphs
    cache.pool.check_integrity()


def ragged():
    return {"input_ids": random_ids(3, 20), "attention_mask": left_padded(20, [20, 9, 16])}


CHANGES = [ReadsScaledValues, ReadsNormedKeys, ReadsKeysAsValues, ReadsOneHeadForAll, ReadsInAnotherOrder]


@pytest.mark.parametrize("attention", CHANGES)
def test_keys_that_are_read_otherwise_than_they_are_cached_are_refused(attention, graphs):
    model, ids = llama_with(attention), random_ids(2, 20)
    cache = PagedCache.from_model(model, page_size=16)
    model.set_attn_implementation("paged_flex")
    with pytest.raises(ValueError, match=CHANGED), compiled(model):
        generate(model, "paged_flex", cache, ids)
    assert not graphs, "nothing was compiled"
    assert cache.lengths == [20, 20], "the prompt, which is not compiled"
    cache = PagedCache.from_model(model, page_size=16)
    with pytest.raises(ValueError, match=CHANGED), compiled(model):
        cache.prefill(model, random_ids(2, 150))
    assert cache.lengths == []


@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize("attention", [ReadsScaledValues, ReadsKeysAsValues])
def test_so_they_are_by_torch_compile(attention, is_whole):
    model = llama_with(attention)
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=is_whole)
    with pytest.raises(ValueError, match="changes keys or values between"):
        generate(model, "paged_flex", PagedCache.from_model(model, page_size=16), random_ids(2, 20))


def family(name):
    return next(family for family in FAMILIES if family.name == name)


@pytest.mark.parametrize(
    "make",
    [
        lambda: llama_with(ReadsTwice),
        pytest.param(
            lambda: family("Gemma 3n").load("sdpa"),
            marks=pytest.mark.skipif("dummy" not in DYNAMIC_LAYER_TYPE_MAPPING, reason="5.21 copies them: refused"),
        ),
    ],
)
def test_several_attentions_read_what_one_of_them_has_written(make, graphs, monkeypatch):
    monkeypatch.setattr("hf_paged.cache.prompt.prefill.MIN_TOKENS", 16)
    reference, model, inputs = make(), make(), ragged()
    expected = tokens_of(reference, "sdpa", new_cache(reference), **inputs)
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    with compiled(model):
        cache.prefill(model, **inputs, max_tokens=16)
        tokens = tokens_of(model, "paged_flex", cache, **inputs)
    assert torch.equal(tokens, expected)
    assert len(graphs) == 2, "prompts and decoding"


@pytest.mark.parametrize("attention", [LooksAtItsKeys, ReadsThoseOfTheFirstLayer])
def test_keys_that_are_not_read_by_their_attention_alone_are_refused(attention, graphs):
    model = llama_with(attention)
    model.set_attn_implementation("paged_flex")
    with (
        pytest.raises(ValueError, match=r"gives to cache.update.* are read by more than its attention, or not by it"),
        compiled(model),
    ):
        generate(model, "paged_flex", PagedCache.from_model(model, page_size=16), random_ids(2, 20))
    assert not graphs


class Halts(Attention):
    def attend(self, query, key, value, mask):
        torch._dynamo.graph_break()
        return super().attend(query, key, value, mask)


def test_keys_are_written_though_the_graph_ends_between_update_and_attention():
    model, ids = llama_with(Halts), random_ids(2, 20)
    expected = generate(llama_with(Halts), "sdpa", DynamicCache(), ids)
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(generate(model, "paged_flex", PagedCache.from_model(model, page_size=16), ids), expected)


@pytest.mark.parametrize("name", ["GPT-OSS", "SmolLM3"])
def test_families_compile(name, graphs):
    oracle, inputs = family(name).oracle, ragged()
    model, reference = family(name).load("paged_flex"), family(name).load(oracle)
    expected = tokens_of(reference, oracle, new_cache(reference), **inputs)
    with compiled(model):
        tokens = tokens_of(model, "paged_flex", PagedCache.from_model(model, page_size=16), **inputs)
    assert torch.equal(tokens, expected)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("model", "config", "changes", "inputs"),
    [
        (BartForConditionalGeneration, BartConfig, {}, {"input_ids": random_ids(2, 20)}),
        (BartForCausalLM, BartConfig, {"is_decoder": True}, {"input_ids": random_ids(2, 20)}),
    ],
)
def test_decoders_that_ask_for_positions_compile_twice(model, config, changes, inputs, graphs):
    check_same(lambda: tiny_model(model, config, **ENCODER | changes), graphs, num_graphs=2, **inputs)


def quantized():
    with pytest.warns(DeprecationWarning, match="torch.ao.quantization"):
        return torch.ao.quantization.quantize_dynamic(tiny_llama(), {torch.nn.Linear}, dtype=torch.qint8)


class CountsInPython(torch.nn.Module):
    """A layer that looks at what is in a tensor, as routing to experts may."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states):
        output = self.layer(hidden_states)
        return output if hidden_states.sum() > 0 else output * 2


def routed():
    model = tiny_llama()
    model.model.layers[1].mlp = CountsInPython(model.model.layers[1].mlp)
    return model


class Prints(torch.nn.Module):
    def forward(self, hidden_states):
        torch._dynamo.graph_break()
        return hidden_states


def broken():
    model = tiny_llama()
    model.model.norm = Prints()
    return model


def ctrl():
    return tiny_model(CTRLLMHeadModel, CTRLConfig, num_attention_heads=3, dff=64)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [quantized, routed, broken, ctrl])
def test_what_dynamo_can_t_make_one_graph_of_is_one_clear_error(make):
    model, ids = make(), random_ids(2, 20)
    model.set_attn_implementation("paged_flex")
    expected = generate(model, "paged_flex", PagedCache.from_model(model, page_size=16), ids)
    with (
        pytest.raises(ValueError, match=r"torch.compile can't make one graph of a step of .*Leave out compiled\(\)"),
        compiled(model),
    ):
        generate(model, "paged_flex", PagedCache.from_model(model, page_size=16), ids)
    assert model.generation_config.compile_config is None
    assert torch.equal(generate(model, "paged_flex", PagedCache.from_model(model, page_size=16), ids), expected)


def test_an_error_of_another_function_stays_torch_s():
    model = tiny_llama()
    model.set_attn_implementation("paged_flex")

    @torch.compile(backend="eager", fullgraph=True)
    def other(x):
        torch._dynamo.graph_break()
        return x

    with pytest.raises(torch._dynamo.exc.Unsupported), compiled(model):
        other(torch.ones(2))


def test_hooks_that_move_tensors_are_refused():
    model = dispatch_model(tiny_llama(), {"": "cpu"}, force_hooks=True)
    with pytest.raises(ValueError, match=r"has hooks of accelerate.*leave out compiled"), compiled(model):
        pass


def test_what_does_not_generate_is_refused():
    model = tiny_model(LlamaModel, tiny_llama().config_class)
    with pytest.raises(ValueError, match=r"which has no generate\(\). Pass a model for generation"), compiled(model):
        pass


class Doubled(torch.Tensor):
    """A weight that is more than a tensor."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __tensor_unflatten__(cls, tensors, context, size, stride):
        return cls(tensors["inner"])

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        if function is torch.ops.aten.detach.default:
            return cls(arguments[0].inner)
        plain = torch.utils._pytree.tree_map_only(cls, lambda weight: weight.inner * 2, (arguments, keywords or {}))
        return function(*plain[0], **plain[1])


def compiled_layer(layer, x, kinds):
    def backend(graph, inputs):
        kinds.append(choose_linear_layers(graph))
        return graph

    return torch.compile(layer, backend=backend)(x)


def test_linear_layers_whose_weight_is_more_than_a_tensor_are_left_to_inductor():
    layer = torch.nn.Linear(8, 4)
    layer.weight = torch.nn.Parameter(Doubled(layer.weight.detach()))
    x, kinds = torch.randn(1, 8), []
    with torch.no_grad():
        torch.testing.assert_close(compiled_layer(layer, x, kinds), layer(x))
    assert kinds == [{"torch's"}]


def test_so_are_those_that_autocast_computes_in_another_dtype():
    layer, x, kinds = torch.nn.Linear(8, 4), torch.randn(1, 8), []
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        actual = compiled_layer(layer, x, kinds)
        assert actual.dtype == torch.bfloat16
        assert torch.equal(actual, layer(x))
    assert kinds == [{"torch's"}]
