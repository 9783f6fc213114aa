"""`compiled(model)`: the same tokens, few graphs, nothing left behind."""

import functools
import gc
import inspect
import weakref

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from hf_paged import PagedCache, sample
from hf_paged._torch.graphs import compile_graph
from hf_paged._transformers import CACHE
from hf_paged.compile import api, linear
from hf_paged.compile.api import compiled
from hf_paged.compile.linear import choose_linear_layers
from hf_paged.packaged import load_packaged_model, prompts
from tests.models import generate, left_padded, plain_tokens, random_ids, tiny_gemma, tiny_llama, tiny_model

COMPILES_DRAFTS = CACHE == "cache"
pytestmark = pytest.mark.usefixtures("graphs")
KEEPS_MODELS_APART = "isolate_recompiles" in inspect.signature(torch.compile).parameters


def one_layer(**changes):
    return tiny_llama(num_layers=1, **changes)


def compiled_tokens(model, ids, mask=None, max_tokens=None, **arguments):
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    with compiled(model):
        if max_tokens is not None:
            cache.prefill(model, ids, mask, max_tokens=max_tokens)
        tokens = generate(model, "paged_flex", cache, ids, attention_mask=mask, **arguments)
    cache.pool.check_integrity()
    return tokens


def test_one_graph_serves_one_row_and_one_more_any_other_batch(graphs):
    model, reference = one_layer(), one_layer()
    for num_rows, num_graphs in ((1, 1), (3, 2), (2, 2), (7, 2), (1, 2)):
        ids, mask = random_ids(num_rows, 30), left_padded(30, [30, 2, 17, 16, 5, 9, 1][:num_rows])
        assert torch.equal(compiled_tokens(model, ids, mask), plain_tokens(reference, ids, attention_mask=mask))
        assert len(graphs) == num_graphs


@pytest.mark.skipif(not COMPILES_DRAFTS, reason="Transformers compiles assisted decoding from 5.24 on")
def test_drafts_of_any_length_are_one_graph_after_the_first_length(graphs):
    model, reference, draft = (tiny_gemma(24) for _ in range(3))
    with torch.no_grad():
        for weight in draft.parameters():  # so that some of what it drafts is wrong
            weight += 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    repeated, lengths = torch.tensor([[5, 6, 7, 8, 9] * 6]), set()
    prepare = model.prepare_inputs_for_generation

    @functools.wraps(prepare)
    def note_length(*args, **kwargs):
        inputs = prepare(*args, **kwargs)
        lengths.add(inputs["input_ids"].shape[1])
        return inputs

    model.prepare_inputs_for_generation = note_length
    for ids, settings in (
        (repeated, {"prompt_lookup_num_tokens": 4}),
        (random_ids(1, 33), {"prompt_lookup_num_tokens": 7}),
        (repeated, {"prompt_lookup_num_tokens": 12}),
        (random_ids(1, 20, seed=3), {"assistant_model": draft}),
        (random_ids(1, 17), {"assistant_early_exit": 1}),
        (random_ids(1, 20, seed=4), {"assistant_model": draft, "attention_mask": left_padded(20, [16])}),
        (random_ids(1, 20), {}),
    ):
        plain = {name: value for name, value in settings.items() if name == "attention_mask"}
        expected = plain_tokens(reference, ids, **plain)
        cache = PagedCache.from_model(model, page_size=16)
        with compiled(model):
            assert torch.equal(generate(model, "paged_flex", cache, ids, **settings), expected)
        cache.pool.check_integrity()
    assert len(lengths) > 5
    # For one token there are two, since generate() passes `return_dict` where nothing is ever drafted.
    assert len(graphs) <= 4, "for one token, for as many as the first draft has, and for any other number"


@pytest.mark.skipif(not KEEPS_MODELS_APART, reason="torch 2.11 counts the graphs of all models together")
def test_each_model_has_as_many_graphs_as_torch_allows(graphs):
    ids = random_ids(2, 9)
    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(3):
            compiled_tokens(one_layer(), ids)
    assert len(graphs) == 3


@pytest.fixture
def sixteen(monkeypatch):
    """Let 16 tokens be enough for a compiled prompt."""
    monkeypatch.setattr("hf_paged.cache.prompt.prefill.MIN_TOKENS", 16)


@pytest.mark.parametrize("max_tokens", [16, 1000])
def test_all_chunks_of_a_prefill_are_one_graph(graphs, sixteen, max_tokens):
    model, reference = one_layer(), one_layer()
    for lengths in ([50, 3, 20, 41], [17, 50], [50, 50, 49]):
        ids, mask = random_ids(len(lengths), 50), left_padded(50, lengths)
        tokens = compiled_tokens(model, ids, mask, max_tokens)
        assert torch.equal(tokens, plain_tokens(reference, ids, attention_mask=mask))
    values = [[node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder")] for graph in graphs]
    prompts = [inputs for inputs in values if any(isinstance(value, torch.SymInt) for value in inputs)]
    assert len([inputs for inputs in prompts if any(getattr(value, "shape", ())[:1] == (1,) for value in inputs)]) == 1
    assert len(graphs) <= 3, "beside it one for 4 rows, and one for any number"


@pytest.mark.parametrize("family", [(MistralForCausalLM, MistralConfig), (GPT2LMHeadModel, GPT2Config)])
def test_other_families_compile_too(graphs, sixteen, family):
    changes = {"sliding_window": 20} if family[1] is MistralConfig else {"num_attention_heads": 3}
    model, reference = tiny_model(*family, **changes), tiny_model(*family, **changes)
    for max_tokens in (16, 40):
        ids = random_ids(2, 30)
        assert torch.equal(compiled_tokens(model, ids, max_tokens=max_tokens), plain_tokens(reference, ids))
    assert len(graphs) == 2


@pytest.mark.parametrize("num_rows", [1, 2])
def test_what_was_compiled_keeps_no_graph(monkeypatch, num_rows):
    kept = []

    def compile_and_note(graph, *arguments):
        kept.append(weakref.ref(graph))
        return compile_graph(graph, *arguments)

    monkeypatch.setattr(api, "compile_graph", compile_and_note)
    compiled_tokens(one_layer(), random_ids(num_rows, 9))
    gc.collect()
    assert [graph() for graph in kept] == [None]


@pytest.mark.parametrize("is_watched", [False, True])
def test_a_compiled_prompt_leaves_out_what_only_the_output_needs(monkeypatch, sixteen, is_watched):
    monkeypatch.setattr(api, "compile_graph", compile_graph)
    model, ids = tiny_llama(), random_ids(2, 150)
    model.set_attn_implementation("paged_flex")
    expected, cache = (PagedCache.from_model(model, page_size=16) for _ in range(2))
    outputs = []

    def note(module, inputs, output):
        outputs.append(output)

    note.__module__ = "transformers.tests"  # whose hooks look at outputs alone, so that the prompt is packed
    if is_watched:
        model.model.layers[-1].register_forward_hook(note)
    expected.prefill(model, ids)
    seen = outputs.copy()
    with compiled(model):
        outputs.clear()  # else it would be longer the second time, and dynamo would compile again
        PagedCache.from_model(model, page_size=16).prefill(model, ids)
        outputs.clear()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            cache.prefill(model, ids)
    for layer in range(model.config.num_hidden_layers):
        for actual, plain in zip(cache.gather(layer), expected.gather(layer), strict=True):
            torch.testing.assert_close(actual, plain, atol=1e-5, rtol=1e-5)
    counts = {event.key: event.count for event in profiler.key_averages()}
    assert counts["hf_paged::linear_of_many_rows"] == 7 * model.config.num_hidden_layers - (0 if is_watched else 5)
    assert counts.get("hf_paged::write_only", 0) == (0 if is_watched else 1)
    torch.testing.assert_close(outputs, seen, atol=1e-3, rtol=1e-3)  # values of up to 55


def test_outside_of_the_context_nothing_is_compiled(graphs):
    model = one_layer()
    compiled_tokens(model, random_ids(1, 20))
    assert len(graphs) == 1
    del graphs[:]
    assert model.generation_config.compile_config is None
    cache = PagedCache.from_model(model, page_size=16)
    cache.prefill(model, random_ids(2, 20))
    generate(model, "paged_flex", cache, random_ids(2, 20))
    assert not graphs


def test_a_model_in_training_mode_is_refused():
    with (
        pytest.raises(ValueError, match=r"compiled\(\) is for inference. Call model.eval\(\)"),
        compiled(tiny_llama().train()),
    ):
        pass


def test_only_linear_layers_in_float32_are_compiled_in_another_way(graphs):
    for dtype, names in ((torch.float32, {"linear_of_one_row"}), (torch.float64, set())):
        torch._dynamo.reset()
        del graphs[:]
        compiled_tokens(one_layer(dtype=dtype), random_ids(1, 20))
        (graph,) = graphs
        ours = {node.target._opname for node in graph.graph.nodes if "hf_paged.linear" in str(node.target)}
        assert ours == names


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("kind", "num_rows"), [("few", 1), ("few", 3), ("few", 4), ("many", 200)])
@pytest.mark.parametrize("has_onednn", [True, False])
def test_linear_layers_of_rows_give_what_torch_gives(has_onednn, kind, num_rows, has_bias, monkeypatch):
    monkeypatch.setattr(linear, "_HAS_ONEDNN", has_onednn)
    generator = torch.Generator().manual_seed(num_rows)
    x, weight = torch.randn(1, num_rows, 40, generator=generator), torch.randn(24, 40, generator=generator)
    bias = torch.randn(24, generator=generator) if has_bias else None
    actual = getattr(torch.ops.hf_paged, f"linear_of_{kind}_rows")(x, weight, bias)
    torch.testing.assert_close(actual, torch.nn.functional.linear(x, weight, bias), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("num_rows", "has_bias"), [(1, False), (1, True), (17, True), (200, True)])
def test_inductor_gives_the_same_with_what_is_compiled_around(num_rows, has_bias, monkeypatch):
    monkeypatch.undo()
    layer, norm = torch.nn.Linear(40, 24, bias=has_bias), torch.nn.LayerNorm(40)

    def function(x):
        return torch.nn.functional.silu(layer(norm(x))) + 1

    def backend(graph, inputs):
        choose_linear_layers(graph)
        return compile_graph(graph, inputs, {})

    x = torch.randn(num_rows, 1, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        actual = torch.compile(function, backend=backend, fullgraph=True)(x)
        torch.testing.assert_close(actual, function(x), atol=1e-5, rtol=1e-5)


@pytest.mark.real_model
def test_layers_of_a_real_model_say_the_same_when_they_are_compiled(monkeypatch):
    monkeypatch.undo()
    model, tokenizer = load_packaged_model()
    model.model.layers = model.model.layers[:2]  # of 30, which are compiled one like the other
    model.config.num_hidden_layers = 2
    inputs = tokenizer.pad({"input_ids": prompts(tokenizer, [40, 150, 7])}, return_tensors="pt")
    expected = plain_tokens(model, inputs["input_ids"], attention_mask=inputs["attention_mask"])
    tokens = compiled_tokens(model, inputs["input_ids"], inputs["attention_mask"], 128)
    assert torch.equal(tokens, expected)


def hook_of_a_module(model):
    return model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: -output)


def hook_before_a_module(model):
    return model.model.layers[0].mlp.register_forward_pre_hook(lambda module, inputs: (-inputs[0],))


def hook_of_all_modules(model):
    def double(module, inputs, output):
        return 2 * output if module is model.model.layers[0].mlp else None

    return torch.nn.modules.module.register_module_forward_hook(double)


def hook_before_all_modules(model):
    def double(module, inputs):
        return (2 * inputs[0],) if module is model.model.layers[0].mlp else None

    return torch.nn.modules.module.register_module_forward_pre_hook(double)


def other_forward(model):
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda hidden_states: -forward(hidden_states)


def other_data(model):
    weight = model.model.layers[0].mlp.down_proj.weight
    weight.data = -weight.t().contiguous().t()


def other_epsilon(model):
    model.model.layers[0].post_attention_layernorm.variance_epsilon = 50.0


CHANGES = [
    hook_of_a_module,
    hook_before_a_module,
    hook_of_all_modules,
    hook_before_all_modules,
    other_forward,
    other_data,
    other_epsilon,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changes_about_a_model_changes_what_is_compiled(graphs, sixteen, change):
    model, ids = one_layer(), random_ids(2, 40)
    before = plain_tokens(model, ids)
    # This loop looks at the model in its first steps only.
    assert torch.equal(compiled_tokens(model, ids, max_tokens=32, custom_generate=sample), before)
    assert len(graphs) == 2, "prompts and decoding"
    handle = change(model)
    try:
        during = compiled_tokens(model, ids, max_tokens=32, custom_generate=sample)
        expected = plain_tokens(model, ids)
    finally:
        if handle is not None:
            handle.remove()
    assert not torch.equal(expected, before)
    assert torch.equal(during, expected)
    if handle is not None:
        assert torch.equal(compiled_tokens(model, ids, max_tokens=32), before)


def test_hooks_of_the_backward_pass_are_not_asked_for(graphs):
    model, ids = one_layer(), random_ids(1, 20)
    expected = compiled_tokens(model, ids)
    handle = model.model.layers[0].register_full_backward_hook(lambda module, grad_inputs, grad_outputs: None)
    assert torch.equal(compiled_tokens(model, ids), expected)
    assert len(graphs) == 1
    handle.remove()
