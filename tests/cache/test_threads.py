"""A cache serves one thread at a time: two at once are told so, and it may be handed on between two passes."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, TextIteratorStreamer

from hf_paged import PagedCache, sample
from tests.models import generate, letter_tokenizer, random_ids, tiny_llama

IDS = random_ids(2, 20)
NUM_NEW = 6
BUSY = "Another thread is in a pass over this cache, or generates with it"


def llama(attention):
    model = tiny_llama()
    model.set_attn_implementation(attention)
    return model


def continued(model, cache, ids=IDS, **arguments):
    return generate(model, model.config._attn_implementation, cache, ids, max_new_tokens=NUM_NEW, **arguments)


@pytest.fixture(scope="module")
def expected():
    """What the model goes on with, after the prompt and after that."""
    model = tiny_llama()
    first = generate(model, "sdpa", DynamicCache(), IDS, max_new_tokens=NUM_NEW)
    return first, generate(model, "sdpa", DynamicCache(), first, max_new_tokens=NUM_NEW)


class Pause:
    """Holds up the thread that made it, once, at its third step."""

    def __init__(self):
        self.is_reached, self.is_over = threading.Event(), threading.Event()
        self._num_steps, self._thread = 0, None

    def __call__(self, *arguments):
        self._thread = self._thread or threading.get_ident()
        if threading.get_ident() != self._thread:
            return
        self._num_steps += 1
        if self._num_steps == 3:
            self.is_reached.set()
            assert self.is_over.wait(60)


def outcome(call):
    try:
        return call()
    except ValueError as error:
        return str(error)


def beside(pause, first, second):
    """Run `second` while `first` pauses, and return what becomes of both."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(outcome, first)
        assert pause.is_reached.wait(60)
        result = outcome(second)
        pause.is_over.set()
        return future.result(60), result


@pytest.mark.parametrize("attention", ["paged_flex", "sdpa"])
@pytest.mark.parametrize("layer", [0, 1])
def test_of_two_threads_in_one_pass_one_is_refused_and_the_other_goes_on(attention, layer, expected):
    model, pause = llama(attention), Pause()
    cache = PagedCache.from_model(model, page_size=16)
    model.model.layers[layer].register_forward_pre_hook(pause)
    longer = torch.cat([expected[0][:, :22], IDS[:, :1]], dim=1)  # goes on from what is cached by then
    alone = continued(llama("sdpa"), DynamicCache(), longer)
    first, second = beside(pause, lambda: continued(model, cache), lambda: continued(model, cache, longer))
    refused = [isinstance(result, str) for result in (first, second)]
    if attention == "paged_flex" or layer == 1:
        assert refused == [False, True]
        assert BUSY in second
        assert torch.equal(first, expected[0])
    else:  # what sdpa has done so far is not known: the first one to write goes on
        assert refused == [True, False]
        assert BUSY in first
        assert torch.equal(second, alone)
    cache.reset()
    assert torch.equal(continued(model, cache), expected[0])
    cache.pool.check_integrity()


class Pausing(LogitsProcessor):
    def __init__(self, pause):
        self.pause = pause

    def __call__(self, input_ids, scores):
        self.pause()
        return scores


@pytest.mark.parametrize("attention", ["paged_flex", "sdpa"])
@pytest.mark.parametrize("loop", [None, sample])
def test_a_thread_whose_cache_another_one_goes_on_with_is_refused(attention, loop, expected):
    model, pause = llama(attention), Pause()
    cache = PagedCache.from_model(model, page_size=16)
    longer = torch.cat([expected[0][:, :22], IDS[:, :2]], dim=1)
    alone = continued(llama("sdpa"), DynamicCache(), longer)
    first, second = beside(
        pause,
        lambda: continued(model, cache, logits_processor=[Pausing(pause)], custom_generate=loop),
        lambda: continued(model, cache, longer),
    )
    assert BUSY in first
    assert torch.equal(second, alone)


def test_a_call_that_is_refused_for_its_prompt_disturbs_nobody(expected):
    model, pause = llama("paged_flex"), Pause()
    cache = PagedCache.from_model(model, page_size=16)
    first, second = beside(
        pause,
        lambda: continued(model, cache, logits_processor=[Pausing(pause)]),
        lambda: continued(model, cache, random_ids(2, 40, seed=5)),
    )
    assert torch.equal(first, expected[0])
    assert "The cache holds another prompt" in second


@pytest.mark.parametrize("attention", ["paged_flex", "sdpa"])
def test_a_cache_is_handed_from_thread_to_thread(attention, expected):
    model = llama(attention)
    cache = PagedCache.from_model(model, page_size=16)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        first = one.submit(continued, model, cache).result()
        second = other.submit(continued, model, cache, first).result()
        cache.crop(first.shape[1] - 1 - cache.get_seq_length())
        again = one.submit(continued, model, cache, first).result()
    assert torch.equal(first, expected[0])
    assert torch.equal(second, expected[1])
    assert torch.equal(again, expected[1])
    with torch.no_grad():  # and here, without generate()
        assert model(again[:, -1:], past_key_values=cache).logits.shape[:2] == (2, 1)


@pytest.mark.parametrize("attention", ["paged_flex", "sdpa"])
def test_a_pass_that_failed_before_its_first_layer_is_in_nobodys_way(attention, expected):
    model = llama(attention)
    cache = PagedCache.from_model(model, page_size=16)

    def fail(*arguments):
        raise RuntimeError("no memory")

    hook = model.model.layers[0].register_forward_pre_hook(fail)
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(RuntimeError, match="no memory"):
            pool.submit(continued, model, cache).result()
        hook.remove()
        assert torch.equal(continued(model, cache), expected[0])


def test_a_streamer_reads_what_another_thread_generates():
    model, tokenizer = llama("paged_flex"), letter_tokenizer()
    inputs = tokenizer("abc", return_tensors="pt")["input_ids"]
    cache = PagedCache.from_model(model, page_size=16)
    for _ in range(2):
        streamer = TextIteratorStreamer(tokenizer, timeout=60)
        thread = threading.Thread(target=continued, args=(model, cache, inputs), kwargs={"streamer": streamer})
        thread.start()
        assert list(streamer)
        thread.join()
        inputs = torch.cat([inputs, random_ids(1, NUM_NEW)], dim=1)
        cache.crop(3 - cache.get_seq_length())


@pytest.mark.usefixtures("restless_threads")
@pytest.mark.parametrize("attention", ["paged_flex", "sdpa"])
def test_threads_that_race_for_a_cache_get_the_right_tokens_or_an_error(attention, expected):
    model = llama(attention)
    continued(model, PagedCache.from_model(model, page_size=16))  # compiled before threads are slowed down
    for _ in range(6):
        cache = PagedCache.from_model(model, page_size=16)
        with ThreadPoolExecutor(3) as pool:
            calls = [pool.submit(outcome, lambda cache=cache: continued(model, cache)) for _ in range(12)]
        results = [call.result() for call in calls]
        assert all(isinstance(result, str) or torch.equal(result, expected[0]) for result in results)
        cache.reset()
        assert torch.equal(continued(model, cache), expected[0])
        cache.pool.check_integrity()


def test_a_pass_does_not_come_behind_tokens_of_another_thread_that_it_was_not_announced_behind(expected):
    model = llama("sdpa")
    cache = PagedCache.from_model(model, page_size=16)
    is_announced, is_over = threading.Event(), threading.Event()

    def wait(*arguments):
        if threading.current_thread() is not threading.main_thread():
            is_announced.set()
            assert is_over.wait(60)

    hook = model.model.layers[0].register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        held_up = pool.submit(outcome, lambda: continued(model, cache))
        assert is_announced.wait(60)
        assert torch.equal(continued(model, cache), expected[0])
        is_over.set()
        assert BUSY in held_up.result()
    hook.remove()
    assert cache.lengths == [IDS.shape[1] + NUM_NEW - 1] * 2
