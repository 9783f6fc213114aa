"""Repeating what a kernel did gives what calling it again gives."""

import weakref

import pytest
import torch

from hf_paged._torch import inductor
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


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(6, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_other_layers_get_what_they_would_get_alone(num_rows, num_heads, num_kv_heads, has_sinks, recorded):
    layers = [tensors(num_rows, num_heads, num_kv_heads, seed, has_sinks) for seed in range(3)]
    lists = splits(num_rows, 3)

    def made_for(layer):
        query, keys, values, sinks = layer
        return split_kv_attention(query, keys, values, lists, AttentionParams(0.2, has_sinks=sinks is not None))

    attend = made_for(layers[0])
    together = [attend(*layer) for layer in layers]
    assert [replay is not None for replay in recorded] == [True]
    for layer, output in zip(layers, together, strict=True):
        assert torch.equal(made_for(layer)(*layer), output)


def empty_strided_cpu(size, strides, dtype):
    return torch.empty_strided(size, strides, dtype=dtype)


def reinterpret_tensor(tensor, size, strides, offset):
    return torch.as_strided(tensor, size, strides, offset)


def cpp_fused_double(source, target, count):
    target.view(-1).numpy()[:count] = 2 * source.view(-1).numpy()[:count]  # as C++ does: by the address


def part_of_nothing(tensor):
    return tensor


class Loops:
    def call(self, arguments):
        (source,) = arguments
        arguments.clear()
        size = source.size()[0]
        target = empty_strided_cpu((size,), (1,), torch.float32)
        cpp_fused_double(source, target, size)
        return (target,)


class MoreThanLoops:
    def call(self, arguments):
        (source,) = arguments
        target = empty_strided_cpu((4,), (1,), torch.float32)
        cpp_fused_double(part_of_nothing(source), target, 4)
        return (target,)


class PartOfAnInput:
    def call(self, arguments):
        (source,) = arguments
        target = empty_strided_cpu((2,), (1,), torch.float32)
        cpp_fused_double(reinterpret_tensor(source, (2,), (1,), 2), target, 2)
        return (target,)


class PartOfTheResult:
    def call(self, arguments):
        (source,) = arguments
        target = empty_strided_cpu((4,), (1,), torch.float32)
        cpp_fused_double(source, target, 4)
        return (reinterpret_tensor(target, (2,), (1,), 0),)


class NothingOfTheResult:
    def call(self, arguments):
        (source,) = arguments
        target = empty_strided_cpu((4,), (1,), torch.float32)
        cpp_fused_double(source, target, 4)
        return (empty_strided_cpu((0,), (1,), torch.float32),)


class AnotherOperation:
    def call(self, arguments):
        (source,) = arguments
        target = empty_strided_cpu((4,), (1,), torch.float32)
        cpp_fused_double(source, target, 4)
        return (torch.ops.hf_paged.products_of_rows.default(target[:, None], target[:, None]),)


class WithOperation:
    def call(self, arguments):
        what, source = arguments
        arguments.clear()
        doubled = empty_strided_cpu((4,), (1,), torch.float32)
        cpp_fused_double(source, doubled, 4)
        changed = torch.ops.hf_paged.changed_by.default(what, reinterpret_tensor(doubled, (2, 2), (2, 1), 0), True)
        view = reinterpret_tensor(changed, (4,), (1,), 0)
        target = empty_strided_cpu((4,), (1,), torch.float32)
        cpp_fused_double(view, target, 4)
        cpp_fused_double(target, view, 4)  # as inductor uses a buffer again
        return (target,)


def test_a_result_stays_when_it_is_repeated():
    source, other = torch.arange(4.0), torch.arange(4.0) + 10
    (first,), replay = capture(Loops().call, [source], [source])
    (second,) = replay.replay(other)
    (third,) = replay.replay(source)
    assert torch.equal(second, 2 * other)
    assert torch.equal(first, 2 * source)
    assert torch.equal(third, 2 * source)


@pytest.mark.parametrize("runner", [MoreThanLoops, PartOfAnInput, PartOfTheResult, NothingOfTheResult])
def test_what_may_be_more_than_loops_over_whole_tensors_is_not_repeated(runner):
    source = torch.arange(4.0)
    (result,), replay = capture(runner().call, [source], [source])
    assert replay is None
    assert torch.equal(result, runner().call([source])[0])


class Summand:
    def __init__(self, value):
        self.value = value


def changed_by(summand, tensor, is_negative):
    return -tensor - summand.value if is_negative else tensor


@pytest.mark.parametrize("modes", [(True, False), (False, True)])
def test_named_operations_are_called_again(modes):
    operations = {"changed_by": changed_by}
    inputs = Summand(1.0), torch.arange(4.0)
    with torch.inference_mode(modes[0]):
        (first,), replay = capture(WithOperation().call, list(inputs), inputs, operations)
    with torch.inference_mode(modes[1]):
        (second,) = replay.replay(Summand(5.0), torch.arange(4.0) + 10)
    assert torch.equal(first, 2 * (-2 * torch.arange(4.0) - 1))
    assert torch.equal(second, 2 * (-2 * (torch.arange(4.0) + 10) - 5))


def test_operations_that_are_not_named_are_not_repeated():
    with pytest.raises(AttributeError, match="changed_by"):
        capture(WithOperation().call, [Summand(1.0), torch.arange(4.0)], [])
    assert capture(AnotherOperation().call, [torch.arange(4.0)], [])[1] is None


def test_what_was_given_is_not_held_after_a_release():
    summand, operations = Summand(1.0), {"changed_by": changed_by}
    (result,), replay = capture(WithOperation().call, [summand, torch.arange(4.0)], [summand], operations)
    ends = weakref.ref(summand), weakref.ref(result)
    del summand, result
    assert [end() for end in ends] == [None, None]
    other = Summand(2.0)
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
