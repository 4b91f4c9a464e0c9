"""The gradients of a convolution as further convolutions, for the graphs of torch.compile.

Inductor chooses the memory format of aten::convolution. It copies the operands of aten::convolution_backward into the
format of the trace, in which strided convolutions are slower on a CPU. And oneDNN reorders all weights to compute the
gradient of a layer with many weights and few positions (docs/decisions.md).

Without a stride, one aten::convolution_backward computes both gradients if both are needed. Inductor would copy the
output's gradient into another format once for each of two operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from fastgan.ops.conv.geometry import Geometry

_MANY = 1024  # weights for each position of the output


def input_gradient(grad: Tensor, size: Sequence[int], weight: Tensor, geometry: Geometry) -> Tensor | None:
    """Return the gradient of the input, which has this size, or None if a size that decides is symbolic."""
    maps = geometry.of_input_gradient(size[2:], grad.shape[2:], weight.shape[2:])
    return None if maps is None else torch.convolution(grad, weight, None, *maps.arguments)


def weight_gradient(grad: Tensor, input: Tensor, size: Sequence[int], geometry: Geometry) -> Tensor | None:
    """Return the gradient of a weight of this size, or None if aten::convolution_backward is faster.

    The samples are the channels of this convolution, and its filters are as large as ``grad``.
    """
    sizes = *input.shape, *grad.shape
    if not grad.is_cpu or geometry.transposed or geometry.groups > 1 or not all(isinstance(n, int) for n in sizes):
        return None
    if prod(size) < _MANY * len(grad) * prod(grad.shape[2:]):
        return None
    by_weight = torch.convolution(
        input.transpose(0, 1),
        grad.transpose(0, 1),
        None,
        geometry.dilation,
        geometry.padding,
        geometry.stride,
        False,
        geometry.output_padding,
        1,
    )
    for dim, side in enumerate(size[2:], 2):
        by_weight = by_weight.narrow(dim, 0, side)  # more fit, if the stride left pixels out
    return by_weight.transpose(0, 1)
