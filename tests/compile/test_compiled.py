"""A model under `torch.compile`: the tokens of the plain path, one graph for decoding, no recompilation."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._inductor.utils import is_cudagraph_unsafe_op
from transformers import CompileConfig, DynamicCache, GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from hf_paged import PagedCache
from tests.families import FAMILIES
from tests.models import generate, left_padded, plain, plain_tokens, random_ids, run, tiny_llama, tiny_model

FP32 = {"atol": 2e-4, "rtol": 1e-4}


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()


def compiled(model, backend="aot_eager", **options) -> CompileCounterWithBackend:
    """Compile a model's forward in place; what is returned counts the graphs."""
    counter = CompileCounterWithBackend(backend)
    model.forward = torch.compile(model.forward, backend=counter, **options)
    return counter


def paged_tokens(model, ids, num_pages=None, **arguments):
    cache = PagedCache.from_model(model, page_size=16, num_pages=num_pages)
    tokens = generate(model, "paged_flex", cache, ids, **arguments)
    cache.pool.check_integrity()
    return tokens


def test_decoding_is_one_graph_at_any_length_and_pool_size():
    ids = random_ids(2, 120)
    expected = plain_tokens(tiny_llama(num_layers=1), ids)
    model = tiny_llama(num_layers=1)
    graphs = compiled(model, fullgraph=True)
    for num_pages in (None, 40, None):  # the pool that grows begins with 16 pages and ends with 32
        assert torch.equal(paged_tokens(model, ids, num_pages), expected)
    assert graphs.frame_count == 2, "one for the prompt, one for decoding"


@pytest.mark.parametrize("dynamic", [None, True])
def test_after_the_second_batch_size_nothing_is_compiled(dynamic):
    model, reference = tiny_llama(num_layers=1), tiny_llama(num_layers=1)
    graphs = compiled(model, "eager", fullgraph=True, dynamic=dynamic)
    for num_rows, num_columns in ((2, 20), (4, 25), (3, 33), (5, 18)):
        ids, mask = random_ids(num_rows, num_columns), left_padded(num_columns, [num_columns, 3, 17, 16, 9][:num_rows])
        expected = plain_tokens(reference, ids, attention_mask=mask)
        assert torch.equal(paged_tokens(model, ids, attention_mask=mask), expected)
        assert graphs.frame_count == (2 if num_rows == 2 or dynamic else 4)


def test_generate_compiles_decoding_by_itself():
    ids = random_ids(2, 20)
    expected = plain_tokens(tiny_llama(num_layers=1), ids)
    model, graphs = tiny_llama(num_layers=1), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True  # on CUDA it needs no asking
    assert torch.equal(paged_tokens(model, ids, compile_config=config, disable_compile=True), expected)
    assert not graphs
    for _ in range(2):
        assert torch.equal(paged_tokens(model, ids, compile_config=config), expected)
    assert len(graphs) == 1


def test_inductor_gives_the_same_and_keeps_pages_out_of_cuda_graphs():
    ids, outside = random_ids(2, 20), []
    expected = plain_tokens(tiny_llama(num_layers=1), ids)

    def note(nodes):
        for node in nodes:
            if getattr(node.node, "op_overload", None) is torch.ops.hf_paged.write_and_attend.default:
                outside.append(is_cudagraph_unsafe_op(node.node))
        return nodes

    model = tiny_llama(num_layers=1)
    graphs = compiled(model, "inductor", fullgraph=True)
    with torch._inductor.config.patch(_post_fusion_custom_pass=note, force_disable_caches=True):
        assert torch.equal(paged_tokens(model, ids), expected)
    assert graphs.frame_count == 2
    assert len(outside) >= 2
    assert all(outside)


def test_a_sliding_window():
    ids, mask = random_ids(3, 40), left_padded(40, [40, 11, 30])
    models = [tiny_model(MistralForCausalLM, MistralConfig, sliding_window=24) for _ in range(2)]
    graphs = compiled(models[0], fullgraph=True)
    expected = plain_tokens(models[1], ids, attention_mask=mask)
    assert torch.equal(paged_tokens(models[0], ids, attention_mask=mask), expected)
    assert graphs.frame_count == 2


def test_a_model_that_looks_at_its_mask_before_it_makes_one():
    models = [tiny_model(GPT2LMHeadModel, GPT2Config, num_attention_heads=3) for _ in range(2)]
    ids = random_ids(2, 20)
    graphs = compiled(models[0], fullgraph=True)
    assert torch.equal(paged_tokens(models[0], ids), plain_tokens(models[1], ids))
    assert graphs.frame_count == 2


def test_a_loop_of_one_s_own_is_one_graph_with_the_inputs_that_generate_prepares():
    model, ids, splits = tiny_llama(num_layers=1), random_ids(2, 40), [20] + [1] * 10 + [10]
    expected = plain(tiny_llama(num_layers=1), ids, splits)
    model.set_attn_implementation("paged_flex")
    graphs = compiled(model, "eager", fullgraph=True)
    cache, logits, start = PagedCache.from_model(model, page_size=16), [], 0
    with torch.no_grad():
        for size in splits:
            inputs = model.prepare_inputs_for_generation(
                ids[:, : start + size],
                next_sequence_length=size,
                past_key_values=cache,
                position_ids=torch.arange(start, start + size)[None],
            )
            logits.append(model(**inputs).logits)
            start += size
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, **FP32)
    assert graphs.frame_count == 3, "20 columns, 1, and any other number"


def test_without_them_only_the_making_of_the_mask_is_outside_of_graphs():
    model, ids, splits = tiny_llama(num_layers=1), random_ids(2, 26), [20] + [1] * 6
    expected = plain(tiny_llama(num_layers=1), ids, splits)
    model.set_attn_implementation("paged_flex")
    compiled(model, "eager")
    torch.testing.assert_close(run(model, PagedCache.from_model(model, page_size=16), ids, splits), expected, **FP32)
    breaks = "\n".join(counters["graph_break"])
    assert "_mask_sizes_between_graphs" in breaks
    assert "_reserved" in breaks
    assert len(counters["graph_break"]) == 2


def test_any_other_attention_writes_between_graphs():
    model, ids, mask = tiny_llama(num_layers=1), random_ids(2, 20), left_padded(20, [20, 9])
    expected = plain_tokens(tiny_llama(num_layers=1), ids, attention_mask=mask, max_new_tokens=6)
    compiled(model, "eager")
    cache = PagedCache.from_model(model, page_size=16)
    actual = generate(model, "sdpa", cache, ids, attention_mask=mask, max_new_tokens=6)
    assert torch.equal(actual, expected)
    assert any("Sequences.write" in reason for reason in counters["graph_break"])


def test_tokens_are_written_though_nobody_looks_at_the_output():
    model, ids = tiny_llama(), random_ids(2, 20)
    model.set_attn_implementation("paged_flex")
    cache = PagedCache.from_model(model, page_size=16)
    inputs = model.prepare_inputs_for_generation(
        ids, past_key_values=cache, position_ids=torch.arange(20)[None], next_sequence_length=20
    )

    @torch.compile(backend="aot_eager", fullgraph=True)
    def fill(**inputs):
        model(**inputs)

    with torch.no_grad():
        fill(**inputs)
    assert cache.lengths == [20, 20]


def test_keys_that_want_gradients_are_refused():
    model = tiny_llama(num_layers=1)
    model.set_attn_implementation("paged_flex")
    compiled(model)
    with pytest.raises(ValueError, match=r"can't be differentiated. Run the model under torch.no_grad\(\)"):
        model(random_ids(1, 5), past_key_values=PagedCache.from_model(model))


def test_layers_of_several_kinds_give_the_same_tokens():
    (family,) = (family for family in FAMILIES if family.name == "GPT-OSS")
    ids, mask = random_ids(3, 20), left_padded(20, [20, 9, 16])
    reference = family.load(family.oracle)
    cache = DynamicCache(config=reference.config)
    expected = generate(reference, family.oracle, cache, ids, attention_mask=mask)
    model = family.load("paged_flex")
    graphs = compiled(model, "eager", fullgraph=True)
    assert torch.equal(paged_tokens(model, ids, attention_mask=mask), expected)
    assert graphs.frame_count == 2
