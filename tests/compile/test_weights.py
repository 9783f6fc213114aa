"""Weights are moved into memory that is read faster; nothing else about the model changes."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hf_paged import PagedCache, compiled
from hf_paged.compile.weights import gather_weights
from tests.models import plain, random_ids, tiny_llama


def addresses(model):
    return {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}


def test_a_model_computes_the_same_with_the_same_parameters():
    model, ids = tiny_llama(), random_ids(2, 20)
    expected = plain(model, ids, [20])
    values = copy.deepcopy(model.state_dict())
    tensors = [*model.parameters(), *model.buffers()]
    before = addresses(model)
    gather_weights(model)
    after = addresses(model)
    assert all(after[name] != before[name] for name in before)
    assert all(address % 64 == 0 for address in after.values())
    assert all(new is old for new, old in zip([*model.parameters(), *model.buffers()], tensors, strict=True))
    assert all(torch.equal(values[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(plain(model, ids, [20]), expected)


def test_what_was_moved_stays_and_what_was_replaced_is_moved_again():
    model = tiny_llama()
    gather_weights(model)
    before = addresses(model)
    gather_weights(model)
    assert addresses(model) == before
    replaced = model.model.layers[0].mlp.up_proj.weight
    replaced.data = replaced.data + 1
    values = replaced.data.clone()
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(model.model.layers[1].mlp.up_proj.weight + 1)
    elsewhere = addresses(model)
    gather_weights(model)
    moved = {name for name, address in addresses(model).items() if address != elsewhere[name]}
    assert moved == {f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)}
    assert torch.equal(replaced, values)


def test_compiled_leaves_weights_where_they_are_and_what_was_moved_remains_trainable():
    model = tiny_llama()
    model.set_attn_implementation("paged_flex")
    ids, before = random_ids(1, 12), addresses(model)
    with compiled(model):
        assert addresses(model) == before
        gather_weights(model)
        within = addresses(model)
        tokens = model.generate(
            ids, past_key_values=PagedCache.from_model(model, page_size=16), max_new_tokens=4, do_sample=False
        )
    assert all(within[name] != before[name] for name in before)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    model.set_attn_implementation("sdpa")
    model(input_ids=tokens, labels=tokens).loss.backward()
    weight = model.model.layers[0].mlp.up_proj.weight
    values = weight.detach().clone()
    optimizer.step()
    assert not torch.equal(weight, values)
    model.set_attn_implementation("paged_flex")
    with compiled(model):
        assert addresses(model) == within
        cache = PagedCache.from_model(model, page_size=16)
        trained = model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
    model.set_attn_implementation("sdpa")
    assert torch.equal(trained, model.generate(ids, max_new_tokens=4, do_sample=False))


def test_tensors_that_share_memory_go_on_sharing_it():
    module, memory = nn.Module(), torch.arange(60.0)
    module.whole = nn.Parameter(memory.view(6, 10))
    module.middle = nn.Parameter(memory[10:30].view(2, 10))
    module.columns = nn.Parameter(memory[20:44].view(4, 6).T)
    module.apart = nn.Parameter(memory[50:60:3])  # the whole has it, too
    module.register_buffer("repeated", memory[5:6].expand(4))
    module.tied = module.whole
    expected = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    strides = {name: tensor.stride() for name, tensor in module.state_dict().items()}
    gather_weights(module)
    state = module.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert {name: tensor.stride() for name, tensor in state.items()} == strides
    assert module.tied is module.whole
    with torch.no_grad():
        module.whole.copy_(-expected["whole"])
    assert all(torch.equal(state[name], -expected[name]) for name in expected)
    assert torch.equal(memory, torch.arange(60.0)), "the memory where they were is left as it was"


def test_views_of_memory_that_was_moved_stay_with_it():
    module = nn.Module()
    module.whole = nn.Parameter(torch.arange(64.0))
    gather_weights(module)
    module.part = nn.Parameter(module.whole.data[:32])
    before = module.whole.data_ptr()
    gather_weights(module)
    assert module.part.data_ptr() == module.whole.data_ptr() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool])
def test_any_dtype_is_moved(dtype):
    module = nn.Module()
    module.register_buffer("values", torch.arange(-5, 30).to(dtype))
    expected, before = module.values.clone(), module.values.data_ptr()
    gather_weights(module)
    assert torch.equal(module.values, expected)
    assert module.values.data_ptr() != before


def test_what_is_not_torch_s_own_memory_stays_where_it_is():
    class Other(torch.Tensor):
        pass

    module = nn.Module()
    module.other = nn.Parameter(torch.ones(8).as_subclass(Other))
    module.seen = nn.Parameter(torch.ones(8).share_memory_())
    module.register_buffer("sparse", torch.eye(3).to_sparse())
    module.register_buffer("elsewhere", torch.ones(8, device="meta"))
    module.register_buffer("empty", torch.ones(0))
    before = [module.other.data_ptr(), module.seen.data_ptr(), module.sparse, module.elsewhere, module.empty]
    gather_weights(module)
    after = [module.other.data_ptr(), module.seen.data_ptr(), module.sparse, module.elsewhere, module.empty]
    assert all(new is old or new == old for new, old in zip(after, before, strict=True))
    assert module.seen.is_shared()
    gather_weights(nn.Module())


@pytest.mark.parametrize("is_made_within", [False, True])
def test_within_inference_mode(is_made_within):
    with torch.inference_mode(is_made_within):
        model = tiny_llama()
    ids = random_ids(1, 8)
    expected = plain(tiny_llama(), ids, [8])
    with torch.inference_mode():
        gather_weights(model)
        assert torch.equal(plain(model, ids, [8]), expected)
    if not is_made_within:
        assert torch.equal(plain(model, ids, [8]), expected)


def test_a_moved_model_is_copied_and_saved_like_any_other(tmp_path):
    model, ids = tiny_llama(), random_ids(1, 8)
    gather_weights(model)
    expected = plain(model, ids, [8])
    assert torch.equal(plain(copy.deepcopy(model), ids, [8]), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(plain(AutoModelForCausalLM.from_pretrained(tmp_path), ids, [8]), expected)
    weight = model.model.layers[0].mlp.up_proj.weight
    torch.save(weight, tmp_path / "weight.pt")
    assert (tmp_path / "weight.pt").stat().st_size < 2 * weight.nbytes + 2048, "alone, without what lies beside it"


MEMORY = """
import gc
import re
from pathlib import Path

import torch

from hf_paged.packaged import load_packaged_model
from hf_paged.compile.weights import gather_weights


def resident():
    gc.collect()
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024


model, _ = load_packaged_model()
with torch.no_grad():
    model(torch.zeros((1, 1), dtype=torch.long))
before = resident()
gather_weights(model)
print("more MiB:", resident() - before)
del model
print("less MiB:", before - resident())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell what is resident")
def test_the_weights_of_a_real_model_are_in_memory_once_and_gone_with_it():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    more, less = (float(number) for number in re.findall(r" MiB: (-?[\d.]+)", done.stdout))
    assert more < 16
    assert less > 480
