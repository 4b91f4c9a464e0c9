"""Give zero gradients to the parameters to which PyTorch's own penalty gives zeros.

The double backward of PyTorch's activations and pooling functions returns zeros for their inputs. These zeros flow back
through the forward to all parameters before such a function, such as a bias before a ReLU. Their ``grad`` is then zeros
and not None. This matters: an optimizer with momentum moves these parameters, and DistributedDataParallel waits for
them. fastgan's Functions return None instead. This module adds the zeros for Functions that replace such a function of
PyTorch (``fastgan.ops.filled``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from fastgan.ops.filled import filled_inputs
from fastgan.ops.needed import node_of


def fill_zeros(
    penalty: Tensor,
    path: Collection[Node],
    inputs: Iterable[Tensor],
    made: Iterable[Tensor] | None = None,
    more: Mapping[Node, Tensor] | None = None,
) -> Tensor:
    """Return a penalty whose backward also gives zeros to the leaves that get zeros in PyTorch.

    Args:
        penalty: the penalty, or one of the gradients from which it will be computed.
        path: the nodes between the logits and the inputs.
        inputs: the inputs. They get no zeros.
        made: all gradients from which the penalty will be computed, if ``penalty`` is one of them.
        more: further leaves by their nodes. While torch.compile records a graph, parameters have nodes of their own.
    """
    below = reached_by_zeros(path)
    points = {node_of(x) for x in inputs}
    more = more or {}
    candidates = {
        node: leaf
        for node in below
        if node not in points and (leaf := more.get(node, getattr(node, "variable", None))) is not None
    }
    if not candidates:
        return penalty
    # A leaf that the penalty reaches in the graph may still get None, as the bias of PyTorch's norms does. So a bias
    # always gets zeros, which are cheap to add. A weight gets them only if the penalty does not reach it.
    depends = reached([tensor.grad_fn for tensor in ([penalty] if made is None else made)])
    biases = {node.next_functions[2][0] for node in path if type(node).__name__ == "NativeLayerNormBackward0"}
    leaves = [leaf for node, leaf in candidates.items() if node not in depends or leaf.ndim < 2 or node in biases]
    if not leaves:
        return penalty
    return with_zeros(penalty, leaves)


def with_zeros(made: Tensor, leaves: Iterable[Tensor]) -> Tensor:
    """Return the tensor, whose backward also gives zeros to the leaves."""
    result: Tensor = _WithZeros.apply(made, *leaves)  # type: ignore[no-untyped-call]
    return result


def reached_by_zeros(path: Iterable[Node]) -> dict[Node, None]:
    """Return the nodes that the zeros of PyTorch's double backward reach, in a fixed order."""
    return reached(node.next_functions[index][0] for node in path for index in filled_inputs(node))


def reached(nodes: Iterable[Node | None]) -> dict[Node, None]:
    """Return all nodes that a backward from these nodes reaches."""
    seen: dict[Node, None] = {}
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen[node] = None
            for following, _ in node.next_functions:
                waiting.append(following)  # a generator would cost more, in each node of the graph
    return seen


class _WithZeros(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, penalty: Tensor, *leaves: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.leaves = leaves  # not saved for backward: users may modify leaves in place before the backward
        return penalty.view_as(penalty)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        zeros: Any = _Zeros.apply if torch.is_grad_enabled() else torch.zeros_like
        wanted = zip(ctx.leaves, ctx.needs_input_grad[1:], strict=True)
        return grad, *(zeros(leaf) if want else None for leaf, want in wanted)


class _Zeros(torch.autograd.Function):
    """Zeros that can be differentiated to any order."""

    @staticmethod
    def forward(ctx: Any, like: Tensor) -> Tensor:
        return torch.zeros_like(like)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        zeros: Tensor = _Zeros.apply(grad)  # type: ignore[no-untyped-call]
        return zeros
