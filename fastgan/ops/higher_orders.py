"""Derivatives of third and higher order.

Kernels compute the first two orders, and PyTorch operations compute all others. If a double backward runs with
``create_graph=True``, a third derivative may follow. The double backward then recomputes its results from the op's
reference implementation in PyTorch, whose graph can be differentiated to any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Operands = Sequence[Tensor | None]


def gradients(function: Callable[..., Tensor]) -> Callable[..., list[Tensor | None]]:
    """Return the backward of ``function``. It takes the gradient of the result and the operands of ``function``."""

    def backward(grad: Tensor, *operands: Tensor | None) -> list[Tensor | None]:
        return differentiate([function(*operands)], [grad], operands)

    return backward


def double_backward(
    backward: Callable[..., Sequence[Tensor | None]], operands: Operands, grads: Operands
) -> list[Tensor | None]:
    """Differentiate a backward with respect to its operands; the result is differentiable to any order.

    Args:
        backward: a backward written in PyTorch operations.
        operands: the arguments of ``backward``. Operands that require no gradient get None.
        grads: the gradients of its results, None for a result without one.

    Returns:
        One gradient per operand.
    """
    # One operand may have been computed from another. Views keep their gradients apart.
    apart = [t.view_as(t) if t is not None and t.requires_grad else t for t in operands]
    return differentiate(backward(*apart), grads, apart)


def differentiate(outputs: Operands, grads: Operands, inputs: Operands) -> list[Tensor | None]:
    """Call ``torch.autograd.grad`` with ``create_graph=True`` and return None for inputs without a gradient."""
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
