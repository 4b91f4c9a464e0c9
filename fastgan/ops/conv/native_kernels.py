"""Calls into fastgan._native for the gradient of an input with few channels, and checks shared by all conv kernels."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops.conv.geometry import Geometry
from fastgan.ops.library import is_batched, is_eager

_MOST_CHANNELS = 6  # input channels; the vendor's kernel is faster above this number (docs/decisions.md)
_LEAST = 4096  # elements; below this number a kernel call costs more than it saves


ONE_ROW = (1, 1, 1, 1, 0, 1)  # the entry of `plane_of` for a single row


def is_fastest(grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Return whether `input_gradient` is the fastest way to compute this gradient."""
    return (
        input.shape[1] <= _MOST_CHANNELS
        and are_plain(grad, weight, geometry)
        and 3 <= grad.ndim <= 4
        and grad.numel() >= _LEAST
    )


def are_plain(grad: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Return whether a kernel for contiguous float32 CPU tensors, without groups, can read these operands."""
    return geometry.groups == 1 and are_readable(grad, weight, geometry)


def are_readable(grad: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Return whether a kernel for contiguous float32 CPU tensors can read these operands."""
    return (
        geometry.kernels_allowed
        and grad.is_cpu
        and grad.dtype == weight.dtype == torch.float32
        and not geometry.transposed
        and is_eager(grad, weight)
        and not is_batched(grad, weight)
        and grad.is_contiguous()
        and weight.is_contiguous()
        and backends.native() is not None
    )


def in_order(images: Tensor) -> bool:
    """Return whether images are contiguous, and not at the same time channels_last, which PyTorch would preserve."""
    return images.is_contiguous() and images.stride(-1) == 1 and images.stride(1) == prod(images.shape[2:])


def fits(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether PyTorch accepts these operands together. It raises its own errors for all others."""
    return (
        input.shape[1] == weight.shape[1]
        and len(weight) > 0
        and (bias is None or (is_eager(bias) and bias.dtype == weight.dtype and bias.shape == weight.shape[:1]))
    )


def input_gradient(grad: Tensor, shape: torch.Size, weight: Tensor, geometry: Geometry) -> Tensor:
    """Compute dx (N, C_in, *S) of ``shape`` from grad (N, C_out, *S') and weight (C_out, C_in, *K), in 1d or 2d."""
    result = grad.new_empty(shape)
    dimensions = plane_of(shape, grad.shape, weight, geometry)
    addresses = grad.data_ptr(), weight.data_ptr(), result.data_ptr()
    channels = weight.shape[1], weight.shape[0]
    backends.native().conv_input_gradient(*addresses, shape[0], *channels, dimensions, torch.get_num_threads())
    return result


def plane_of(input: torch.Size, output: torch.Size, weight: Tensor, geometry: Geometry) -> list[tuple[int, ...]]:
    """Return the sizes of input, output and kernel, stride, padding and dilation for rows and for columns.

    A 1d input is one row.
    """
    dimensions = list(zip(input[2:], output[2:], weight.shape[2:], *geometry[:3], strict=True))
    return dimensions if len(dimensions) > 1 else [ONE_ROW, *dimensions]
