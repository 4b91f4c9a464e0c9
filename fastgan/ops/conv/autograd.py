"""Convolution whose double backward computes only the requested gradients.

The vendor's library computes the convolutions, except for its slowest cases on a CPU. fastgan's kernels compute the
gradient of an input with few channels, strided convolutions, 1x1 convolutions, and the weight gradient of outputs with
few pixels and of wide kernels. A graph of torch.compile has PyTorch's operations instead (compiled.py).

Let y = W * x, with gradients dx = W^T * dy, dW = x (*) dy and db = sum dy. Let H, K and k be the gradients of dx, dW
and db. Then the double backward is
    by dy: W * H + K * x + k        by x: K^T * dy        by W: H (*) dy
If only dx is requested, as in the first pass of a penalty, none of these terms contains x. It is not saved, and no path
of the graph leads from the penalty back into the forward.

Each term is again one of the three bilinear maps y, dx and dW. A backward with ``create_graph=True`` calls the
Functions below, and any other backward calls the maps directly. So every order of derivative exists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgan.ops.conv import compiled, native_kernels, pointwise, strided, weight_gradient
from fastgan.ops.conv.geometry import Geometry
from fastgan.ops.library import stored
from fastgan.ops.needed import needed
from fastgan.torch_private import FunctionalTensor, apply

Mask = tuple[bool, bool, bool]


def convolve(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    output: Tensor = apply(_Convolution, input, weight, bias, geometry)
    return output


def _forward(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    for way in (pointwise, strided) if input.is_cpu else ():
        if way.is_fastest_forward(input, weight, geometry) and native_kernels.fits(input, weight, bias):
            own_bias = None if bias is None else stored(bias)
            output: Tensor = way.forward(stored(input), stored(weight), own_bias, geometry)
            return output
    return torch.convolution(input, weight, bias, *geometry.arguments)


def _backward(
    grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry, mask: Mask
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    by_input = by_weight = by_bias = None
    if isinstance(grad, FunctionalTensor):
        by_weight = compiled.weight_gradient(grad, input, weight.shape, geometry) if mask[1] else None
        both = mask[1] and by_weight is None
        if mask[0] and not (both and max(geometry.stride) == 1):
            by_input = compiled.input_gradient(grad, input.shape, weight, geometry)
    elif grad.is_cpu:
        for way in (native_kernels, strided, pointwise) if mask[0] else ():
            if way.is_fastest(grad, input, weight, geometry):
                by_input = way.input_gradient(stored(grad), input.shape, stored(weight), geometry)
                break
        if mask[1] and weight_gradient.is_fastest(grad, input, weight, geometry):
            by_weight = weight_gradient.weight_gradient(stored(grad), stored(input), weight, geometry)
    else:
        vendors = torch.ops.aten.convolution_backward(grad, input, weight, [grad.shape[1]], *geometry.arguments, mask)
        return vendors[0], vendors[1], vendors[2]
    left = mask[0] and by_input is None, mask[1] and by_weight is None
    if mask[2] and not left[1]:  # the vendor computes it with the weight gradient in any case
        by_bias = grad.sum([0, *range(2, grad.ndim)])
    if not any(left):
        return by_input, by_weight, by_bias
    rest = *left, mask[2] and by_bias is None
    vendors = torch.ops.aten.convolution_backward(grad, input, weight, [grad.shape[1]], *geometry.arguments, rest)
    return (
        by_input if by_input is not None else vendors[0],
        by_weight if by_weight is not None else vendors[1],
        by_bias if by_bias is not None else vendors[2],
    )


def _convolve(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    return (convolve if torch.is_grad_enabled() else _forward)(input, weight, bias, geometry)


def _by_input(grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry) -> Tensor | None:
    """Compute dx. Only the shape of ``input`` is used."""
    if not torch.is_grad_enabled():
        return _backward(grad, input, weight, geometry, (True, False, False))[0]
    by_input: Tensor | None = apply(_InputGradient, grad, weight, None, input.detach(), geometry)[0]
    return by_input


def _by_weight(grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry) -> Tensor | None:
    """Compute dW. Only the shape of ``weight`` is used."""
    if not torch.is_grad_enabled():
        return _backward(grad, input, weight, geometry, (False, True, False))[1]
    by_weight: Tensor | None = apply(_WeightGradient, grad, input, weight.detach(), geometry)
    return by_weight


class _Convolution(torch.autograd.Function):
    piecewise_affine = True

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight)
        ctx.geometry = geometry
        # If bias_for_term is set, the backward stores <grad_i, bias> of each sample i in bias_term.
        ctx.bias_for_term = ctx.bias_term = None
        return _forward(input, weight, bias, geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        input, weight = ctx.saved_tensors
        wanted = needed(ctx)
        mask = wanted[0], wanted[1], wanted[2]
        if not torch.is_grad_enabled():
            return *_backward(grad, input, weight, ctx.geometry, mask), None
        if mask == (True, False, False):
            grads = apply(_InputGradient, grad, weight, ctx.bias_for_term, input.detach(), ctx.geometry)
            ctx.bias_term = grads[1]
            return grads[0], None, None, None
        return *apply(_ConvolutionBackward, grad, input, weight, ctx.geometry, mask), None


class _InputGradient(torch.autograd.Function):
    """dx, which is linear in ``grad`` and in ``weight``, and, with a bias, <grad_i, bias> of each sample i.

    Only the shape of ``input`` is used, and ``input`` is not saved.
    """

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, weight: Tensor, bias: Tensor | None, input: Tensor, geometry: Geometry
    ) -> tuple[Tensor | None, Tensor | None]:
        sums = term = None
        if bias is not None:
            sums = _sums(grad)
            term = (sums * bias).sum(1)  # (N,)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, weight, bias, sums)
        ctx.geometry = geometry
        return _backward(grad, input, weight, geometry, (True, False, False))[0], term

    @staticmethod
    def backward(ctx: Any, h: Tensor | None, c: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, weight, bias, sums = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        by_grad = by_weight = by_bias = None
        if h is not None and wanted[1]:
            by_weight = _by_weight(grad, h, weight, ctx.geometry)
        if h is not None and wanted[0]:
            by_grad = _convolve(h, weight, None, ctx.geometry)
        if c is not None and wanted[0]:
            biases = (c[:, None] * bias).to(grad.dtype).view(*sums.shape, *[1] * (grad.ndim - 2))
            by_grad = _plus(by_grad, biases.expand_as(grad))
        if c is not None and wanted[2]:
            sums = _sums(grad) if torch.is_grad_enabled() else sums  # the saved sums have no graph
            by_bias = (c[:, None] * sums).sum(0)  # (C_out,)
        return by_grad, by_weight, by_bias, None, None


def _sums(grad: Tensor) -> Tensor:
    """Sum over all positions: (N, C_out)."""
    return grad.flatten(2).sum(2, dtype=torch.promote_types(grad.dtype, torch.float32))


def _plus(sum: Tensor | None, term: Tensor) -> Tensor:
    if sum is None:
        return term
    return sum + term if torch.is_grad_enabled() else sum.add_(term)


class _WeightGradient(torch.autograd.Function):
    """dW, which is linear in ``grad`` and in ``input``. Only the shape of ``weight`` is used."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry) -> Tensor | None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, input)
        ctx.geometry = geometry
        return _backward(grad, input, weight, geometry, (False, True, False))[1]

    @staticmethod
    def backward(ctx: Any, h: Tensor | None) -> tuple[Tensor | None, ...]:
        if h is None:
            return None, None, None, None
        grad, input = ctx.saved_tensors
        by_grad = _convolve(input, h, None, ctx.geometry) if ctx.needs_input_grad[0] else None
        by_input = _by_input(grad, input, h, ctx.geometry) if ctx.needs_input_grad[1] else None
        return by_grad, by_input, None, None


class _ConvolutionBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry, mask: Mask
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, input, weight)
        ctx.geometry = geometry
        return _backward(grad, input, weight, geometry, mask)

    @staticmethod
    def backward(
        ctx: Any, h_input: Tensor | None, h_weight: Tensor | None, h_bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        grad, input, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        by_grad: Tensor | None = None
        by_input: Tensor | None = None
        by_weight: Tensor | None = None
        if wanted[0]:
            if h_input is not None:
                by_grad = _convolve(h_input, weight, h_bias, ctx.geometry)
            elif h_bias is not None:
                by_grad = h_bias.view(1, -1, *[1] * (grad.ndim - 2)).expand_as(grad)
            if h_weight is not None:
                through_weight = _convolve(input, h_weight, None, ctx.geometry)
                by_grad = through_weight if by_grad is None else by_grad + through_weight
        if wanted[1] and h_weight is not None:
            by_input = _by_input(grad, input, h_weight, ctx.geometry)
        if wanted[2] and h_input is not None:
            by_weight = _by_weight(grad, h_input, weight, ctx.geometry)
        return by_grad, by_input, by_weight, None, None
