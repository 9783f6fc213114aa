"""Short convolutions in compiled graphs, on a CPU: those of the few columns that a step of a recurrent layer looks at.

Each channel is convolved by itself, so that an output is the sum of three or four products. Torch calls a library for
it, between two loops that inductor makes; as plain products it becomes part of these loops.
"""

from typing import Any

import torch
from torch import Tensor

from hf_paged._torch.graphs import is_wrapper

_NAMES = "input", "weight", "bias", "stride", "padding", "dilation", "groups"
_MAX_OUTPUTS = 4  # columns; a step has one, or one more that is left out

_library = torch.library.Library("hf_paged", "FRAGMENT")  # type: ignore[no-untyped-call]


def _short_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    output = (x.unfold(-1, weight.shape[-1], 1) * weight).sum(-1)
    return output if bias is None else output + bias[:, None]


_library.define("short_convolution(Tensor x, Tensor weight, Tensor? bias) -> Tensor")  # type: ignore[no-untyped-call]
_library.impl("short_convolution", _short_convolution, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]


def choose_convolutions(graph: torch.fx.GraphModule) -> int:
    """Let the short convolutions of what dynamo captured be computed as above.

    Args:
        graph: what dynamo captured; is changed.

    Returns:
        How many there are.
    """
    count = 0
    for node in graph.graph.find_nodes(op="call_function", target=torch.conv1d):
        arguments = dict(zip(_NAMES, node.args, strict=False)) | node.kwargs
        if _is_short(node, arguments):
            node.target = torch.ops.hf_paged.short_convolution.default
            node.args, node.kwargs = (arguments["input"], arguments["weight"], arguments.get("bias")), {}
            count += 1
    graph.recompile()
    return count


def _is_short(node: torch.fx.Node, arguments: dict[str, Any]) -> bool:
    output, *inputs = (each.meta["example_value"] for each in (node, *node.all_input_nodes))
    if any(value.device.type != "cpu" or value.dtype != output.dtype or is_wrapper(value) for value in inputs):
        return False
    usual = {"stride": 1, "padding": 0, "dilation": 1}
    is_usual = all(arguments.get(name, value) in (value, (value,), [value]) for name, value in usual.items())
    num_outputs = output.shape[-1]
    is_by_channel = output.ndim == 3 and arguments.get("groups", 1) == output.shape[1] == inputs[0].shape[1]
    return is_usual and is_by_channel and isinstance(num_outputs, int) and num_outputs <= _MAX_OUTPUTS
