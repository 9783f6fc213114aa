import pytest
import torch
from torch._dynamo.utils import counters

from hf_paged.compile import api


@pytest.fixture(scope="module", autouse=True)
def _quick_collection(quick_collection):
    """Garbage is collected with each graph that is compiled."""


@pytest.fixture
def graphs(monkeypatch):
    """Graphs of models that were compiled; only dynamo's part of it takes place."""
    torch._dynamo.reset()
    counters.clear()
    captured = []

    def compile_nothing(graph, *arguments):
        captured.append(graph)
        return graph

    monkeypatch.setattr(api, "compile_graph", compile_nothing)
    return captured
