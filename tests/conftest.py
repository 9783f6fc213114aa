import gc
import importlib.util
import os
import random
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton


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
    """Let `gc.collect()` look at what the tests make only, not at all of torch and Transformers."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
