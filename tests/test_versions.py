"""What differs between versions, and which of them were tested."""

import inspect
import subprocess
import sys
import tomllib
import warnings

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from transformers import GenerationMixin, LlamaForCausalLM

from hf_paged import PagedCache
from hf_paged._transformers import CACHE
from hf_paged._versions import TESTED, untested
from tests.models import random_ids, tiny_llama
from tests.test_docs import README, ROOT


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / name).read_text().splitlines()
    return {package: Version(version) for line in lines if "==" in line for package, version in [line.split("==")]}


@pytest.mark.parametrize("function", [LlamaForCausalLM.forward, GenerationMixin.prepare_inputs_for_generation])
def test_models_and_generate_take_a_cache_by_the_name_that_mask_functions_do(function):
    assert CACHE in inspect.signature(function).parameters


def test_the_package_calls_no_model_by_a_deprecated_name():
    model, ids = tiny_llama(), random_ids(2, 20)
    model.set_attn_implementation("paged_flex")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        cache = PagedCache.from_model(model, page_size=16)
        cache.prefill(model, ids)
        model.generate(ids, **{CACHE: cache}, max_new_tokens=2)


def test_a_cache_is_taken_by_the_name_of_every_supported_version():
    model, ids = tiny_llama(), random_ids(2, 20)
    model.set_attn_implementation("paged_flex")
    expected = model.generate(ids, **{CACHE: PagedCache.from_model(model)}, max_new_tokens=4, do_sample=False)
    cache = PagedCache.from_model(model)
    assert torch.equal(model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False), expected)
    assert cache.get_seq_length() == 23


@pytest.mark.parametrize("version", ["2.11.0", "2.15.0+cu132", "2.15.9", "2.9", "1.99.0"])
def test_nothing_is_said_of_a_version_that_is_no_newer_than_those_tested(version):
    assert untested("torch", version) is None


@pytest.mark.parametrize(
    ("name", "version"),
    [("torch", "2.16.0.dev20270101+cpu"), ("torch", "3.0.0a0+git1"), ("transformers", "5.25.0")],
)
def test_a_newer_version_is_named_with_those_tested(name, version):
    oldest, newest = TESTED[name]
    message = untested(name, version)
    assert message.startswith(f"{name} {version} is newer than what hf_paged was tested with, {oldest} to {newest}.")
    assert f"pip install '{name}=={newest}.*'" in message


def test_importing_the_package_with_newer_versions_says_so_once_for_each_and_works():
    code = (
        "import torch, transformers\n"
        "torch.__version__ = torch.torch_version.TorchVersion('2.99.0')\n"
        "import hf_paged, hf_paged.tools.evaluation, hf_paged._versions\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("torch 2.99.0 is newer than what hf_paged was tested with") == 1


def test_pins_bounds_and_readme_name_the_versions_that_were_tested():
    oldest, newest = pins("constraints-oldest.txt"), pins("constraints-newest.txt")
    for name, (first, last) in TESTED.items():
        assert oldest[name].release[:2] == Version(first).release
        assert newest[name].release[:2] == Version(last).release
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {requirement.name: requirement.specifier for requirement in map(Requirement, project["dependencies"])}
    for name, (first, _) in TESTED.items():
        assert f">={first}" in str(required[name])
        assert newest[name] in required[name]
    tested = {name: " to ".join(versions) for name, versions in TESTED.items()}
    assert f"Transformers {tested['transformers']} and torch {tested['torch']}" in README.read_text()
