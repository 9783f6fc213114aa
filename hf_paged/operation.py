"""Writing and attending as one operation of compiled graphs, which they don't look into."""

from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass

from hf_paged.attention import attend, profiled
from hf_paged.plan import Plan


def write_and_attend(
    plan: Plan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: int,
    is_causal: bool,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """A layer's attention in a compiled graph, and its update if that left it to this.

    Arguments and result are those of `paged_flex_attention`, with the plan of the mask and the index of the layer. It
    writes to what is no input of the graph. That each layer's queries come from the layer before keeps the layers
    in order; nothing else needs an order.
    """
    with profiled("write_and_attend"):
        if plan.batch.is_written_by_attention:
            key, value = plan.batch.write(layer, key, value)
        return attend(plan, query, key, value, layer, is_causal, scale, softcap, sinks).contiguous()


def write_only(plan: Plan, key: Tensor, value: Tensor, layer: int) -> None:
    """`write_and_attend` where nobody wants the output."""
    if plan.batch.is_written_by_attention:
        plan.batch.write(layer, key, value)


def _like_output(plan: Any, query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
    num_rows, num_heads, num_queries, _ = query.shape
    return query.new_empty(num_rows, num_queries, num_heads, value.shape[3])


def _nothing(*arguments: Any) -> None:
    pass


_library = torch.library.Library("hf_paged", "DEF")  # type: ignore[no-untyped-call]
for _operation, _fake in ((write_and_attend, _like_output), (write_only, _nothing)):
    _name = _operation.__name__
    _library.define(  # type: ignore[no-untyped-call]
        _name + torch.library.infer_schema(_operation, mutates_args=()),
        # CUDA graphs would repeat the kernels of one pass and leave out the planning of the next.
        tags=(torch.Tag.cudagraph_unsafe, torch.Tag.pt2_compliant_tag),
    )
    # Not torch.library.custom_op, which puts more Python into each call.
    _library.impl(_name, _operation, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"hf_paged::{_name}", _fake, lib=_library)
    # Written even where nobody wants the output. Not by an effect token: a node with one hides the operation's tags.
    torch.fx.node.has_side_effect(getattr(torch.ops.hf_paged, _name).default)


class WithoutUnusedAttention(CustomGraphPass):
    """Leave out attention whose output nobody wants, and what only that needs."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        """Change the graph that inductor is about to compile."""
        for node in graph.find_nodes(op="call_function", target=torch.ops.hf_paged.write_and_attend.default):
            if not node.users:
                plan, _, key, value, layer = node.args[:5]
                with graph.inserting_before(node):
                    graph.call_function(torch.ops.hf_paged.write_only.default, (plan, key, value, layer))
                graph.erase_node(node)
        graph.eliminate_dead_code()

    def uuid(self) -> str:
        """What inductor's cache knows it by."""
        return "hf_paged.operation.WithoutUnusedAttention-1"
