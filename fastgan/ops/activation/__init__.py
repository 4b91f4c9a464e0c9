"""relu and leaky_relu: piecewise linear, so that their second derivative is nothing at all, not zeros."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["leaky_relu", "relu"]


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """``torch.nn.functional.leaky_relu``: same arguments, results and errors.

    Keeps its output for backward, which a following convolution keeps anyway. No gradient flows to ``input`` through
    the slopes, where PyTorch sends zeros. Differentiable to any order.

    Args:
        input: any shape, floating.
        negative_slope: of the negative half; below 0, PyTorch's own runs.
        inplace: write over ``input``.
    """
    if not input.is_floating_point() or negative_slope < 0:
        return F.leaky_relu(input, negative_slope, inplace)
    output: Tensor = _LeakyRelu.apply(input, float(negative_slope), inplace)  # type: ignore[no-untyped-call]
    return output


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """``torch.nn.functional.relu``, as `leaky_relu` with slope 0.

    Args:
        input: any shape, floating.
        inplace: write over ``input``.
    """
    return leaky_relu(input, 0.0, inplace) if input.is_floating_point() else F.relu(input, inplace)


class _LeakyRelu(torch.autograd.Function):
    piecewise_affine = True

    @staticmethod
    def forward(ctx: Any, input: Tensor, slope: float, inplace: bool) -> Tensor:
        if inplace:
            ctx.mark_dirty(input)
            output = F.leaky_relu_(input, slope) if slope else input.relu_()
        else:
            output = F.leaky_relu(input, slope) if slope else input.relu()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output)
        ctx.slope = slope
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None]:
        (output,) = ctx.saved_tensors
        return _through(grad, output, ctx.slope), None, None


class _Slopes(torch.autograd.Function):
    """grad where output > 0, slope * grad elsewhere: linear in grad, constant in output, its own backward."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, output: Tensor, slope: float) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output)
        ctx.slope = slope
        return _slopes(grad, output, slope)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None]:
        (output,) = ctx.saved_tensors
        return _through(grad, output, ctx.slope), None, None


def _through(grad: Tensor | None, output: Tensor, slope: float) -> Tensor | None:
    if grad is None:
        return None
    if not torch.is_grad_enabled():
        return _slopes(grad, output, slope)
    passed: Tensor = _Slopes.apply(grad, output.detach(), slope)  # type: ignore[no-untyped-call]
    return passed


def _slopes(grad: Tensor, output: Tensor, slope: float) -> Tensor:
    if slope == 0:
        return torch.ops.aten.threshold_backward(grad, output, 0)  # type: ignore[no-any-return]
    return torch.ops.aten.leaky_relu_backward(grad, output, slope, True)  # type: ignore[no-any-return]
