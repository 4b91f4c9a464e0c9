"""The weight's gradient of a convolution of few positions, on a CPU: itself a convolution, of the batch as channels.

Where a layer has more weights than positions, oneDNN's own kernel for this gradient orders all of them anew.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from fastgan.ops.conv.geometry import Geometry
from fastgan.ops.conv.native_kernels import are_plain, in_order

_FEW = 4  # positions of a sample's output
_FEW_OF_STEPS, _LEAST_SAMPLES = 16, 32  # with steps, where the samples fill a vector's lanes as channels


def takes(grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether `weight_gradient` is the faster way to this gradient."""
    positions = prod(grad.shape[2:])
    few = positions <= _FEW or (positions <= _FEW_OF_STEPS and max(geometry.stride) > 1 and len(grad) >= _LEAST_SAMPLES)
    return few and are_plain(grad, weight, geometry) and in_order(input) and in_order(weight)


def weight_gradient(grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """(N, C_out, *S'), (N, C_in, *S) -> (C_out, C_in, *K)."""
    steps, padding, dilation, transposed, further, groups = geometry.arguments
    images, kernel = input.transpose(0, 1), grad.transpose(0, 1)
    result = torch.convolution(images, kernel, None, dilation, padding, steps, transposed, further, groups)
    for dim, size in enumerate(weight.shape[2:], 2):  # beyond which lie rows that no step of the forward reached
        result = result.narrow(dim, 0, size)
    return result.transpose(0, 1).contiguous()
