"""Repeating what a kernel did gives what calling it again gives."""

import weakref

import pytest
import torch

from hf_paged._torch import inductor
from hf_paged._torch.graphs import compile_graph
from hf_paged._torch.wrapper_replay import capture
from hf_paged.attention.backends.base import AttentionParams
from hf_paged.attention.backends.split_kv.cpu import KVSplits, split_kv_attention


def splits(num_rows, num_places):
    rows = torch.arange(num_rows).repeat_interleave(num_places)
    kv_stop = torch.full((len(rows),), 16, dtype=torch.int32)
    kv_stop[-1] = 5
    by_row = torch.arange(len(rows)).view(num_rows, -1).t().contiguous()
    counts = torch.full((num_rows,), num_places)
    return KVSplits(16, torch.arange(len(rows)), rows, torch.zeros_like(kv_stop), kv_stop, by_row, counts)


def tensors(num_rows, num_heads, num_kv_heads, seed, has_sinks):
    random = torch.Generator().manual_seed(seed)
    shapes = (num_rows, num_heads, 1, 32), (1, num_kv_heads, 160, 32), (1, num_kv_heads, 160, 32), (num_heads,)
    *rest, sinks = (torch.randn(shape, generator=random) for shape in shapes)
    return *rest, sinks if has_sinks else None


@pytest.fixture
def recorded(monkeypatch):
    """What was made to be repeated."""
    made = []

    def keep(*arguments):
        output, replay = capture(*arguments)
        made.append(replay)
        return output, replay

    monkeypatch.setattr(inductor, "capture", keep)
    return made


@pytest.mark.parametrize(("num_rows", "has_sinks"), [(1, True), (3, False)])
def test_other_layers_get_what_they_would_get_alone(num_rows, has_sinks, recorded):
    layers = [tensors(num_rows, 6, 2, seed, has_sinks) for seed in range(3)]
    lists = splits(num_rows, 3)

    def made_for(layer):
        query, keys, values, sinks = layer
        return split_kv_attention(query, keys, values, lists, AttentionParams(0.2, has_sinks=sinks is not None))

    attend = made_for(layers[0])
    together = [attend(*layer) for layer in layers]
    assert [replay is not None for replay in recorded] == [True]
    for layer, output in zip(layers, together, strict=True):
        assert torch.equal(made_for(layer)(*layer), output)


def compiled_by_inductor(function, *inputs):
    """What inductor makes of a function: it takes a list of inputs, as what is replayed does."""
    made = []

    def keep(run):
        made.append(run)
        return run

    def backend(graph, inputs):
        return compile_graph(graph, inputs, {"size_asserts": False}, keep)

    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*inputs)
    (run,) = made
    return run


def test_a_result_stays_when_it_is_replayed():
    source, other = torch.arange(4.0), torch.arange(4.0) + 10
    (first,), replay = capture(compiled_by_inductor(lambda x: 2 * x, source), [source], [source])
    (second,) = replay.replay(other)
    (third,) = replay.replay(source)
    assert torch.equal(second, 2 * other)
    assert torch.equal(first, 2 * source)
    assert torch.equal(third, 2 * source)


@pytest.fixture(scope="module", autouse=True)
def changed_by():
    """An operation as it stands among the loops of a compiled step, and its name."""
    library = torch.library.Library("hf_paged", "FRAGMENT")
    library.define("changed_by(Tensor summand, Tensor tensor) -> Tensor")

    def compute(summand, tensor):
        return -tensor - summand

    library.impl("changed_by", compute, "CompositeExplicitAutograd")
    torch.library.register_fake("hf_paged::changed_by", lambda _, tensor: torch.empty_like(tensor), lib=library)
    yield {"changed_by": compute}
    library._destroy()


def both_views(x):
    y = 2 * x
    return y, y.view(2, 2)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: 2 * (x.view(2, 2) @ x.view(2, 2)),  # a product by MKL
        lambda x: torch.ops.hf_paged.changed_by(x[2:], x[2:]),  # parts of an input
        lambda x: (2 * x)[:2],  # part of a result
        lambda x: (2 * x, x.new_empty(3)),  # a result that nothing is written to
        both_views,  # one memory for two results
        lambda x: 2 * torch.ops.hf_paged.changed_by(x, 2 * x),  # written over what the operation returned
    ],
)
def test_what_may_be_more_than_loops_over_whole_tensors_is_not_replayed(function, changed_by):
    source = torch.arange(4.0)
    run = compiled_by_inductor(function, source)
    (result, *_), replay = capture(run, [source], [source], changed_by)
    assert replay is None
    assert torch.equal(result, run([source])[0])


def around_an_operation(x, summand):
    y = torch.ops.hf_paged.changed_by(summand, (2 * x).view(2, 2))
    return 2 * y.view(1, 4).expand(3, 4)


@pytest.fixture
def around():
    return compiled_by_inductor(around_an_operation, torch.arange(4.0), torch.ones(1))


@pytest.mark.parametrize("modes", [(True, False), (False, True)])
def test_named_operations_are_called_again(modes, around, changed_by):
    inputs = torch.arange(4.0), torch.ones(1)
    with torch.inference_mode(modes[0]):
        (first,), replay = capture(around, list(inputs), inputs, changed_by)
    with torch.inference_mode(modes[1]):
        (second,) = replay.replay(torch.arange(4.0) + 10, torch.full((1,), 5.0))
    assert torch.equal(first[2], 2 * (-2 * torch.arange(4.0) - 1))
    assert torch.equal(second[2], 2 * (-2 * (torch.arange(4.0) + 10) - 5))


def test_operations_that_are_not_named_are_not_replayed(around):
    inputs = torch.arange(4.0), torch.ones(1)
    (result,), replay = capture(around, list(inputs), inputs)
    assert torch.equal(result, around_an_operation(*inputs))
    assert replay is None


def test_what_was_given_is_not_held_after_a_release(around, changed_by):
    summand = torch.ones(1)
    (result,), replay = capture(around, [torch.arange(4.0), summand], [summand], changed_by)
    ends = weakref.ref(summand), weakref.ref(result)
    del summand, result
    assert [end() for end in ends] == [None, None]
    other = torch.ones(1)
    (result,) = replay.replay(other)
    ends = weakref.ref(other), weakref.ref(result)
    del other, result
    assert ends[0]() is not None
    replay.release()
    assert [end() for end in ends] == [None, None]


def test_a_function_that_is_no_method_is_only_called():
    source = torch.arange(4.0)
    (result,), replay = capture(lambda inputs: (inputs[0] + 1,), [source], [source])
    assert torch.equal(result, source + 1)
    assert replay is None
