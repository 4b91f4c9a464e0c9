"""batch_norm in evaluation. It is affine in its input, so the double backward sends no gradient to the forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgan.ops.needed import needed


def scale_and_shift(
    mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Fold the running statistics and the parameters into x * scale + shift, with (C,) each."""
    scale = torch.rsqrt(variance + eps)
    scale = scale if weight is None else scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


def normalized(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Compute x (N, C, *) * scale (C,) + shift (C,) in the dtype of x."""
    y: Tensor = _Normalized.apply(x, scale, shift)  # type: ignore[no-untyped-call]
    return y


class _Normalized(torch.autograd.Function):
    piecewise_affine = True

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, scale)
        return torch.addcmul(_along(shift, x), x, _along(scale, x)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None
        x, scale = ctx.saved_tensors
        wanted = needed(ctx)
        others = [dim for dim in range(x.ndim) if dim != 1]
        by_x = (grad * _along(scale, x)).to(x.dtype) if wanted[0] else None
        by_scale = (grad.to(scale.dtype) * x).sum(others) if wanted[1] else None
        by_shift = grad.sum(others, dtype=scale.dtype) if wanted[2] else None
        return by_x, by_scale, by_shift


def _along(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.ndim - 2))
