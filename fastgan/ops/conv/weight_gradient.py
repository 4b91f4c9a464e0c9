"""The weight gradient on a CPU for the vendor's slow cases: 1x1 kernels, outputs with few pixels, and long rows.

If a layer has more weights than positions, oneDNN reorders all weights. In 1d convolutions with wide kernels, or with
numbers of channels that do not fill its vectors, it multiplies small matrices, in one thread.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops.conv import pointwise
from fastgan.ops.conv.geometry import Geometry
from fastgan.ops.conv.native_kernels import ONE_ROW, are_plain, are_readable, in_order, plane_of

_FEW = 16  # output positions per sample
_FEW_IN_ALL = 256  # positions of all samples, or twice the number of channels; packing more costs as much as it saves
_LANES = 32  # input or output channels; with fewer, transposing images with many positions takes too long
_WIDE = 15  # taps; oneDNN's kernel for rows of weights computes no more than 14
_VECTOR = 8  # channels
_SHORT = 64  # positions of a row, besides one for each channel that is summed over


def is_fastest(grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Return whether `weight_gradient` is the fastest way to compute this gradient."""
    if _is_long_row(grad, input, weight, geometry):
        return True
    positions = prod(grad.shape[2:])
    few = positions <= _FEW and grad.shape[0] * positions <= max(_FEW_IN_ALL, 2 * weight.shape[0])
    if not few and weight.shape[-1] > 1:  # the fastest checks come first
        return False
    if not (are_plain(grad, weight, geometry) and in_order(input) and in_order(weight)):
        return False
    if pointwise.is_pointwise(weight, geometry):
        many = pointwise.is_fastest_forward(grad, weight, geometry) and max(weight.shape[:2]) >= _LANES
        return few or many
    return few and 3 <= grad.ndim <= 4


def _is_long_row(grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Return whether the kernel for rows is faster than the vendor's."""
    if grad.ndim != 3 or not are_readable(grad, weight, geometry):
        return False
    rows, channels, taps = weight.shape
    fills_vectors = channels % _VECTOR == 0 == rows // geometry.groups % _VECTOR
    return (
        (taps >= _WIDE or (taps > 1 and not fills_vectors))
        and grad.shape[2] >= _SHORT + channels
        and len(grad) > 0 < channels
        and min(*geometry.stride, *geometry.dilation) > 0 <= geometry.padding[0]
        and in_order(input)
        and in_order(weight)
        and backends.native().isa() in pointwise.TAKEN
    )


def weight_gradient(grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """(N, C_out, *S'), (N, C_in, *S) -> (C_out, C_in, *K)."""
    result = grad.new_empty(weight.shape)
    if _is_long_row(grad, input, weight, geometry):
        _of_rows(grad, input, result, geometry)
        return result
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


def _of_rows(grad: Tensor, input: Tensor, result: Tensor, geometry: Geometry) -> None:
    rows, channels, taps = result.shape
    backends.native().conv_row_weight_gradient(
        grad.data_ptr(),
        input.data_ptr(),
        result.data_ptr(),
        len(grad),
        geometry.groups,
        channels,
        rows // geometry.groups,
        (input.shape[2], grad.shape[2], taps, geometry.stride[0], geometry.padding[0], geometry.dilation[0]),
        torch.get_num_threads(),
    )
