"""Linear layers in compiled graphs, on a CPU in float32.

With one token a linear layer is a matrix-vector product: every weight is read once and used once. MKL, which torch
calls, reaches about half of the memory's bandwidth there. A plain sum, as inductor writes it, reaches most of it.

With two or three tokens MKL reads the weights once, as fast as with one, if it is handed the tokens first. With a few
more the product is much faster the other way round, `weight @ tokens.T`, since the small matrix, not the large one, is
then the one that is brought into another layout on each call; there oneDNN, which torch takes for other dtypes only,
is ahead of MKL. The result of both is the other way round: what inductor compiles around it reads it as it is. None
of this needs a second copy of the weights.
"""

import math
from functools import cache

import torch
from torch import Tensor

from hf_paged._torch.graphs import LINEAR_LAYERS, is_wrapper, lower_as_sum, onednn_linear

_MKL_ROWS = 3  # up to which MKL is ahead
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
    if len(rows) > _MKL_ROWS:
        return _onednn(weight, rows, None)
    return torch.nn.functional.linear(rows, weight).t().contiguous()


def _linear_of_many_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    output = _onednn(x.reshape(-1, x.shape[-1]), weight, bias)
    return output.view(*x.shape[:-1], len(weight))


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return onednn_linear(x, weight, bias) if _HAS_ONEDNN else torch.nn.functional.linear(x, weight, bias)


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


def choose_linear_layers(graph: torch.fx.GraphModule, has_many_rows: bool = False) -> set[str]:
    """Let the linear layers of what dynamo captured be computed as above, those in float32 on a CPU.

    Args:
        graph: what dynamo captured; is changed.
        has_many_rows: whether there are `MANY_ROWS` or more where the graph leaves open how many.

    Returns:
        The kinds of its linear layers: `"one_row"`, `"few_rows"`, `"many_rows"`, and `"torch's"` for those left alone.
    """
    kinds = set()
    for node in graph.graph.find_nodes(op="call_function", target=torch.nn.functional.linear):
        if not LINEAR_LAYERS.is_on or not _is_plain(node):
            kinds.add("torch's")
            continue
        x = node.args[0].meta["example_value"]
        kind = _kind(math.prod(x.shape[:-1]), has_many_rows)
        kinds.add(kind)
        node.target = getattr(torch.ops.hf_paged, f"linear_of_{kind}").default
        node.args = (*node.args, *(node.kwargs.get(key) for key in ("input", "weight", "bias")[len(node.args) :]))
        node.kwargs = {}
    if "one_row" in kinds:
        _lower_one_row()
    graph.recompile()
    return kinds


@cache
def _lower_one_row() -> None:
    lower_as_sum(torch.ops.hf_paged.linear_of_one_row.default)


def _is_plain(node: torch.fx.Node) -> bool:
    """Whether a linear layer is on a CPU and all in float32, autocast aside, of tensors that are nothing else."""
    values = [arg.meta["example_value"] for arg in (node, *node.all_input_nodes)]
    return all(
        value.device.type == "cpu" and value.dtype == torch.float32 and not is_wrapper(value) for value in values
    )


def _kind(num_rows: int | torch.SymInt, has_many_rows: bool) -> str:
    if not isinstance(num_rows, int):
        return "many_rows" if has_many_rows else "few_rows"
    return "one_row" if num_rows == 1 else "many_rows" if num_rows >= MANY_ROWS else "few_rows"
