"""Short convolutions of compiled steps: the same numbers, and no others are touched."""

import pytest
import torch
from torch.nn.functional import conv1d

from hf_paged.compile.convolutions import choose_convolutions

X, WEIGHT, BIAS = torch.randn(2, 6, 5), torch.randn(6, 1, 4), torch.randn(6)


def chosen(convolve, *inputs):
    """Compile with the graph that dynamo captures, changed; return what it gives, and how many it has changed."""
    counts = []

    def backend(graph, inputs):
        counts.append(choose_convolutions(graph))
        return graph

    torch._dynamo.reset()
    return torch.compile(convolve, backend=backend, fullgraph=True)(*inputs), sum(counts)


@pytest.mark.parametrize("bias", [None, BIAS])
def test_a_step_s_convolution_is_a_sum_of_products(bias):
    def convolve(x, weight):
        return conv1d(x, weight, bias, padding=0, groups=6)[:, :, -1:]

    output, count = chosen(convolve, X, WEIGHT)
    torch.testing.assert_close(output, convolve(X, WEIGHT))
    assert count == 1


@pytest.mark.parametrize(
    "convolve",
    [
        lambda x, weight: conv1d(x, weight, padding=3, groups=6),
        lambda x, weight: conv1d(x, weight[:, :, ::2], dilation=2, groups=6),
        lambda x, weight: conv1d(x, weight, stride=2, groups=6),
        lambda x, weight: conv1d(x, weight.expand(6, 6, 4)),
        lambda x, weight: conv1d(x.repeat(1, 1, 4), weight, groups=6),
    ],
    ids=["padded", "dilated", "with a stride", "over all channels", "long"],
)
def test_others_are_left_to_torch(convolve):
    output, count = chosen(convolve, X, WEIGHT)
    assert torch.equal(output, convolve(X, WEIGHT))
    assert count == 0
