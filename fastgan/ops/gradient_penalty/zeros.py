"""Zeros for the parameters that a penalty does not depend on, where PyTorch's own penalty leaves zeros.

The double backward of PyTorch's activations and poolings fills zeros for their inputs. These run back through the
forward and reach every parameter below, such as a bias before a ReLU: its ``grad`` is zeros, so that an optimizer with
momentum moves it, and DistributedDataParallel sees it. fastgan's Functions send nothing. What lies below those that
stand for such a function (``fastgan.ops.filled``) gets its zeros here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from fastgan.ops.filled import filled_inputs


def leave_zeros(
    penalty: Tensor,
    path: Iterable[Node],
    inputs: Iterable[Tensor],
    made: Iterable[Tensor] | None = None,
    more: Mapping[Node, Tensor] | None = None,
) -> Tensor:
    """The penalty, whose backward gives zeros to those leaves that it does not depend on and PyTorch's reaches.

    Args:
        path: the nodes by which the logits depend on ``inputs``, which get no zeros.
        made: if ``penalty`` is one of several gradients that a penalty will be made of, all of these.
        more: further leaves by their nodes. While torch.compile makes a graph, parameters have nodes of their own.
    """
    below = reached_by_zeros(path)
    points = {get_gradient_edge(x).node for x in inputs}
    more = more or {}
    candidates = {
        node: leaf
        for node in below
        if node not in points and (leaf := more.get(node, getattr(node, "variable", None))) is not None
    }
    if not candidates:
        return penalty
    # Not every node hands on what it gets: PyTorch's group norm gives its bias nothing for its statistics. Zeros that
    # are added to what is there cost nothing for a bias, and are left out for a weight.
    depends = _reached([tensor.grad_fn for tensor in ([penalty] if made is None else made)])
    leaves = [leaf for node, leaf in candidates.items() if node not in depends or leaf.ndim < 2]
    if not leaves:
        return penalty
    result: Tensor = _WithZeros.apply(penalty, *leaves)  # type: ignore[no-untyped-call]
    return result


def reached_by_zeros(path: Iterable[Node]) -> dict[Node, None]:
    """The nodes, in a fixed order, that the zeros of PyTorch's double backward reach."""
    return _reached(node.next_functions[index][0] for node in path for index in filled_inputs(node))


def _reached(nodes: Iterable[Node | None]) -> dict[Node, None]:
    """All nodes that a backward from these reaches."""
    seen: dict[Node, None] = {}
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen[node] = None
            waiting.extend(following for following, _ in node.next_functions)
    return seen


class _WithZeros(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, penalty: Tensor, *leaves: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.leaves = leaves  # not saved: whoever writes into one before the backward may
        return penalty.view_as(penalty)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        zeros: Any = _Zeros.apply if torch.is_grad_enabled() else torch.zeros_like
        wanted = zip(ctx.leaves, ctx.needs_input_grad[1:], strict=True)
        return grad, *(zeros(leaf) if want else None for leaf, want in wanted)


class _Zeros(torch.autograd.Function):
    """Zeros of every order: a constant of the leaf."""

    @staticmethod
    def forward(ctx: Any, like: Tensor) -> Tensor:
        return torch.zeros_like(like)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        zeros: Tensor = _Zeros.apply(grad)  # type: ignore[no-untyped-call]
        return zeros
