"""Threads that enter and leave `compiled(model)`, and that generate while another one compiles."""

import threading

import pytest
import torch

from hf_paged.compile.api import compiled, compiled_filling
from hf_paged.compile.weights import gather_weights
from tests.models import plain, random_ids, tiny_llama
from tests.stress_threads import Stress

pytestmark = pytest.mark.usefixtures("graphs")


def is_compiled(model):
    config = model.generation_config.compile_config
    assert (config is None) == (compiled_filling(model.get_decoder()) is None)
    return config is not None


@pytest.mark.parametrize("order", ["aAbB", "abAB", "abBA", "abcACB", "aaAbAB"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_model_is_compiled_until_the_last_context_is_left(order, fails):
    model = tiny_llama()
    model.set_attn_implementation("paged_flex")
    open_contexts = {}
    for name in order:
        stack = open_contexts.setdefault(name.lower(), [])
        if name.islower():
            stack.append(compiled(model))
            stack[-1].__enter__()
        elif fails:
            assert not stack.pop().__exit__(KeyError, KeyError(), None), "the error goes on"
        else:
            stack.pop().__exit__(None, None, None)
        assert is_compiled(model) == any(open_contexts.values())


def test_a_compile_config_of_one_s_own_comes_back():
    model, own = tiny_llama(), object()
    model.generation_config.compile_config = own
    first, second = compiled(model), compiled(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert model.generation_config.compile_config is not own
    second.__exit__(None, None, None)
    assert model.generation_config.compile_config is own


def test_a_context_that_is_refused_changes_nothing():
    model = tiny_llama()
    with compiled(model):
        model.train()
        with pytest.raises(ValueError, match="A model in training mode"), compiled(model):
            pass
        model.eval()
        assert is_compiled(model)
    assert not is_compiled(model)


def test_two_models_may_have_one_generation_config():
    one, other = tiny_llama(), tiny_llama(num_layers=1)
    other.generation_config = one.generation_config
    first, second = compiled(one), compiled(other)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert one.generation_config.compile_config is not None
    assert compiled_filling(one.get_decoder()) is None
    second.__exit__(None, None, None)
    assert one.generation_config.compile_config is None


def test_threads_that_enter_at_once_leave_the_model_as_it_was(restless_threads):
    model = tiny_llama()
    barrier, failures = threading.Barrier(4), []

    def enter():
        try:
            for _ in range(20):
                barrier.wait(timeout=60)
                with compiled(model):
                    assert is_compiled(model)
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not is_compiled(model)


def test_threads_move_the_weights_once(restless_threads):
    model, ids = tiny_llama(), random_ids(1, 9)
    expected = plain(model, ids, [9])
    addresses = []

    def move():
        gather_weights(model)
        addresses.append([parameter.data_ptr() for parameter in model.parameters()])

    threads = [threading.Thread(target=move) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert addresses == [addresses[0]] * 4
    assert torch.equal(plain(model, ids, [9]), expected)


def test_threads_get_the_same_tokens_while_another_one_compiles():
    assert Stress(num_generations=40, backend="aot_eager", max_new_tokens=4).run() == {"same tokens": 40}
