"""PReLU: linear in its input for fixed signs, with a gradient for its weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan.ops.library import is_autocast
from fastgan.ops.needed import needed
from fastgan.ops.piecewise.autograd import is_eligible

aten: Any = torch.ops.aten


def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """``F.prelu`` with the same arguments, results and errors, differentiable to any order."""
    plain = is_eligible(input) and type(weight) in (Tensor, torch.nn.Parameter) and weight.ndim < 2
    channels = input.shape[1] if plain and input.ndim > 1 else 1
    if not plain or weight.numel() not in (1, channels):
        return F.prelu(input, weight)
    of_input, of_weight = _autocast(input), _autocast(weight)
    if of_input.dtype != of_weight.dtype:
        return F.prelu(input, weight)
    shape = [1] * input.ndim
    if input.ndim > 1:
        shape[1] = weight.numel()
    result: Tensor = _PReLU.apply(of_input, of_weight.reshape(shape))  # type: ignore[no-untyped-call]
    return result


def _autocast(tensor: Tensor) -> Tensor:
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not is_autocast(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


class _PReLU(torch.autograd.Function):
    """Save the input only if the weight requires a gradient, otherwise one byte per element."""

    piecewise_affine = True
    fills_zeros = (0,)

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input if ctx.needs_input_grad[1] else input > 0, weight)
        return aten._prelu_kernel(input, weight)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        wanted = needed(ctx)
        if grad is None or not any(wanted):
            return None, None
        kept, weight = ctx.saved_tensors
        if not torch.is_grad_enabled() and all(wanted):
            by_input, products = aten._prelu_kernel_backward(grad, kept, weight)
            return by_input, products.sum_to_size(weight.shape)
        # Written with PyTorch operators, none of which differentiates through the signs.
        positive = kept if kept.dtype == torch.bool else kept.detach() > 0
        by_input = torch.where(positive, grad, grad * weight) if wanted[0] else None
        by_weight = torch.where(positive, 0, grad * kept).sum_to_size(weight.shape) if wanted[1] else None
        return by_input, by_weight


ROUTES: dict[Any, Any] = dict.fromkeys((F.prelu, torch.prelu, Tensor.prelu), prelu)
