"""Models whose weights are shared out among two processes generate what they do in one."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from hf_paged import PagedCache, enable
from tests.models import left_padded, random_ids, tiny_llama

SETTINGS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 12}


def larger_llama() -> PreTrainedModel:
    return tiny_llama(num_heads=12, num_kv_heads=4)


def batch(seed: int = 0) -> dict[str, Tensor]:
    return {"input_ids": random_ids(3, 21, seed), "attention_mask": left_padded(21, [21, 9, 16])}


def expected(model: PreTrainedModel, inputs: dict[str, Tensor], **settings) -> Tensor:
    model.set_attn_implementation("sdpa")
    return model.generate(**inputs, past_key_values=DynamicCache(config=model.config), **SETTINGS, **settings)


def check_all(
    model: PreTrainedModel, wrapped: torch.nn.Module, plain: PreTrainedModel, inputs: dict[str, Tensor]
) -> PagedCache:
    """Generate by every way in what a whole model does; return the cache of the first."""
    model.set_attn_implementation("paged_flex")
    greedy, beams = expected(plain, inputs), expected(plain, inputs, num_beams=3)
    cache = PagedCache.from_model(wrapped, page_size=16)
    assert torch.equal(model.generate(**inputs, past_key_values=cache, **SETTINGS), greedy)
    other = PagedCache.from_model(wrapped, page_size=16)
    assert torch.equal(model.generate(**inputs, past_key_values=other, num_beams=3, **SETTINGS), beams)
    other = PagedCache.from_model(wrapped, page_size=16)
    other.prefill(wrapped, **inputs)
    assert torch.equal(model.generate(**inputs, past_key_values=other, **SETTINGS), greedy)
    with enable(wrapped):
        assert torch.equal(model.generate(**inputs, **SETTINGS), greedy)
    return cache


def tensor_parallel(folder: str) -> None:
    """Each process has half of the heads, as many as `tiny_llama()` has, and computes the same rows."""
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    cache = check_all(model, model, larger_llama(), batch())
    keys, values = cache.pool.storage(0).tensors
    assert keys.shape[1] == values.shape[1] == 2
    assert cache.stats().token_bytes == 2 * 2 * 2 * 16 * 4  # layers; keys and values of two heads


def sharded(folder: str) -> None:
    """Each process computes rows of its own; weights are gathered layer by layer."""
    inputs, mesh = batch(seed=torch.distributed.get_rank()), init_device_mesh("cpu", (2,))
    model = tiny_llama()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    check_all(model, model, tiny_llama(), inputs)


def wrapped(folder: str) -> None:
    """The same, in the wrappers that have the model within them."""
    inputs = batch(seed=torch.distributed.get_rank())
    replicated = torch.nn.parallel.DistributedDataParallel(tiny_llama().requires_grad_(True))
    check_all(replicated.module, replicated, tiny_llama(), inputs)
    flat = FullyShardedDataParallel(tiny_llama(), device_id=torch.device("cpu"))
    with FullyShardedDataParallel.summon_full_params(flat):
        check_all(flat.module, flat, tiny_llama(), inputs)


WAYS: tuple[Callable[[str], None], ...] = tensor_parallel, sharded, wrapped


def test_two_processes_give_the_tokens_of_one(tmp_path):
    larger_llama().save_pretrained(tmp_path)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([root, *sys.path])}
    command = [*launch, "-m", "tests.cache.test_several_processes", str(tmp_path)]
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for way in WAYS:
        assert run.stdout.count(f"{way.__name__}: same tokens") == 2


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    for way in WAYS:
        way(sys.argv[1])
        print(f"{way.__name__}: same tokens\n", end="", flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
