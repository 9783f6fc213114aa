"""What torch doesn't promise may go: tokens stay right, and a message says what is done instead."""

import subprocess
import sys

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import compile_fx
from transformers import DynamicCache

from hf_paged import PagedCache, support
from hf_paged._torch import dynamo, inductor, opaque, private, tricks
from hf_paged.compile.api import compiled
from tests._torch.private import Changed, forget, forget_caches, lose
from tests.models import generate, left_padded, random_ids, tiny_llama

AT_IMPORT = [name for name in private.NAMES if name in (opaque._BASE, opaque._REGISTER)]
LATER = [name for name in private.NAMES if name not in AT_IMPORT]
OF_KERNELS = [name for name in LATER if name in (*vars(inductor).values(), *vars(dynamo).values())]
OF_PROMPTS = ("maybe_mark_dynamic", "_linear_pointwise.default")
CALLED = ("compile_fx", "compile_fx_inner", "mark_dynamic", "maybe_mark_dynamic", "register_lowering")


@pytest.fixture
def new_torch(monkeypatch):
    """No model was compiled, and nothing found out about torch; so it is again afterwards."""
    torch.compiler.reset()
    forget(monkeypatch)
    yield monkeypatch
    forget_caches()
    torch.compiler.reset()


@pytest.fixture
def no_kernels(monkeypatch):
    monkeypatch.setattr(inductor, "_kernels", {})


def lose_at_work(new_torch, name, **changes):
    """Let a name be gone, and what it was used for be done anew."""
    lose(new_torch, [name], **changes)
    if name in OF_KERNELS:
        new_torch.setattr(inductor, "_kernels", {})


def check_tokens(is_prompt=False):
    """Compare the tokens of one row, or of three whose prompts are packed, with those of DynamicCache."""
    lengths = [150, 17, 70] if is_prompt else [30]
    model, ids = tiny_llama(num_layers=1), random_ids(len(lengths), max(lengths))
    mask = left_padded(max(lengths), lengths)
    expected = generate(model, "sdpa", DynamicCache(), ids, attention_mask=mask, max_new_tokens=5)
    model.set_attn_implementation("paged_flex")
    with compiled(model):
        cache = PagedCache.from_model(model, page_size=16)
        if is_prompt:
            cache.prefill(model, ids, mask)
        tokens = generate(model, "paged_flex", cache, ids, attention_mask=mask, max_new_tokens=5)
    assert torch.equal(tokens, expected)


def check_torch_compile():
    """Compare the tokens of three rows under plain `torch.compile`, whose graphs part, with those of DynamicCache."""
    model, ids = tiny_llama(num_layers=1), random_ids(3, 20)
    expected = generate(model, "sdpa", DynamicCache(), ids, max_new_tokens=5)
    model.set_attn_implementation("paged_flex")
    model.forward = torch.compile(model.forward, backend="eager")
    tokens = generate(model, "paged_flex", PagedCache.from_model(model, page_size=16), ids, max_new_tokens=5)
    assert torch.equal(tokens, expected)


def messages(caplog):
    own = [record.message for record in caplog.records if record.name.startswith("hf_paged._torch")]
    return [message for message in own if not message.startswith("Compiling attention")]


@pytest.mark.parametrize("name", LATER, ids=repr)
def test_a_name_that_is_gone_costs_no_token_and_is_told_of_once(name, new_torch, caplog):
    lose_at_work(new_torch, name)
    check_tokens(is_prompt=repr(name).endswith(OF_PROMPTS))
    told = messages(caplog)
    assert told
    assert all(f"has no {name} as it was (AttributeError: gone)" in message for message in told)
    assert len(told) == len(set(told))


@pytest.mark.parametrize("name", LATER, ids=repr)
def test_a_name_for_something_else_is_noticed_when_it_is_looked_up_or_called(name, new_torch):
    lose(new_torch, [name], changed=True)
    if repr(name).endswith(CALLED):
        assert isinstance(name.value, Changed)
    else:
        with pytest.raises(private.MissingNameError, match="no longer what it was"):
            _ = name.value


@pytest.mark.parametrize("name", [name for name in LATER if repr(name).endswith(CALLED)], ids=repr)
def test_what_fails_when_it_is_called_costs_no_token(name, new_torch, caplog):
    lose_at_work(new_torch, name, changed=True)
    check_tokens(is_prompt=repr(name).endswith(OF_PROMPTS))
    told = messages(caplog)
    assert told
    assert all("no longer what it was" in message for message in told)


def test_without_inductor_s_entry_graphs_are_compiled_by_torch_compile(new_torch, no_kernels):
    counters.clear()
    lose(new_torch, [inductor.COMPILE_FX])
    check_tokens()
    assert counters["stats"]["unique_graphs"] == 4, (
        "the model as captured, and again; the kernel in inference mode and out"
    )
    assert counters["aot_autograd"]["ok"] == 3


def test_a_kernel_with_guards_is_compiled_a_few_times_for_all_lengths(new_torch, no_kernels):
    lose(new_torch, [name for name in LATER if repr(name).endswith(("compile_fx", "mark_dynamic"))])
    new_torch.setattr(compile_fx, "compile_fx", lambda graph, inputs, **options: graph)  # dynamo's part counts
    model, ids = tiny_llama(num_layers=1), random_ids(2, 40)
    expected = generate(model, "sdpa", DynamicCache(), ids, max_new_tokens=150)
    model.set_attn_implementation("paged_flex")
    counters.clear()
    cache = PagedCache.from_model(model, page_size=16)
    assert torch.equal(generate(model, "paged_flex", cache, ids, max_new_tokens=150), expected)
    assert counters["stats"]["unique_graphs"] <= 8


IMPORT = """
import sys
from importlib.machinery import PathFinder
from types import SimpleNamespace

def gone(name):
    raise AttributeError("gone")

class Loader:
    def __init__(self, loader):
        self.loader = loader
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        self.loader.exec_module(module)
        found = module.find
        module.find = lambda name: gone(name) if {lost!r} in repr(name) else found(name)

class Finder:
    def find_spec(name, path=None, target=None):
        if name != "hf_paged._torch.private":
            return None
        spec = PathFinder.find_spec(name, path)
        spec.loader = Loader(spec.loader)
        return spec

sys.meta_path.insert(0, Finder)
from tests._torch.test_private_names import check_tokens, check_torch_compile
check_tokens()
check_tokens(is_prompt=True)
check_torch_compile()
"""


@pytest.mark.parametrize("lost", ["OpaqueBase", "register_opaque_type", "torch"])
def test_so_it_is_with_names_that_are_gone_when_the_package_is_imported_and_with_all(lost):
    done = subprocess.run([sys.executable, "-c", IMPORT.format(lost=lost)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("goes on without opaque_inputs") == 1
    assert "compiled() runs models uncompiled" in done.stderr


def test_support_says_what_fell_back_and_why(new_torch):
    assert "fell back" not in support()
    lose(new_torch, [inductor.COMPILE_FX])
    lines = {line.split()[0]: line for line in support().splitlines()[2:]}
    assert "fell back: torch" in lines["unguarded_kernels"]
    assert "compile_fx as it was (AttributeError: gone); they are called through" in lines["unguarded_kernels"]
    assert lines["missing:"] == "missing: torch._inductor.compile_fx.compile_fx"
    assert " on " in lines["wrapper_replay"]


def test_tricks_are_switched_off_by_name(new_torch, no_kernels):
    new_torch.setenv(tricks.SWITCH, "unguarded_kernels, wrapper_replay,")
    tricks.check_switches()
    check_tokens()
    assert all(isinstance(kernel, inductor.GuardedKernel) for kernel in inductor._kernels.values())
    assert support().count("off (HF_PAGED_DISABLE)") == 2


@pytest.mark.parametrize("name", ["huge_page", "refuse_tracing"])
def test_a_name_that_can_t_be_switched_off_is_an_error_that_lists_those_that_can(name, monkeypatch):
    monkeypatch.setenv(tricks.SWITCH, f"huge_pages,{name}")
    with pytest.raises(ValueError, match=rf"HF_PAGED_DISABLE names {name}, but .*, huge_pages, .*step_replay"):
        tricks.check_switches()


MODULES = """
import sys
import torch, transformers
from transformers import AttentionInterface, AttentionMaskInterface, Cache, GenerationMixin, PreTrainedModel
before = set(sys.modules)
import hf_paged
private = ("torch._dynamo", "torch._inductor")
print([name for name in set(sys.modules) - before if name.startswith(private)])
"""


def test_importing_the_package_imports_no_compiler():
    done = subprocess.run([sys.executable, "-c", MODULES], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
