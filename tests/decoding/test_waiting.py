"""A decoding step of `hf_paged.sample` reads nothing back from the device but which rows have ended.

On a CPU there is nothing to wait for, so what would wait on a GPU is recorded: every way to the value of a tensor.
"""

import functools
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessor

import hf_paged
from hf_paged import PagedCache, ReleaseFinished
from hf_paged.decoding import surplus
from hf_paged.decoding.transfer import Transfer
from tests.cache.test_generate_modes import MODELS, SAMPLING, generate, ids_for
from tests.models import left_padded

# `numpy()` of a tensor that is on a device raises, and so does not wait.
READING = ["cpu", "item", "tolist", "nonzero", "equal", "is_nonzero", "allclose", "argwhere"]
READING += ["__bool__", "__int__", "__float__", "__index__", "__contains__"]


class Recorder:
    """Counts what reads values, by the file in this package, or in Transformers, that asks for it."""

    def __init__(self, monkeypatch):
        self.places, self.is_on = Counter(), False
        for name in READING:
            monkeypatch.setattr(torch.Tensor, name, self.recording(getattr(torch.Tensor, name)))

    def recording(self, method):
        @functools.wraps(method)
        def read(tensor, *args, **kwargs):
            if self.is_on:
                files = [Path(frame.filename) for frame in traceback.extract_stack()[:-1]]
                asking = next(file for file in reversed(files) if "/torch/" not in file.as_posix())
                self.places[f"{method.__name__} in {asking.name}"] += 1
            return method(tensor, *args, **kwargs)

        return read


class Scalars(TorchDispatchMode):
    """Counts operators that give the host a value."""

    def __init__(self, recorder):
        super().__init__()
        self.recorder, self.found = recorder, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        if self.recorder.is_on and name in {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "item"}:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class InTheMiddle(LogitsProcessor):
    """Has steps recorded that are neither the first nor the last ones."""

    def __init__(self, recorder, num_columns):
        self.recorder, self.num_columns = recorder, num_columns

    def __call__(self, input_ids, scores):
        self.recorder.is_on = self.num_columns + 4 <= input_ids.shape[1] < self.num_columns + 8
        return scores


def record(family, is_compiled, monkeypatch, **arguments):
    """Generate, and return the tokens, who read values in four steps, and how many transfers were waited for."""
    monkeypatch.setattr(surplus, "runs_beside", lambda tensor: True)
    model, mask, waits = MODELS[family][0](), left_padded(21, [21, 9, 16]), []
    model.set_attn_implementation("paged_flex")
    monkeypatch.setattr(Transfer, "wait", lambda self, wait=Transfer.wait: waits.append(1) or wait(self))
    recorder = Recorder(monkeypatch)
    scalars = Scalars(recorder)
    with hf_paged.compiled(model) if is_compiled else scalars:  # torch compiles nothing under a mode
        kv_cache = PagedCache.from_model(model, page_size=16)
        settings = {
            "logits_processor": [InTheMiddle(recorder, 21)],
            "stopping_criteria": [ReleaseFinished(kv_cache, 199)],
            "repetition_penalty": 1.2,
            "eos_token_id": 199,
        }
        tokens = generate(model, kv_cache, ids_for(mask), mask, **settings, **arguments)
    assert tokens.shape[1] > 21 + 8
    return tokens, recorder.places + scalars.found, len(waits)


@pytest.mark.parametrize("sampling", [{}, SAMPLING], ids=["greedy", "sampling"])
@pytest.mark.parametrize(
    ("family", "is_compiled"), [("llama", False), ("mistral", False), ("gemma2", False), ("llama", True)]
)
def test_a_step_reads_nothing_but_which_rows_have_ended(family, is_compiled, sampling, monkeypatch):
    loop = {"custom_generate": hf_paged.sample}
    tokens, places, num_waits = record(family, is_compiled, monkeypatch, **loop, **sampling)
    # Which rows have ended, and which are to be released, come in one transfer.
    assert num_waits == tokens.shape[1] - 21
    assert places == {"tolist in ends.py": 4 * 2}


def test_what_generate_reads_by_itself_is_seen(monkeypatch):
    _, places, _ = record("llama", False, monkeypatch)
    assert places.keys() >= {"cpu in told.py", "__bool__ in utils.py", "nonzero in stopping.py"}
