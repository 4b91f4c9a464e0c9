"""The operator of filtered_lrelu and its derivatives, which run the same steps with slopes instead of the activation.

y = D act(U (x + bias)). With the slopes S, the backward is U^T S D^T. The backward of that is D S U, and so on.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops.filtered_lrelu import native_kernels
from fastgan.ops.library import accumulation_dtype, is_eager, operator, stored, traced
from fastgan.ops.upfirdn2d.autograd import DTYPES, run
from fastgan.ops.upfirdn2d.plan import Plan, Taps, memory_format

backends.register("filtered_lrelu", dict.fromkeys(("reference", "cpu", "triton"), DTYPES))


def _kernel(*arguments: Any) -> None:
    native_kernels.filtered_lrelu(*arguments)


def _activated(*arguments: Any) -> None:
    from fastgan.ops.filtered_lrelu import triton_kernels  # Triton is optional

    triton_kernels.activated(*arguments)


# A forward writes the bits, a backward reads them.
for _name, _b, _c in (("", "(b!)", "(c!)"), ("_read", "", "")):
    operator(
        f"filtered_lrelu{_name}(Tensor x, Tensor? bias, Tensor(a!) y, Tensor{_b}? signs, Tensor{_c}? inside, bool read,"
        " int[] sizes, bool separable, float[] taps, int[] second_sizes, bool second_separable, float[] second_taps,"
        " float slope, float gain, float clamp)"
    )(_kernel)
    operator(
        f"filtered_lrelu_activated{_name}(Tensor x, Tensor? bias, Tensor(a!) z, Tensor{_b}? bits, bool read,"
        " int[] sizes, bool separable, float[] taps, float slope, float gain, float clamp)"
    )(_activated)


class Steps(NamedTuple):
    up: Plan
    down: Plan
    slope: float
    gain: float
    clamp: float

    def transposed(self) -> Steps:
        return self._replace(up=self.down.transposed(), down=self.up.transposed())


def apply(x: Tensor, bias: Tensor | None, steps: Steps) -> Tensor:
    """Compute the result for x (N, C, H, W) and a bias (C,), differentiable to any order."""
    if not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))):
        return _run(x, bias, None, None, False, steps)
    result: Tensor = _FilteredLrelu.apply(x, bias, steps)
    return result


def _run(
    x: Tensor, bias: Tensor | None, signs: Tensor | None, inside: Tensor | None, read: bool, steps: Steps
) -> Tensor:
    x = stored(x)
    if bias is not None:
        bias = stored(bias).to(accumulation_dtype(x.dtype)).contiguous()
    if steps.up.backend == "triton":
        y = _run_triton(x.contiguous(), bias, signs, read, steps)
    else:
        y = _run_native(x.contiguous(), bias, signs, inside, read, steps)
    return y.contiguous(memory_format=memory_format(x))


def _run_native(
    x: Tensor, bias: Tensor | None, signs: Tensor | None, inside: Tensor | None, read: bool, steps: Steps
) -> Tensor:
    y = torch.empty((*x.shape[:2], *steps.down.out_size), dtype=x.dtype, device=x.device)
    planes = x.shape[0] * x.shape[1]
    parts: list[Any] = []
    for plan in (steps.up, steps.down):
        taps = plan.taps
        assert isinstance(taps, Taps)
        pairs: Sequence[int] = (*plan.in_size, *plan.out_size, *plan.up, *plan.down, *plan.start, *taps.shape)
        parts += [(planes, 1, *pairs), taps.separable, taps.values]
    kernel: Any = _kernel if is_eager(x) else traced("filtered_lrelu_read" if read else "filtered_lrelu")
    kernel(x, bias, y, signs, inside, read, *parts, steps.slope, steps.gain, steps.clamp)
    return y


def _run_triton(x: Tensor, bias: Tensor | None, bits: Tensor | None, read: bool, steps: Steps) -> Tensor:
    plan = steps.up
    taps = plan.taps
    assert isinstance(taps, Taps)
    z = torch.empty((*x.shape[:2], *plan.out_size), dtype=x.dtype, device=x.device)
    pairs = (*plan.in_size, *plan.out_size, *plan.up, *plan.down, *plan.start, *taps.shape)
    kernel: Any = (
        _activated if is_eager(x) else traced("filtered_lrelu_activated_read" if read else "filtered_lrelu_activated")
    )
    sizes = (x.shape[0] * x.shape[1], 1, *pairs)
    kernel(x, bias, z, bits, read, sizes, taps.separable, taps.values, steps.slope, steps.gain, steps.clamp)
    return run(z, steps.down)


def _empty_bits(x: Tensor, steps: Steps) -> tuple[Tensor, Tensor | None]:
    """The saved bits: the signs, and which elements are not clamped. Triton's kernel stores both in one tensor."""
    planes, (h, w) = x.shape[0] * x.shape[1], steps.up.out_size
    if steps.up.backend == "triton":
        from fastgan.ops.filtered_lrelu.triton_kernels import size_of_bits

        return torch.empty(size_of_bits(planes, h, w), dtype=torch.uint8, device=x.device), None
    signs = torch.empty(planes * h * ((w + 7) // 8), dtype=torch.uint8, device=x.device)  # each row in whole bytes
    return signs, torch.empty_like(signs) if steps.clamp != inf else None


class _FilteredLrelu(torch.autograd.Function):
    piecewise_affine = True

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, steps: Steps) -> Tensor:
        signs, inside = _empty_bits(x, steps)
        y = _run(x, bias, signs, inside, False, steps)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(signs, inside)
        ctx.steps = steps
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        signs, inside = ctx.saved_tensors
        by_x = _times_slopes(grad, signs, inside, ctx.steps.transposed())
        by_bias = None
        if by_x is not None and ctx.needs_input_grad[1]:
            by_bias = by_x.sum((0, 2, 3), dtype=accumulation_dtype(by_x.dtype)).to(ctx.bias_dtype)
        return by_x, by_bias, None


def _times_slopes(grad: Tensor | None, signs: Tensor, inside: Tensor | None, steps: Steps) -> Tensor | None:
    if grad is None:
        return None
    if not torch.is_grad_enabled():
        return _run(grad, None, signs, inside, True, steps)
    result: Tensor = _Slopes.apply(grad, signs, inside, steps)
    return result


class _Slopes(torch.autograd.Function):
    """The linear map of the derivative, with fixed slopes. Its backward is its transpose."""

    piecewise_affine = True

    @staticmethod
    def forward(ctx: Any, x: Tensor, signs: Tensor, inside: Tensor | None, steps: Steps) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(signs, inside)
        ctx.steps = steps
        return _run(x, None, signs, inside, True, steps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        signs, inside = ctx.saved_tensors
        return _times_slopes(grad, signs, inside, ctx.steps.transposed()), None, None, None
