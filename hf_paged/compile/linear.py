"""Linear layers in compiled graphs, on a CPU in float32.

With one token a linear layer is a matrix-vector product: every weight is read once and used once. MKL, which torch
calls, reaches about half of the memory's bandwidth there. A plain sum, as inductor writes it, reaches most of it.

With a few tokens the product is much faster the other way round, `weight @ tokens.T`, since the small matrix, not the
large one, is then the one that is brought into another layout on each call. From some tokens on oneDNN, which torch
takes for other dtypes only, is ahead of MKL. The result stays the other way round, too: what inductor compiles around
it reads it as it is. None of this needs a second copy of the weights.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor
from torch._inductor import lowering
from torch._inductor.compile_fx import compile_fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hf_paged._torch.dynamo import without_graph

_MKL_ROWS = 4  # up to which MKL is ahead
MANY_ROWS = 128  # from which on it does not matter which matrix is brought into another layout

# Some builds of torch are without it.
_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]

_library = torch.library.Library("hf_paged", "FRAGMENT")  # type: ignore[no-untyped-call]


def _linear_of_few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    products: Tensor = torch.ops.hf_paged.products_of_rows(weight, x.reshape(-1, x.shape[-1]))
    # Not brought into the layout of torch's own result: what comes next in the graph reads it as it is.
    output = products.t().reshape(*x.shape[:-1], len(weight))
    return output if bias is None else output + bias


def _products_of_rows(weight: Tensor, rows: Tensor) -> Tensor:
    return torch.mm(weight, rows.t()) if len(rows) <= _MKL_ROWS else _onednn(weight, rows, None)


def _linear_of_many_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    output = _onednn(x.reshape(-1, x.shape[-1]), weight, bias)
    return output.view(*x.shape[:-1], len(weight))


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not _HAS_ONEDNN:
        return torch.nn.functional.linear(x, weight, bias)
    output: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return output


def _like_output(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _like_products(weight: Tensor, rows: Tensor) -> Tensor:
    return weight.new_empty(weight.shape[0], rows.shape[0])


_LINEAR = "(Tensor x, Tensor weight, Tensor? bias) -> Tensor"
# The caches of torch.compile know an operation by its name alone: a new lowering needs a new name.
_library.define(f"linear_of_few_rows{_LINEAR}")  # type: ignore[no-untyped-call]
_library.impl("linear_of_few_rows", _linear_of_few_rows, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
for _signature, _function, _like in (
    (f"linear_of_one_row{_LINEAR}", torch.nn.functional.linear, _like_output),
    (f"linear_of_many_rows{_LINEAR}", _linear_of_many_rows, _like_output),
    ("products_of_rows(Tensor weight, Tensor rows) -> Tensor", _products_of_rows, _like_products),
):
    _name = _signature.partition("(")[0]
    _library.define(_signature)  # type: ignore[no-untyped-call]
    _library.impl(_name, _function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"hf_paged::{_name}", _like, lib=_library)


@lowering.register_lowering(torch.ops.hf_paged.linear_of_one_row.default, type_promotion_kind=None)
def _as_sum(x: Any, weight: Any, bias: Any) -> Any:
    x.realize()  # else what computes it would be repeated for every output
    output = lowering.sum_(lowering.mul(lowering.unsqueeze(x, -2), weight), axis=[-1])
    return output if bias is None else lowering.add(output, bias)


def backend(
    graph: torch.fx.GraphModule,
    inputs: list[Any],
    for_one_row: Callable[..., Any] | None = None,
    has_many_rows: bool = False,
) -> Any:
    """Compile with inductor, float32 linear layers on a CPU as above; a backend of `torch.compile`.

    Args:
        graph: what dynamo captured.
        inputs: examples of its inputs.
        for_one_row: to be called in place of inductor's `compile_fx_inner` for a graph whose linear layers are all of
            one token in float32 on a CPU.
        has_many_rows: whether there are `MANY_ROWS` or more where the graph leaves open how many.
    """
    kinds = set()
    for node in graph.graph.find_nodes(op="call_function", target=torch._C._nn.linear):
        x = node.args[0].meta["example_value"]
        if not _is_plain(node):
            kinds.add("torch's")
            continue
        kind = _kind(math.prod(x.shape[:-1]), has_many_rows)
        kinds.add(kind)
        node.target = getattr(torch.ops.hf_paged, f"linear_of_{kind}").default
        node.args = (*node.args, *(node.kwargs.get(key) for key in ("input", "weight", "bias")[len(node.args) :]))
        node.kwargs = {}
    graph.recompile()
    # Dynamo's guards have looked at every weight; the graph need not do so again on each call.
    with torch._inductor.config.patch(size_asserts=False):
        if for_one_row is None or kinds != {"one_row"}:
            return without_graph(compile_fx(graph, inputs))
        # AOTAutograd's cache would find the graph without asking for what is inside.
        with torch._functorch.config.patch(enable_autograd_cache=False):
            return without_graph(compile_fx(graph, inputs, inner_compile=for_one_row))


def _is_plain(node: torch.fx.Node) -> bool:
    """Whether a linear layer is on a CPU and all in float32, autocast aside, of tensors that are nothing else."""
    values = [arg.meta["example_value"] for arg in (node, *node.all_input_nodes)]
    return all(
        value.device.type == "cpu" and value.dtype == torch.float32 and not is_traceable_wrapper_subclass(value)
        for value in values
    )


def _kind(num_rows: int | torch.SymInt, has_many_rows: bool) -> str:
    if not isinstance(num_rows, int):
        return "many_rows" if has_many_rows else "few_rows"
    return "one_row" if num_rows == 1 else "many_rows" if num_rows >= MANY_ROWS else "few_rows"
