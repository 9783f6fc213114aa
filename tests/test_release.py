"""What is released can be built, installed, and used without the repository."""

import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from hf_paged import __version__

ROOT = Path(__file__).parents[1]

GENERATES = """
import hf_paged, torch
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
ids = torch.arange(20)[None]
expected = model.generate(ids, do_sample=False, max_new_tokens=4)
with hf_paged.enable(model, compile=False):
    assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=4), expected)
    assert "hf_paged.sample" in hf_paged.explain(model)
print(hf_paged.__file__)
"""


def run(*command, **settings):
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True, **settings).stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """A folder with the wheel and the sdist."""
    pytest.importorskip("hatchling", reason="building takes hatchling")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "--directory", folder, cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(dist):
    (path,) = dist.glob("*.whl")
    return path


def test_the_wheel_works_by_itself(wheel, tmp_path):
    """In an environment that has what it depends on from this one, which has no hf_paged of its own."""
    venv.create(tmp_path / "venv")
    bin_, site_packages = tmp_path / "venv" / "bin", sysconfig.get_path("purelib")
    (new,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    run(sys.executable, "-m", "pip", "--python", bin_ / "python", "install", "--no-index", "--no-deps", wheel)
    (new / "dependencies.pth").write_text(site_packages)
    settings = {"cwd": tmp_path, "env": {"PATH": str(bin_), "HOME": str(tmp_path)}}
    assert run(bin_ / "hf-paged", "--version", **settings).split()[:2] == ["hf-paged", __version__]
    assert run(bin_ / "python", "-c", GENERATES, **settings).strip().startswith(str(new))


def test_the_wheel_has_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"hf_paged", f"hf_paged-{__version__}.dist-info"}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "hf_paged").rglob("*.py")}
    assert {"hf_paged/py.typed", *modules} <= set(names)


def test_the_sdist_has_what_builds_and_tests_it(dist):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    for needed in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "tests/test_release.py"):
        assert needed in names


def test_an_index_would_take_the_metadata(dist):
    pytest.importorskip("twine")
    assert "FAILED" not in run(sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir())


def test_the_metadata_names_version_licence_and_extras(wheel):
    name = f"hf_paged-{__version__}.dist-info/METADATA"
    metadata = message_from_bytes(zipfile.ZipFile(wheel).read(name))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) == set(project["optional-dependencies"])


def test_the_citation_and_the_changelog_have_the_version():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
