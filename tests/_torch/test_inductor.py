"""What is said while a kernel is compiled."""

import threading

import pytest

from hf_paged._torch import inductor
from tests.models import generate, paged_cache, random_ids, tiny_llama

COMPILING = "Compiling attention: about 15 s, once."


@pytest.fixture
def said(monkeypatch, caplog):
    monkeypatch.setattr(inductor, "_kernels", {})
    inductor._tell_once.cache_clear()
    yield lambda: [record.levelname for record in caplog.records if record.message.startswith(COMPILING)]
    inductor._tell_once.cache_clear()


def timers():
    return [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


def test_the_first_kernel_that_is_compiled_is_told_of_and_no_other(monkeypatch, said):
    monkeypatch.setattr(inductor, "_ON_DISK_S", 0)
    model = tiny_llama(num_layers=1)
    for page_size in (16, 32):
        generate(model, "paged_flex", paged_cache(model, page_size), random_ids(1, 5), max_new_tokens=3)
        assert said() == ["WARNING"]
    assert len(inductor._kernels) == 2


def test_a_kernel_that_is_found_on_disk_is_not_told_of(monkeypatch, said):
    monkeypatch.setattr(inductor, "_ON_DISK_S", 1000)
    with inductor._told_if_slow():
        (timer,) = timers()
    timer.join()
    assert said() == []


def test_a_compilation_that_fails_leaves_no_timer(monkeypatch, said):
    monkeypatch.setattr(inductor, "_ON_DISK_S", 1000)
    started = []

    @inductor._told_if_slow()
    def compile_nothing():
        started.extend(timers())
        raise RuntimeError("no compiler")

    with pytest.raises(RuntimeError, match="no compiler"):
        compile_nothing()
    (timer,) = started
    timer.join()
