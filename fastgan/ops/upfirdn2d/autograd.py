"""The operator of upfirdn2d, its implementation on each backend, and its derivative, which is upfirdn2d again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops.library import accumulation_dtype, is_batched, is_eager, operator, stored, traced
from fastgan.ops.upfirdn2d import convolutions, native_kernels, reference
from fastgan.ops.upfirdn2d.plan import Plan, Taps, is_channels_last, memory_format

CONVOLUTIONS = "convolutions"  # a plan's backend, where only the reference can run and was not requested
DTYPES = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})
backends.register("upfirdn2d", dict.fromkeys(("reference", "cpu", "triton"), DTYPES))


# sizes: planes, inner, height, width, height and width of the result, then up, down, start and taps as (y, x) pairs.
# Contiguous input has N * C planes and inner 1. channels_last input has N planes and inner C.
@operator("upfirdn2d(Tensor x, Tensor(a!) y, int[] sizes, bool separable, float[] taps, str backend)")
def _kernel(x: Tensor, y: Tensor, sizes: Sequence[int], separable: bool, taps: Sequence[float], backend: str) -> None:
    if backend == "triton":
        from fastgan.ops.upfirdn2d import triton_kernels  # Triton is optional

        triton_kernels.upfirdn2d(x, y, sizes, separable, taps)
    else:
        native_kernels.upfirdn2d(x, y, sizes, separable, taps)


def apply(x: Tensor, plan: Plan) -> Tensor:
    """Compute the result, differentiable to any order."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return run(x, plan)
    result: Tensor = _Upfirdn2d.apply(x, plan)
    return result


def run(x: Tensor, plan: Plan) -> Tensor:
    taps = plan.taps
    if plan.backend in ("reference", CONVOLUTIONS) or not isinstance(taps, Taps) or is_batched(x) or x.numel() == 0:
        plane = taps.plane(accumulation_dtype(x.dtype), x.device) if isinstance(taps, Taps) else taps
        compute = convolutions.upfirdn2d if plan.backend == CONVOLUTIONS and x.numel() else reference.upfirdn2d
        return compute(x, plane, plan.up, plan.down, plan.start, plan.out_size)
    x = stored(x).contiguous(memory_format=memory_format(x))
    n, c = x.shape[:2]
    y = torch.empty((n, c, *plan.out_size), dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    planes = (n, c) if is_channels_last(x) else (n * c, 1)
    sizes = (*planes, *plan.in_size, *plan.out_size, *plan.up, *plan.down, *plan.start, *taps.shape)
    kernel: Any = _kernel if is_eager(x) else traced("upfirdn2d")
    kernel(x, y, sizes, taps.separable, taps.values, plan.backend)
    return y


class _Upfirdn2d(torch.autograd.Function):
    piecewise_affine = True

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Plan) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        return run(x, plan)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        # Without create_graph the backward needs no graph of its own.
        return (None if grad is None else apply(grad, ctx.plan.transposed())), None
