"""Repeating what a kernel did gives what calling it again gives."""

import pytest
import torch

from hf_paged import inductor
from hf_paged.flash_decoding import flash_decoding
from hf_paged.launches import record
from hf_paged.units import Units


def units(num_rows, num_places):
    rows = torch.arange(num_rows).repeat_interleave(num_places)
    limits = torch.full((len(rows),), 16, dtype=torch.int32)
    limits[-1] = 5
    by_row = torch.arange(len(rows)).view(num_rows, -1).t().contiguous()
    counts = torch.full((num_rows,), num_places)
    return Units(16, torch.arange(len(rows)), rows, torch.zeros_like(limits), limits, by_row, counts)


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
        output, launches = record(*arguments)
        made.append(launches)
        return output, launches

    monkeypatch.setattr(inductor, "record", keep)
    return made


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(6, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_other_layers_get_what_they_would_get_alone(num_rows, num_heads, num_kv_heads, has_sinks, recorded):
    layers = [tensors(num_rows, num_heads, num_kv_heads, seed, has_sinks) for seed in range(3)]
    lists = units(num_rows, 3)

    def made_for(layer):
        query, keys, values, sinks = layer
        return flash_decoding(query, keys, values, lists, 0.2, has_sinks=sinks is not None)

    attend = made_for(layers[0])
    together = [attend(*layer) for layer in layers]
    assert [launches is not None for launches in recorded] == [True]
    for layer, output in zip(layers, together, strict=True):
        assert torch.equal(made_for(layer)(*layer), output)


def empty_strided_cpu(size, strides, dtype):
    return torch.empty_strided(size, strides, dtype=dtype)


def reinterpret_tensor(tensor, size, strides, offset):
    return torch.as_strided(tensor, size, strides, offset)


def cpp_fused_double(source, target, count):
    target.view(-1)[:count] = 2 * source.view(-1)[:count]


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


class NothingOfIt:
    def call(self, arguments):
        arguments.clear()
        target = empty_strided_cpu((4,), (1,), torch.float32)
        cpp_fused_double(target, target, 0)
        return (target,)


def test_a_result_stays_when_it_is_repeated():
    source, other = torch.arange(4.0), torch.arange(4.0) + 10
    first, launches = record(Loops().call, [source], [source])
    second = launches.repeat(other)
    third = launches.repeat(source)
    assert torch.equal(second, 2 * other)
    assert torch.equal(first, 2 * source)
    assert torch.equal(third, 2 * source)


@pytest.mark.parametrize("runner", [MoreThanLoops, PartOfAnInput, PartOfTheResult, NothingOfIt])
def test_what_may_be_more_than_loops_over_whole_tensors_is_not_repeated(runner):
    source = torch.arange(4.0)
    result, launches = record(runner().call, [source], [source])
    assert launches is None
    if runner is not NothingOfIt:
        expected = runner().call([source])[0]
        assert torch.equal(result, expected)


def test_a_function_that_is_no_method_is_only_called():
    source = torch.arange(4.0)
    result, launches = record(lambda inputs: (inputs[0] + 1,), [source], [source])
    assert torch.equal(result, source + 1)
    assert launches is None
