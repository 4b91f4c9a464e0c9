"""A convolution of kernel size 1 as matrix products, which on a CPU are the faster way to the same sums.

oneDNN's convolution first brings its operands into an order of its own, which costs more than these products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan.ops.conv.geometry import Geometry
from fastgan.ops.conv.native_kernels import in_order, new_images
from fastgan.ops.library import is_batched, is_eager


def takes(images: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """``images`` is the input, or the gradient of the output."""
    ones, zeros = (1,) * (weight.ndim - 2), (0,) * (weight.ndim - 2)
    return (
        weight.shape[2:] == ones
        and is_eager(images)
        and is_eager(weight)
        and not is_batched(images)
        and images.device.type == "cpu"
        and images.dtype == weight.dtype
        and images.dtype in (torch.float32, torch.float64)
        and geometry == Geometry(ones, zeros, ones, False, zeros, 1, ours=True)
        and in_order(images)  # of channels_last oneDNN has nothing to bring into order
        and weight.stride(-1) == 1
        and _as_exact_as_convolutions()
    )


def _as_exact_as_convolutions() -> bool:
    """Not where autocast, or what torch.set_float32_matmul_precision says, would round the products' operands."""
    if torch.is_autocast_enabled("cpu"):
        return False
    if hasattr(torch._C, "_get_fp32_precision_getter"):  # since PyTorch 2.9; what is there for 2.8 may raise
        return torch._C._get_fp32_precision_getter("mkldnn", "matmul") in ("none", "ieee")
    return torch.get_float32_matmul_precision() == "highest"


# Results are made whole and filled: a Function that returned a view would refuse an activation in place behind it.


def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(N, C_in, *S), (C_out, C_in, 1, ..) -> (N, C_out, *S)."""
    output = new_images(input, (len(input), len(weight), *input.shape[2:]))
    matrices, images, out = weight.flatten(1).expand(len(input), -1, -1), input.flatten(2), output.flatten(2)
    if bias is None:
        torch.bmm(matrices, images, out=out)
    else:
        torch.baddbmm(bias[:, None], matrices, images, out=out)
    return output


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """(N, C_out, *S), (C_out, C_in, 1, ..) -> (N, C_in, *S)."""
    return forward(grad, weight.transpose(0, 1), None)


def weight_gradient(grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
    """(N, C_out, *S), (N, C_in, *S) -> (C_out, C_in, 1, ..), the sum of a product of each sample."""
    total = grad.new_empty(weight.shape)
    by, images, out = grad.flatten(2), input.flatten(2), total.flatten(1)
    (_, outputs, size), inputs = by.shape, images.shape[1]
    if outputs * inputs > (outputs + inputs) * size:  # a product is larger than what it is of: all samples in one
        torch.mm(by.transpose(0, 1).flatten(1), images.transpose(1, 2).flatten(0, 1), out=out)
    else:
        torch.sum(torch.bmm(by, images.transpose(1, 2)), 0, out=out)
    return total
