"""torch's own switches: attention over pages is compiled all the same, or computed without, and says so."""

import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch._inductor import compile_fx
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from hf_paged import PagedCache
from hf_paged._torch import inductor
from hf_paged.compile import api
from hf_paged.compile.api import compiled
from tests._torch.private import stand_in
from tests.models import generate, left_padded, random_ids, tiny_llama


@pytest.fixture
def compilations(monkeypatch):
    """Kernels that were compiled, and graphs of models; inductor compiles none of them."""
    torch._dynamo.reset()
    seen = []

    def compile_nothing(graph, *arguments):
        seen.append(graph)
        return graph

    monkeypatch.setattr(api, "compile_graph", compile_nothing)
    monkeypatch.setattr(inductor, "_kernels", {})
    return seen


def ragged():
    return random_ids(3, 20), left_padded(20, [20, 3, 11])


def plain_tokens():
    ids, mask = ragged()
    return generate(tiny_llama(num_layers=1), "sdpa", DynamicCache(), ids, attention_mask=mask, max_new_tokens=4)


def paged_tokens(is_compiled=False, disable=False):
    ids, mask = ragged()
    model = tiny_llama(num_layers=1)
    model.set_attn_implementation("paged_flex")
    call = torch.compiler.disable(generate) if disable else generate
    with compiled(model) if is_compiled else nullcontext():
        cache = PagedCache.from_model(model, page_size=16)
        return call(model, "paged_flex", cache, ids, attention_mask=mask, max_new_tokens=4)


@pytest.mark.parametrize(
    "stance",
    ["force_eager", "eager_on_recompile", "fail_on_recompile", "eager_then_compile", "aot_eager_then_compile"],
)
def test_kernels_compile_in_any_stance(stance, compilations):
    with torch.compiler.set_stance(stance):
        before = torch._dynamo.eval_frame._stance
        assert torch.equal(paged_tokens(), plain_tokens())
        assert torch._dynamo.eval_frame._stance is before
    assert len(inductor._kernels) == 1


@pytest.mark.parametrize("stance", ["force_eager", "eager_then_compile"])
def test_a_stance_goes_for_the_steps_of_a_model(stance, compilations):
    with torch.compiler.set_stance(stance):
        assert torch.equal(paged_tokens(is_compiled=True), plain_tokens())
    assert bool(compilations) == (stance != "force_eager")


@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.compiler.set_stance("default", force_backend="eager"),
        lambda: torch._dynamo.config.patch(suppress_errors=True),
        lambda: FlopCounterMode(display=False),
        lambda: torch.device("cpu"),
        torch.inference_mode,
        lambda: torch.autocast("cpu", enabled=False),
    ],
)
def test_kernels_compile_in_any_mode(context, compilations):
    with context():
        assert torch.equal(paged_tokens(), plain_tokens())
    assert len(inductor._kernels) == 1


def test_kernels_compile_within_a_function_that_is_not_to_be_compiled(compilations):
    assert torch.equal(paged_tokens(disable=True), plain_tokens())
    assert len(inductor._kernels) == 1


def test_a_kernel_that_fails_is_an_error_though_errors_are_to_be_suppressed(compilations, monkeypatch):
    def fail(*arguments, **options):
        raise NotImplementedError("no compiler")

    monkeypatch.setattr(compile_fx, "compile_fx", fail)
    stand_in(monkeypatch, inductor.COMPILE_FX, fail)
    with (
        torch._dynamo.config.patch(suppress_errors=True),
        pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no compiler"),
    ):
        paged_tokens()


@pytest.mark.parametrize("is_compiled", [False, True])
def test_where_torch_compile_is_off_attention_is_right_and_a_message_tells(is_compiled, compilations, caplog):
    inductor._tell_once.cache_clear()
    with torch._dynamo.config.patch(disable=True):
        assert torch.equal(paged_tokens(is_compiled), plain_tokens())
    assert not inductor._kernels
    assert not compilations
    told = [record.message for record in caplog.records if "switches torch.compile off" in record.message]
    assert len(told) == 1 + is_compiled


SCRIPT = """
import torch
from tests._torch.test_switches import paged_tokens, plain_tokens, ragged
from hf_paged import PagedCache
from hf_paged._torch import inductor
from tests.models import generate, tiny_llama

for is_compiled in (False, True):
    assert torch.equal(paged_tokens(is_compiled), plain_tokens())
model = tiny_llama(num_layers=1)
model.set_attn_implementation("paged_flex")
cache = PagedCache.from_model(model, page_size=16)
ids, mask = ragged()
cache.prefill(model, ids, mask)
tokens = generate(model, "paged_flex", cache, ids, attention_mask=mask, max_new_tokens=4)
assert torch.equal(tokens, plain_tokens())
assert not inductor._kernels
"""


OFF, MISSING = "switches torch.compile off", "torch finds no C++ compiler"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("TORCHDYNAMO_DISABLE", "1", OFF),
        ("TORCH_COMPILE_DISABLE", "1", OFF),
        ("CXX", "/nowhere/g++", MISSING),
        ("PATH", "/nowhere", MISSING),
    ],
)
def test_the_environment_may_leave_nothing_to_compile_with(name, value, message):
    environment = {key: kept for key, kept in os.environ.items() if key != "CXX"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment | {name: value}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if message in line]
    assert len(told) == 2
    assert "so attention is handed a copy of what is cached in each layer" in told[0] + told[1]
    assert "so LlamaForCausalLM runs uncompiled within compiled()" in told[0] + told[1]
    assert "Traceback" not in done.stderr
