"""Convolution whose double backward forms what was asked for and nothing else.

The convolutions are the vendor's, but for its slowest on a CPU: kernels of ours compute the gradient of an input of few
channels, convolutions with steps, those of one pixel, and the weight's gradient of few pixels.

With y = W * x, and the gradients dx = W^T * dy, dW = x (*) dy, db = sum dy, and H, K, k those of dx, dW, db:
    by dy: W * H + K * x + k        by x: K^T * dy        by W: H (*) dy
Where dx alone is asked for, as a penalty's first pass does, x is in none of these: it is not kept, and no path leads
from the penalty back into the forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgan.ops.conv import native_kernels, pointwise, strided, weight_gradient
from fastgan.ops.conv.geometry import Geometry
from fastgan.ops.library import last_order, stored
from fastgan.ops.needed import needed

_MESSAGE = "convolution: the third derivative is not supported; torch.nn.functional has every order"


Mask = tuple[bool, bool, bool]


def convolve(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    output: Tensor = _Convolution.apply(input, weight, bias, geometry)
    return output


def _forward(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    for way in (pointwise, strided):
        if way.takes_forward(input, weight, geometry) and native_kernels.fits(input, weight, bias):
            own_bias = None if bias is None else stored(bias)
            output: Tensor = way.forward(stored(input), stored(weight), own_bias, geometry)
            return output
    return torch.convolution(input, weight, bias, *geometry.arguments)


def _backward(
    grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry, mask: Mask
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    by_input = by_weight = by_bias = None
    for way in (native_kernels, strided, pointwise) if mask[0] else ():
        if way.takes(grad, input, weight, geometry):
            by_input = way.input_gradient(stored(grad), input.shape, stored(weight), geometry)
            break
    if mask[1] and weight_gradient.takes(grad, input, weight, geometry):
        by_weight = weight_gradient.weight_gradient(stored(grad), stored(input), weight, geometry)
    left = mask[0] and by_input is None, mask[1] and by_weight is None
    if mask[2] and not left[1]:  # oneDNN forms it with the weight's gradient, asked for or not
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


class _Convolution(torch.autograd.Function):
    piecewise_affine = True

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight)
        ctx.geometry = geometry
        ctx.bias_for_term = ctx.bias_term = None  # given a bias, the backward leaves <grad_i, bias> of each sample
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
            grads = _InputGradient.apply(grad, weight, ctx.bias_for_term, input.detach(), ctx.geometry)
            ctx.bias_term = grads[1]
            return grads[0], None, None, None
        return *_ConvolutionBackward.apply(grad, input, weight, ctx.geometry, mask), None


class _InputGradient(torch.autograd.Function):
    """dx, linear in ``grad`` and in ``weight``; and, if there is a bias, the sums <grad_i, bias> of each sample.

    ``input`` tells its shape and is not kept.
    """

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, weight: Tensor, bias: Tensor | None, input: Tensor, geometry: Geometry
    ) -> tuple[Tensor | None, Tensor | None]:
        sums = term = None
        if bias is not None:
            sums = grad.flatten(2).sum(2, dtype=torch.promote_types(grad.dtype, torch.float32))  # (N, C_out)
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
        with torch.no_grad():
            if h is not None and wanted[1]:
                by_weight = _backward(grad, h, weight, ctx.geometry, (False, True, False))[1]
            if h is not None and wanted[0]:
                by_grad = _forward(h, weight, None, ctx.geometry)
            if c is not None and wanted[0]:
                biases = (c[:, None] * bias).to(grad.dtype).view(*sums.shape, *[1] * (grad.ndim - 2))
                by_grad = biases.expand_as(grad) if by_grad is None else by_grad.add_(biases)
            if c is not None and wanted[2]:
                by_bias = (c[:, None] * sums).sum(0)  # (C_out,)
        results = [by_grad, by_weight, by_bias]
        if torch.is_grad_enabled():
            results = last_order(_MESSAGE, results, [h, c, grad, weight, bias])
        return *results, None, None


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
        ctx: Any, by_input: Tensor | None, by_weight: Tensor | None, by_bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        grad, input, weight = ctx.saved_tensors
        with torch.no_grad():
            results = _double_backward(
                by_input, by_weight, by_bias, grad, input, weight, ctx.geometry, ctx.needs_input_grad[:3]
            )
        if torch.is_grad_enabled():
            results = last_order(_MESSAGE, results, [by_input, by_weight, by_bias, grad, input, weight])
        return *results, None, None


def _double_backward(
    h_input: Tensor | None,
    h_weight: Tensor | None,
    h_bias: Tensor | None,
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: Geometry,
    wanted: Mask,
) -> list[Tensor | None]:
    by_grad: Tensor | None = None
    by_input: Tensor | None = None
    by_weight: Tensor | None = None
    if wanted[0]:
        if h_input is not None:
            by_grad = _forward(h_input, weight, h_bias, geometry)
        elif h_bias is not None:
            by_grad = h_bias.view(1, -1, *[1] * (grad.ndim - 2)).expand_as(grad)
        if h_weight is not None:
            through_weight = _forward(input, h_weight, None, geometry)
            by_grad = through_weight if by_grad is None else by_grad + through_weight
    if wanted[1] and h_weight is not None:
        by_input = _backward(grad, input, h_weight, geometry, (True, False, False))[0]
    if wanted[2] and h_input is not None:
        by_weight = _backward(grad, h_input, weight, geometry, (False, True, False))[1]
    return [by_grad, by_input, by_weight]
