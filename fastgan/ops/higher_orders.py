"""Derivatives beyond the second: kernels compute the first two, and PyTorch's own operations all that follow.

A double backward whose graph is kept (``create_graph``) is asked for a third derivative. It then forms its results
anew from the op's specification in PyTorch, with a graph that has every order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Operands = Sequence[Tensor | None]


def gradients(function: Callable[..., Tensor]) -> Callable[..., list[Tensor | None]]:
    """The backward of ``function``: of its result's gradient and its operands, the gradients of these."""

    def backward(grad: Tensor, *operands: Tensor | None) -> list[Tensor | None]:
        return differentiate([function(*operands)], [grad], operands)

    return backward


def double_backward(
    backward: Callable[..., Sequence[Tensor | None]], operands: Operands, grads: Operands
) -> list[Tensor | None]:
    """The gradients of a backward's operands from those of its results, differentiable to any order.

    Args:
        backward: in operations of PyTorch.
        operands: what it is called with; those that require no gradient get none.
        grads: one for each of its results; None where there is no gradient.
    """
    # One operand may be made from another, and each must get its own share alone.
    apart = [t.view_as(t) if t is not None and t.requires_grad else t for t in operands]
    return differentiate(backward(*apart), grads, apart)


def differentiate(outputs: Operands, grads: Operands, inputs: Operands) -> list[Tensor | None]:
    """``torch.autograd.grad`` that keeps its graph, with None for what there is no gradient of."""
    pairs = [
        (output, grad)
        for output, grad in zip(outputs, grads, strict=True)
        if output is not None and grad is not None and output.requires_grad
    ]
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    if not pairs or not wanted:
        return [None for _ in inputs]
    made, by = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(made, wanted, by, create_graph=True, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]
