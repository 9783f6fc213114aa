import gc
import importlib.util
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton


def pytest_collection_finish():
    """Let nothing look for garbage in what was imported by now: torch and Transformers are most of what there is."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def restless_threads():
    """Let threads started meanwhile hand over in the middle of the package's functions, not only between them."""
    package = str(Path(importlib.util.find_spec("hf_paged").origin).parent)
    random_ = random.Random(0)

    def trace(frame, event, argument):
        if not frame.f_code.co_filename.startswith(package):
            return None
        if event == "line" and random_.random() < 0.25:
            time.sleep(0)  # lets go of the interpreter lock
        return trace

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threading.settrace(trace)
    yield
    threading.settrace(None)
    sys.setswitchinterval(interval)


@pytest.fixture(scope="module")
def quick_collection():
    """Let `gc.collect()` look at what the tests of a module make only, not at what was there before."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def few_layers(monkeypatch):
    """Let the packaged model have 3 of its 30 layers: what is done with it takes less time, and is the same."""
    from hf_paged import packaged
    from hf_paged.tools.lab import model as lab

    load = packaged.load_packaged_model

    def load_few_layers(*args, **kwargs):
        model, tokenizer = load(*args, **kwargs)
        del model.model.layers[3:]
        model.config.num_hidden_layers = 3
        return model, tokenizer

    for module in (packaged, lab):
        monkeypatch.setattr(module, "load_packaged_model", load_few_layers)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The folder of the documentation's pages."""
    pytest.importorskip("material", reason="building the site takes the extra docs")
    folder = tmp_path_factory.mktemp("site")
    build = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stderr
    assert "WARNING" not in build.stderr
    return folder
