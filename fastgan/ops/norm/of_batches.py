"""Normalization by the statistics of a batch, in the graph of a compiled penalty.

PyTorch's second derivative of batch norm reads the number of samples as a Python number, so a graph with it fits one
batch size only. This one is the same formula with sizes that may be symbols. All operators are PyTorch's own.

Per channel, with x_hat = (x - mean) r, r = 1 / sqrt(var + eps), <.> the mean over the channel, and w the weight:

    backward          dx = w r (dy - <dy> - c x_hat),  c = <dy x_hat>;  dweight = sum dy x_hat;  dbias = sum dy
    double backward   of h . dx + h_weight . dweight + h_bias . dbias, with d = <h x_hat>, q = <h dy> - <h> <dy> - c d:
        by_dy         w r (h - <h> - d x_hat) + h_weight x_hat + h_bias
        by_weight     n r q
        by_x          r (t - <t> - <t x_hat> x_hat) - w q r^2 x_hat,  t = (h_weight - w r d) dy - w r c h
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgan.ops.higher_orders import double_backward, gradients
from fastgan.ops.library import accumulation_dtype
from fastgan.ops.needed import needed
from fastgan.ops.norm import reference
from fastgan.ops.norm.layout import of_batch


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """Normalize each channel of (N, C, *) by the statistics of the batch, and update the running ones in place."""
    function: Any = _BatchNorm
    y: Tensor = function.apply(x, weight, bias, running_mean, running_var, momentum, eps)
    return y


def instance_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalize each channel of each sample of (N, C, *): a batch norm of one sample with N C channels."""
    samples, channels, *spatial = x.shape
    weights, biases = (None if values is None else values.repeat(samples) for values in (weight, bias))
    rows = x.contiguous().view(1, samples * channels, *spatial)
    return batch_norm(rows, None, None, weights, biases, 0.0, eps).view(x.shape)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        y, mean, r = torch.native_batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, mean, r)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = needed(ctx)[:3]
        function: Any = _BatchNormBackward
        grads = (None,) * 3 if dy is None else function.apply(dy, *ctx.saved_tensors, ctx.eps, wanted)
        return *grads, None, None, None, None


class _BatchNormBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, r: Tensor, eps: float, wanted: Any
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, x, weight, mean, r)
        ctx.eps = eps
        grads = torch.ops.aten.native_batch_norm_backward(dy, x, weight, None, None, mean, r, True, eps, list(wanted))
        return tuple(grad if needs else None for grad, needs in zip(grads, wanted, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, x, weight, mean, r = ctx.saved_tensors
        if torch.is_grad_enabled():
            by_dy, by_x, by_weight = _to_any_order(grads, dy, x, weight, ctx.eps)
        else:
            by_dy, by_x, by_weight = _double_backward(grads, dy, x, weight, mean, r)
        return by_dy, by_x, by_weight, None, None, None, None


def _double_backward(
    grads: tuple[Tensor | None, ...], dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, r: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    def along(values: Tensor) -> Tensor:
        return values.view(-1, *(1 for _ in x.shape[2:]))

    def averaged(values: Tensor) -> Tensor:
        return values.mean(dims, keepdim=True)

    dims, dtype = [0, *range(2, x.ndim)], accumulation_dtype(x.dtype)
    h, h_weight, h_bias = grads
    wide_dy, r = dy.to(dtype), along(r).to(dtype)
    x_hat = (x.to(dtype) - along(mean).to(dtype)) * r
    w = None if weight is None else along(weight).to(dtype)
    by_dy = by_x = by_weight = None
    if h is not None:
        wr = r if w is None else w * r
        wide_h = h.to(dtype)
        c, d, of_h, of_dy = averaged(wide_dy * x_hat), averaged(wide_h * x_hat), averaged(wide_h), averaged(wide_dy)
        q = averaged(wide_h * wide_dy) - of_h * of_dy - c * d
        by_dy = wr * (wide_h - of_h - d * x_hat)
        by_x = -wr * r * ((wide_dy - of_dy) * d + (wide_h - of_h) * c + (q - 2 * c * d) * x_hat)
        by_weight = None if w is None else ((x.numel() // x.shape[1]) * r * q).reshape(-1)
    if h_weight is not None:
        v = along(h_weight).to(dtype)
        by_dy = v * x_hat if by_dy is None else by_dy + v * x_hat
        of_v = v * r * (wide_dy - averaged(wide_dy) - averaged(wide_dy * x_hat) * x_hat)
        by_x = of_v if by_x is None else by_x + of_v
    if h_bias is not None:
        of_bias = along(h_bias).to(dtype).expand_as(x)
        by_dy = of_bias if by_dy is None else by_dy + of_bias
    return (
        None if by_dy is None else by_dy.to(dy.dtype),
        None if by_x is None else by_x.to(x.dtype),
        None if by_weight is None or weight is None else by_weight.to(weight.dtype),
    )


def _to_any_order(
    grads: tuple[Tensor | None, ...], dy: Tensor, x: Tensor, weight: Tensor | None, eps: float
) -> list[Tensor | None]:
    """Compute the double backward by operations that can be differentiated again."""

    def normalized(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return reference.normalized_rows(x, weight, bias, of_batch(x), eps)

    # The derivatives do not depend on the value of the bias.
    bias = None if grads[2] is None else torch.zeros_like(grads[2], requires_grad=True)
    return double_backward(gradients(normalized), [dy, x, weight, bias], grads)[:3]
