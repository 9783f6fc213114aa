import pytest

from hf_paged.tools.bench import bandwidth
from hf_paged.tools.bench.scenarios import attention


@pytest.fixture(autouse=True)
def little_memory(monkeypatch):
    """Read 1 MiB where a bench reads 256 again and again: no figure is looked at, and it would be most of the time."""
    monkeypatch.setattr(bandwidth, "_BYTES_ON_CPU", 2**20)
    monkeypatch.setattr(attention, "_CACHED_BYTES", 2**20)
