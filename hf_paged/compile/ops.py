"""Writing and attending as operations of compiled graphs, which they don't look into.

In a graph `PagedLayer.update` writes nothing. It only marks the new keys and values, and the attention that is given
them writes them first. That is right as long as they arrive as they were marked, which is checked while the graph is
made.
"""

from typing import Any

import torch
from torch import Tensor

from hf_paged._torch.opaque import OPAQUE_INPUTS
from hf_paged._torch.surroundings import profiled
from hf_paged.attention.interface import attend
from hf_paged.attention.metadata import AttentionMetadata


def write_and_attend(
    metadata: AttentionMetadata,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: int,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    written: Tensor | None,
) -> Tensor:
    """A layer's attention in a compiled graph, and its update.

    Arguments and result are those of `paged_flex_attention`, with the metadata of the mask and the index of the layer
    that the keys were given to. It writes to what is no input of the graph. That each layer's queries come from the
    layer before keeps the layers in order. Where several attend to the same keys, `written` is the output of the one
    that writes them, for the others.
    """
    with profiled("write_and_attend"):
        if written is None:
            key, value = metadata.sequences.write(layer, key, value)
        else:
            key, value = metadata.read(layer, key, value)
        return attend(metadata, query, key, value, layer, scale, softcap, sinks).contiguous()


def write_only(metadata: AttentionMetadata, key: Tensor, value: Tensor, layer: int) -> None:
    """`write_and_attend` where nobody wants the output."""
    metadata.sequences.write(layer, key, value)


def attend_to_others(
    metadata: AttentionMetadata,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: int,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """A layer's attention to other keys than an update in the same graph was given.

    Raises:
        ValueError: if the layer has not been written outside of the graph either.
    """
    if metadata.sequences.awaits(layer):
        metadata.sequences.roll_back(metadata.step)
        raise ValueError(changed(layer))
    return attend(metadata, query, key, value, layer, scale, softcap, sinks).contiguous()


def changed(layer: int) -> str:
    """Say that the keys of a layer do not arrive at its attention as they were given to the cache."""
    return (
        f"Layer {layer} changes keys or values between cache.update() and its attention, but a compiled step stores "
        "them as its attention is given them. Run this model uncompiled: leave out compiled() or torch.compile."
    )


def new_tokens(tokens: Tensor, layer: int) -> Tensor:
    """Mark new keys or values of a layer."""
    return tokens.view_as(tokens)


def _like_output(metadata: Any, query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
    num_rows, num_heads, num_queries, _ = query.shape
    return query.new_empty(num_rows, num_queries, num_heads, value.shape[3])


def _nothing(*arguments: Any) -> None:
    pass


_library = torch.library.Library("hf_paged", "DEF")  # type: ignore[no-untyped-call]
_library.define("new_tokens(Tensor(a) tokens, int layer) -> Tensor(a)")  # type: ignore[no-untyped-call]
_library.impl("new_tokens", new_tokens, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
_OPERATIONS = (write_and_attend, _like_output), (write_only, _nothing), (attend_to_others, _like_output)
for _operation, _fake in _OPERATIONS if OPAQUE_INPUTS.is_on else ():
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


def unmark(graph: torch.fx.Graph) -> str | None:
    """Take the marks off new keys and values in what dynamo has captured.

    Returns:
        Why this graph can't store them; None if it can.
    """
    for node in graph.find_nodes(op="call_function", target=torch.ops.hf_paged.attend_to_others):
        return changed(node.args[4])
    for node in graph.find_nodes(op="call_function", target=torch.ops.hf_paged.new_tokens):
        tokens, layer = node.args
        if not node.users or any(user.target is not torch.ops.hf_paged.write_and_attend for user in node.users):
            return (
                f"Keys or values that layer {layer} gives to cache.update() are read by more than its attention, or "
                "not by it, but a compiled step stores them there and holds no others. Run this model uncompiled: "
                "leave out compiled()."
            )
        node.replace_all_uses_with(tokens)
        graph.erase_node(node)
    return None


def leave_out_unused_attention(graph: torch.fx.Graph) -> None:
    """Leave out attention whose output nobody wants, and what only that needs, of a graph that will be compiled."""
    attentions = graph.find_nodes(op="call_function", target=torch.ops.hf_paged.write_and_attend.default)
    for node in reversed(attentions):  # those that wait for another first
        if node.users:
            continue
        metadata, _, key, value, layer = node.args[:5]
        if node.args[8] is None:
            with graph.inserting_before(node):
                graph.call_function(torch.ops.hf_paged.write_only.default, (metadata, key, value, layer))
        graph.erase_node(node)
    graph.eliminate_dead_code()
