"""ReLU and leaky ReLU for small inputs, where a kernel call costs more than the work itself, and without kernels.

Each order is one PyTorch operator. As with the kernels, and unlike with PyTorch's formulas, no gradient flows to the
input through the slopes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan import backends
from fastgan.ops.filled import mark_base
from fastgan.torch_private import apply

# Elements from which a kernel is used. In a penalty, ReLU's are faster from 2**15 (AMD, Zen 5) or 2**20 (Intel) on.
_LEAST = 2**17
LEAST_SMOOTH = 2**14
_leaky_relu_backward: Any = torch.ops.aten.leaky_relu_backward.default
_relu_backward: Any = torch.ops.aten.threshold_backward.default


def is_small(x: Tensor, least: int = _LEAST) -> bool:
    """Return whether PyTorch's operators are faster than kernels and no backend was requested."""
    if backends.is_lowered():
        return True  # compilers fuse them
    few = x.is_meta or (x.numel() < least and x.is_cpu)  # meta tensors have no data for kernels to read
    return few and backends.is_plain() and not backends.is_forced()


def is_for_pytorch(x: Tensor) -> bool:
    """Return whether ReLU runs PyTorch's operators: because it is small, or because there is no kernel."""
    if is_small(x):
        return True
    return not (backends.has_kernel("bias_act", x.device, x.dtype) or backends.is_forced()) and backends.is_plain()


def rectify(x: Tensor, slope: float | None, inplace: bool) -> Tensor:
    """Apply leaky_relu with a slope of at least 0, or relu if the slope is None."""
    if not x.requires_grad:
        return _forward(x, slope, inplace)
    result: Tensor = apply(_Rectify, x, slope, inplace)
    if inplace:
        mark_base(x)
    return result


def _forward(x: Tensor, slope: float | None, inplace: bool) -> Tensor:
    return F.relu(x, inplace) if slope is None else F.leaky_relu(x, slope, inplace)


def _times_slopes(g: Tensor, kept: Tensor, slope: float | None, is_result: bool) -> Tensor:
    if slope is None:
        return _relu_backward(g, kept, 0)  # type: ignore[no-any-return]
    return _leaky_relu_backward(g, kept, slope, is_result)  # type: ignore[no-any-return]


def _multiply(g: Tensor, kept: Tensor, slope: float | None, is_result: bool) -> Tensor:
    if not torch.is_grad_enabled():
        return _times_slopes(g, kept, slope, is_result)
    result: Tensor = apply(_Slopes, g, kept, slope, is_result)
    return result


class _Rectify(torch.autograd.Function):
    piecewise_affine = True
    fills_zeros = (0,)

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float | None, inplace: bool) -> Tensor:
        if inplace:
            ctx.mark_dirty(x)
        y = _forward(x, slope, inplace)
        # Save what PyTorch saves, so that the same tensors may be overwritten afterwards.
        ctx.is_result = inplace or slope is None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y if ctx.is_result else x)
        ctx.slope = slope
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, None, None]:
        if dy is None:
            return None, None, None
        return _multiply(dy, ctx.saved_tensors[0].detach(), ctx.slope, ctx.is_result), None, None


class _Slopes(torch.autograd.Function):
    """Multiply g by the slopes. The map is linear in g and is its own transpose."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, kept: Tensor, slope: float | None, is_result: bool) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(kept)
        ctx.slope, ctx.is_result = slope, is_result
        return _times_slopes(g, kept, slope, is_result)

    @staticmethod
    def backward(ctx: Any, h: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if h is None:
            return None, None, None, None
        return _multiply(h, ctx.saved_tensors[0], ctx.slope, ctx.is_result), None, None, None
