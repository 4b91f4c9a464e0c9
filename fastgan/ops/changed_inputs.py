"""Graphs of torch.compile that change buffers: the backward gets the values that the forward had.

Compilers may compute a value again in the backward instead of storing it. PyTorch's partitioner does so even if the
value depends on an input that the forward changes (https://github.com/pytorch/pytorch/pull/197039). Layers with
spectral norm and up to four inputs or outputs then get wrong gradients, because u and v are computed again from the
new u and v. Here, such a graph changes copies, and at its end the buffers become what the copies are:

    (u,) = copies([u_before])     # an operator that no compiler knows, so none computes it again
    ...
    u_before.copy_(u)
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fastgan.ops.library import LIBRARY

_NORMS = ("batch_norm", "instance_norm")  # their backward does not read the buffers that they change


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


if not hasattr(torch.ops.fastgan, "copies"):  # operators survive a failed import
    LIBRARY.define("copies(Tensor[] tensors) -> Tensor[]")
    LIBRARY.impl("copies", _copies, "CompositeExplicitAutograd")
    torch.library.register_fake("fastgan::copies", _copies, lib=LIBRARY)


def change_copies(module: GraphModule) -> None:
    """Let a graph of Dynamo that has a backward change copies of its inputs."""
    graph = module.graph
    last = graph.output_node()
    changed = _changed(graph)
    if not changed or not any(_value(node).requires_grad for node in last.all_input_nodes):
        return
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        all_copies = graph.call_function(torch.ops.fastgan.copies.default, (changed,))
        all_copies.meta["example_value"] = _copies([_value(node) for node in changed])
        copies = [graph.call_function(operator.getitem, (all_copies, i)) for i in range(len(changed))]
        for copy, value in zip(copies, all_copies.meta["example_value"], strict=True):
            copy.meta["example_value"] = value
    for node, copy in zip(changed, copies, strict=True):
        node.replace_all_uses_with(copy, delete_user_cb=lambda user: user not in (all_copies, last))
    with graph.inserting_before(last):
        for node, copy in zip(changed, copies, strict=True):
            graph.call_method("copy_", (node, copy)).meta["example_value"] = _value(node)
    module.recompile()


def _changed(graph: Graph) -> list[Node]:
    """Return the buffers that a graph changes and may read."""
    inputs = [node for node in graph.nodes if node.op == "placeholder" and isinstance(_value(node), Tensor)]
    owners = Counter(_storage(node) for node in inputs)
    return [
        node
        for node in inputs
        if _value(node)._version > 0
        and _value(node).is_floating_point()
        and not _value(node).requires_grad
        and owners[_storage(node)] == 1
        and not all(_name(user) in _NORMS for user in node.users)
    ]


def _value(node: Node) -> Any:
    return node.meta.get("example_value")


def _storage(node: Node) -> int:
    return _value(node).untyped_storage()._cdata  # type: ignore[no-any-return]


def _name(node: Node) -> str:
    return str(getattr(node.target, "__name__", node.target))
