"""fastgan's operations under the signatures of rosinality's stylegan2-pytorch, which BasicSR shares."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastgan import ops
from fastgan.drop_in.zeros import fill_zero_grads


def upfirdn2d(input: Tensor, kernel: Tensor, up: Any = 1, down: Any = 1, pad: Any = (0, 0)) -> Tensor:
    """If ``pad`` has two numbers, they are the padding before and after the image, in both directions."""
    return ops.upfirdn2d(input, kernel, up, down, (*pad, *pad) if len(pad) == 2 else pad)


def fused_leaky_relu(
    input: Tensor, bias: Tensor | None = None, negative_slope: float = 0.2, scale: float = 2**0.5
) -> Tensor:
    bias = None if bias is None else bias.to(input.dtype)
    return fill_zero_grads(ops.bias_act(input, bias, negative_slope=float(negative_slope), gain=float(scale)))
