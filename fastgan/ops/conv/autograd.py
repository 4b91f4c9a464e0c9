"""Convolution whose double backward forms what was asked for and nothing else.

The convolutions are the vendor's. PyTorch's own double backward returns a gradient for the input even where there is
none (dense zeros, which then run back through the whole forward): two of the six forwards' work of a penalty.

With y = W * x, and the gradients dx = W^T * dy, dW = x (*) dy, db = sum dy, and H, K, k those of dx, dW, db:
    by dy: W * H + K * x + k        by x: K^T * dy        by W: H (*) dy
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgan.ops.inputs_only import markable, needed
from fastgan.ops.library import last_order

_MESSAGE = "convolution: the third derivative is not supported; torch.nn.functional has every order"


class Geometry(NamedTuple):
    """How a convolution slides, as ``aten::convolution`` takes it."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


Mask = tuple[bool, bool, bool]


def convolve(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    output: Tensor = _Convolution.apply(input, weight, bias, geometry)
    return output


def _forward(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    output: Tensor = torch.ops.aten.convolution(input, weight, bias, *geometry)
    return output


def _backward(
    grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry, mask: Mask
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if not any(mask):
        return None, None, None
    channels = grad.shape[1]
    grads = torch.ops.aten.convolution_backward(grad, input, weight, [channels], *geometry, mask)
    return grads[0], grads[1], grads[2]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight)
        ctx.geometry = geometry
        markable(ctx)
        return _forward(input, weight, bias, geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        input, weight = ctx.saved_tensors
        run = _ConvolutionBackward.apply if torch.is_grad_enabled() else _backward
        mask = needed(ctx)
        return *run(grad, input, weight, ctx.geometry, (mask[0], mask[1], mask[2])), None


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
