"""The weight gradient on a CPU for the vendor's slow cases: 1x1 kernels, and outputs with few pixels.

If a layer has more weights than positions, oneDNN reorders all weights.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops.conv import pointwise
from fastgan.ops.conv.geometry import Geometry
from fastgan.ops.conv.native_kernels import ONE_ROW, are_plain, in_order, plane_of

_FEW = 16  # output positions per sample
_FEW_IN_ALL = 256  # positions of all samples, or twice the number of channels; packing more costs as much as it saves
_LANES = 32  # input or output channels; with fewer, transposing images with many positions takes too long


def is_fastest(grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Return whether `weight_gradient` is the fastest way to compute this gradient."""
    if not (are_plain(grad, weight, geometry) and in_order(input) and in_order(weight)):
        return False
    positions = prod(grad.shape[2:])
    few = positions <= _FEW and grad.shape[0] * positions <= max(_FEW_IN_ALL, 2 * weight.shape[0])
    if pointwise.is_pointwise(weight, geometry):
        many = pointwise.is_fastest_forward(grad, weight, geometry) and max(weight.shape[:2]) >= _LANES
        return few or many
    return few and 3 <= grad.ndim <= 4


def weight_gradient(grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """(N, C_out, *S'), (N, C_in, *S) -> (C_out, C_in, *K)."""
    result = grad.new_empty(weight.shape)
    if pointwise.is_pointwise(weight, geometry):
        pixels = prod(grad.shape[2:])
        plane: list[tuple[int, ...]] = [ONE_ROW, (pixels, pixels, 1, 1, 0, 1)]
    else:
        plane = plane_of(input.shape, grad.shape, weight, geometry)
    backends.native().conv_weight_gradient(
        grad.data_ptr(),
        input.data_ptr(),
        result.data_ptr(),
        len(grad),
        *weight.shape[1::-1],
        plane,
        torch.get_num_threads(),
    )
    return result
