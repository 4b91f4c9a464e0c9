"""Which gradients a backward must form: those that this very run of it hands on.

``ctx.needs_input_grad`` says what requires a gradient, not what is asked for: it is all true even in
``autograd.grad(y, x)``, the first pass of every penalty, which wants no parameter's. The engine knows.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

_UNREAD = "fastgan: nobody reads this gradient"


def needed(ctx: Any) -> tuple[bool, ...]:
    """In the backward of a Function: ``ctx.needs_input_grad``, less what is not asked for now.

    Looked at is what pays: the parameters' gradients in a pass that will be differentiated, the first input's in one
    that will not.
    """
    wanted: tuple[bool, ...] = ctx.needs_input_grad
    # Not the engine's: traced, or run by another node, as a function in place on a view is.
    if torch.compiler.is_dynamo_compiling() or torch._C._current_autograd_node() is not ctx:
        return wanted
    nodes = iter(node for node, _ in ctx.next_functions if node is not None)
    first, *others = [next(nodes) if want else None for want in wanted]
    if torch.is_grad_enabled():
        return wanted if any(map(_is_asked_for, others)) else (wanted[0], *[False] * len(others))
    return wanted if _is_asked_for(first) else (False, *wanted[1:])


def leave_unread(leaf: Tensor) -> None:
    """Say of a leaf that requires a gradient, and that nobody else knows: no later backward needs to reach it.

    Not of one that somebody has left a hook on, who then knows it.
    """
    if leaf._backward_hooks:
        return
    metadata: Any = get_gradient_edge(leaf).node.metadata
    metadata[_UNREAD] = True


def _is_asked_for(node: Node | None) -> bool:
    if node is None or _UNREAD in cast(Any, node.metadata):
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        return True  # not executed, but one of the leaves that autograd.grad() was given
