"""Only `_torch` knows names of torch that are not public."""

import ast
from pathlib import Path

import pytest

import hf_paged

ROOT = Path(hf_paged.__file__).parent
PUBLIC = {"__version__", "_version"}  # public, though it looks private; how often a tensor was written to


def private_names(code):
    """Dotted names from `torch` on, imported or looked up, with a part that begins with `_`."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.Import(names):
                found |= {alias.name for alias in names}
            case ast.ImportFrom(module, names, 0):
                found |= {f"{module}.{alias.name}" for alias in names}
            case ast.Attribute():
                found.add(ast.unparse(node))
    return {
        name
        for name in found
        if name.startswith("torch.")
        and name.replace(".", "").isidentifier()
        and any(part.startswith("_") and part not in PUBLIC for part in name.split("."))
    }


def test_no_other_file_names_what_is_private_in_torch():
    files = [path for path in ROOT.rglob("*.py") if path.parent != ROOT / "_torch"]
    assert len(files) > 50
    found = {str(path.relative_to(ROOT)): names for path in files if (names := private_names(path.read_text()))}
    assert not found


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("import torch._dynamo.config", {"torch._dynamo.config"}),
        ("from torch._C import _functorch", {"torch._C._functorch"}),
        ("from torch import _dynamo", {"torch._dynamo"}),
        ("from torch.utils import _pytree, data", {"torch.utils._pytree"}),
        ("import torch\ntorch._inductor.config.size_asserts", {"torch._inductor", "torch._inductor.config"}),
        ("import torch\ntorch.__version__ + torch.compile(f)._fn", set()),
    ],
)
def test_private_names_are_found(code, names):
    assert names <= private_names(code)
    assert bool(names) == bool(private_names(code))
