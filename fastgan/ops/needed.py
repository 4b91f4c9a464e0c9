"""Find out which gradients the current run of a backward must compute.

``ctx.needs_input_grad`` tells which inputs require a gradient, not which gradients are requested. All its entries can
be true in ``autograd.grad(y, x)``, the first pass of every penalty, although that call requests no gradient of a
parameter. Only the autograd engine knows which gradients are requested.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from fastgan import torch_private

_UNUSED = "fastgan: this gradient is not used"


def needed(ctx: Any) -> tuple[bool, ...]:
    """Return ``ctx.needs_input_grad`` without the gradients that this run of the backward does not need.

    Call it in the backward of a Function. It only makes the checks that save work: the parameters' gradients in a pass
    that will be differentiated again, and the first input's gradient in a pass that will not.
    """
    wanted: tuple[bool, ...] = ctx.needs_input_grad
    # The engine does not run this node directly: it is traced, or another node runs it, as for an in-place function on
    # a view.
    if torch.compiler.is_dynamo_compiling() or torch_private.current_node() is not ctx:
        return wanted
    nodes = [node for node, _ in ctx.next_functions if node is not None]  # one for each entry that is true
    first = nodes.pop(0) if wanted[0] else None
    if torch.is_grad_enabled():
        for node in nodes:
            if _is_requested(node):
                return wanted
        return wanted[0], *[False] * (len(wanted) - 1)
    return wanted if _is_requested(first) else (False, *wanted[1:])


def node_of(x: Tensor) -> Node:
    """Return the graph node of a tensor. A view of a subclass would be the node of an alias instead."""
    if type(x) is Tensor:
        return get_gradient_edge(x).node
    with torch_private.DisableTorchFunction():
        return get_gradient_edge(x).node


def mark_unused(leaf: Tensor) -> None:
    """Mark a private leaf that requires a gradient: no later backward needs its gradient.

    A leaf with a hook is not private, so it is not marked.
    """
    if leaf._backward_hooks:
        return
    metadata: Any = node_of(leaf).metadata
    metadata[_UNUSED] = True


def _is_requested(node: Node | None) -> bool:
    if node is None:
        return False
    metadata: Any = node.metadata
    if _UNUSED in metadata:
        return False
    try:
        return torch_private.will_execute(node)
    except RuntimeError:
        return True  # the node is one of the leaves passed to autograd.grad(), which are not executed
