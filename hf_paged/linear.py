"""Linear layers in compiled graphs, on a CPU in float32.

With one token a linear layer is a matrix-vector product: every weight is read once and used once. MKL, which torch
calls, reaches about half of the memory's bandwidth there. A plain sum, as inductor writes it, reaches most of it.

With a few tokens the product is much faster the other way round, `weight @ tokens.T`, since the small matrix, not the
large one, is then the one that is brought into another layout on each call. From some tokens on oneDNN, which torch
takes for other dtypes only, is ahead of MKL. None of this needs a second copy of the weights.
"""

from typing import Any

import torch
from torch import Tensor
from torch._inductor import lowering
from torch._inductor.compile_fx import compile_fx

_FEW = 4  # rows up to which MKL is ahead
_MANY = 128  # rows from which on it does not matter which matrix is brought into another layout

_library = torch.library.Library("hf_paged", "FRAGMENT")  # type: ignore[no-untyped-call]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) >= _MANY:
        output: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    else:
        if len(rows) <= _FEW:
            output = torch.mm(weight, rows.t()).t()
        else:
            output = torch.ops.mkldnn._linear_pointwise(weight, rows, None, "none", [], "").t()
        output = output.contiguous()
        if bias is not None:
            output += bias
    return output.view(*x.shape[:-1], len(weight))


def _like_output(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


# The caches of torch.compile know an operation by its name alone: a new lowering needs a new name.
for _name, _function in (("linear_of_one_row", torch.nn.functional.linear), ("linear_of_rows", _linear)):
    _library.define(f"{_name}(Tensor x, Tensor weight, Tensor? bias) -> Tensor")  # type: ignore[no-untyped-call]
    _library.impl(_name, _function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"hf_paged::{_name}", _like_output, lib=_library)


@lowering.register_lowering(torch.ops.hf_paged.linear_of_one_row.default, type_promotion_kind=None)
def _as_sum(x: Any, weight: Any, bias: Any) -> Any:
    x.realize()  # else what computes it would be repeated for every output
    output = lowering.sum_(lowering.mul(lowering.unsqueeze(x, -2), weight), axis=[-1])
    return output if bias is None else lowering.add(output, bias)


def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    """Compile with inductor, float32 linear layers on a CPU as above; a backend of `torch.compile`.

    Args:
        graph: what dynamo captured.
        inputs: examples of its inputs.
    """
    for node in graph.graph.find_nodes(op="call_function", target=torch._C._nn.linear):
        x = node.args[0].meta["example_value"]
        if x.device.type != "cpu" or x.dtype != torch.float32:
            continue
        is_one_row = all(isinstance(size, int) and size == 1 for size in x.shape[:-1])
        name = "linear_of_one_row" if is_one_row else "linear_of_rows"
        node.target = getattr(torch.ops.hf_paged, name).default
        node.args = (*node.args, *(node.kwargs.get(key) for key in ("input", "weight", "bias")[len(node.args) :]))
        node.kwargs = {}
    graph.recompile()
    return compile_fx(graph, inputs)
