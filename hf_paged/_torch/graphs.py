"""Graphs of whole models, compiled by inductor."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from hf_paged._torch.dynamo import with_own_code
from hf_paged._torch.inductor import AUTOGRAD_CONFIG, COMPILE_FX, COMPILE_FX_INNER
from hf_paged._torch.private import Private
from hf_paged._torch.tricks import Trick

_LOWERING = Private(
    "torch._inductor.lowering", check=lambda names: (names.register_lowering, names.sum_, names.mul, names.unsqueeze)
)
_IS_WRAPPER = Private("torch.utils._python_dispatch:is_traceable_wrapper_subclass", check=lambda f: f(torch.empty(0)))
_GRAPH_PASS = Private("torch._inductor.custom_graph_pass:CustomGraphPass", check=lambda base: base.uuid)
_ONEDNN = Private(
    "torch.ops:mkldnn._linear_pointwise.default",
    check=lambda compute: compute(torch.ones(1, 1), torch.ones(1, 1), None, "none", [], ""),
)

ONE_COMPILATION = Trick(
    "one_compilation",
    "what torch.compile captured of a model is handed to inductor",
    "torch.compile compiles it a second time, and looks at its guards in each step",
    COMPILE_FX,
)
STEP_REPLAY = Trick(
    "step_replay",
    "of a decoding step of one row on a CPU, its loops alone are called",
    "each step calls what inductor put around the loops, too",
    COMPILE_FX_INNER,
    AUTOGRAD_CONFIG,
    device_type="cpu",
)
LINEAR_LAYERS = Trick(
    "linear_layers",
    "linear layers in float32 on a CPU are compiled for the number of their tokens",
    "linear layers are torch's",
    _LOWERING,
    _IS_WRAPPER,
    device_type="cpu",
)
UNUSED_ATTENTION = Trick(
    "unused_attention",
    "attention whose output nobody wants is left out of compiled graphs",
    "it is computed",
    _GRAPH_PASS,
)

Replaced = Callable[[Callable[..., Any]], Callable[..., Any]]


def compile_graph(
    graph: torch.fx.GraphModule,
    inputs: list[Any],
    options: Mapping[str, Any],
    replaced: Replaced | None = None,
) -> Callable[..., Any]:
    """Compile what dynamo captured, in a backend of `torch.compile`.

    Args:
        graph: what was captured.
        inputs: examples of its inputs.
        options: of inductor, as `torch.compile` takes them.
        replaced: takes what is called with a list of inputs, and returns what is to be called instead. Left out where
            `STEP_REPLAY` is off.
    """
    if ONE_COMPILATION.is_on and replaced is not None and STEP_REPLAY.is_on:
        try:
            return _compile_replaced(graph, inputs, options, replaced)
        except Exception as error:
            STEP_REPLAY.fall_back(error)
    if ONE_COMPILATION.is_on:
        try:
            return _without_graph(COMPILE_FX.value(graph, inputs, config_patches=options))
        except Exception as error:
            ONE_COMPILATION.fall_back(error)
    # Not one that waits with its code, nor called itself: dynamo looks into neither.
    plain = torch.fx.GraphModule(graph, graph.graph)

    def run(*inputs: Any) -> Any:
        return plain(*inputs)

    again: Callable[..., Any] = torch.compile(with_own_code(run), fullgraph=True, options=dict(options))
    # What torch.compile returns would be taken off by dynamo, which has the result of a backend run as it is.
    return lambda *inputs: again(*inputs)


def _compile_replaced(
    graph: torch.fx.GraphModule, inputs: list[Any], options: Mapping[str, Any], replaced: Replaced
) -> Callable[..., Any]:
    def compile_inner(inner: torch.fx.GraphModule, inputs: list[Any], **arguments: Any) -> Any:
        compiled: Any = COMPILE_FX_INNER.value(inner, inputs, **arguments)
        compiled.current_callable = replaced(compiled.current_callable)
        return compiled

    # AOTAutograd's cache would find the graph without asking for what is inside.
    with AUTOGRAD_CONFIG.value.patch(enable_autograd_cache=False):
        return _without_graph(COMPILE_FX.value(graph, inputs, inner_compile=compile_inner, config_patches=options))


def _without_graph(run: Any) -> Callable[..., Any]:
    """Part what AOTAutograd returned from the graph it was made of, whose nodes take megabytes.

    It carries methods of the graph along, which nothing calls once the function is compiled.
    """
    function = run
    while function is not None:
        for name in ("zero_grad", "named_parameters", "named_buffers"):
            getattr(function, "__dict__", {}).pop(name, None)
        function = getattr(function, "_torchdynamo_orig_callable", None)
    return run  # type: ignore[no-any-return]


def lower_as_sum(operation: Any) -> None:
    """Have inductor compile `operation(x, weight, bias)`, a linear layer of one token, as a plain sum of products.

    Where that can't be done with this torch, inductor calls the operation.
    """
    lowering = _LOWERING.value

    def as_sum(x: Any, weight: Any, bias: Any) -> Any:
        x.realize()  # else what computes it would be repeated for every output
        output = lowering.sum_(lowering.mul(lowering.unsqueeze(x, -2), weight), axis=[-1])
        return output if bias is None else lowering.add(output, bias)

    try:
        lowering.register_lowering(operation, type_promotion_kind=None)(as_sum)
    except Exception as error:
        LINEAR_LAYERS.fall_back(error)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear` of `(num_tokens, size)`, computed by oneDNN if this torch has it."""
    compute = _ONEDNN.value_or(None, "Linear layers of many tokens are torch's")
    if compute is None:
        return torch.nn.functional.linear(x, weight, bias)
    output: Tensor = compute(x, weight, bias, "none", [], "")
    return output


def is_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor is one of other tensors, as those of torchao are."""
    return bool(_IS_WRAPPER.value(tensor))


def graph_pass(change: Callable[[torch.fx.Graph], None], uuid: str) -> Any:
    """Wrap what changes a graph before inductor compiles it.

    Args:
        change: changes the graph it is given.
        uuid: what inductor's cache knows it by: a new one for each change of it.
    """
    members = {"__call__": lambda self, graph: change(graph), "uuid": lambda self: uuid}
    return type("GraphPass", (_GRAPH_PASS.value,), members)()


def frozen_weights() -> AbstractContextManager[Any]:
    """While it is open, graphs are compiled by inductor at its fastest: weights as constants, the best of products.

    Options of `torch.compile` are not enough: dynamo looks whether weights are frozen before inductor is given them.
    """
    from torch._inductor import config  # nothing to go on without: only measurements ask for it

    flags: AbstractContextManager[Any] = config.patch(
        freezing=True, max_autotune=True, max_autotune_gemm_backends="CPP,ATEN"
    )
    return flags
