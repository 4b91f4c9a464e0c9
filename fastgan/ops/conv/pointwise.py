"""1x1 convolutions on a CPU, with a kernel that reads images in their own memory layout.

oneDNN first reorders its operands, and the BLAS is slow on processors of vendors other than its own.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops.conv.geometry import Geometry
from fastgan.ops.conv.native_kernels import are_plain, in_order

TAKEN = ("avx2", "avx512")  # instruction sets; with fewer lanes the vendor's kernel is as fast


def is_pointwise(weight: Tensor, geometry: Geometry) -> bool:
    ones, zeros = (1,) * (weight.ndim - 2), (0,) * (weight.ndim - 2)
    return weight.shape[2:] == ones and geometry == Geometry(ones, zeros, ones, False, zeros, 1, kernels_allowed=True)


def is_fastest_forward(images: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Return whether `forward` is the fastest way to compute this output.

    ``images`` may also be the gradient of the output; the answer then holds for `input_gradient`.
    """
    return (
        weight.shape[-1] == 1  # the fastest check comes first
        and is_pointwise(weight, geometry)
        and are_plain(images, weight, geometry)
        and in_order(images)
        and weight.stride(-1) == 1
        and backends.native().isa() in TAKEN
    )


def is_fastest(grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Return whether `input_gradient` is the fastest way to compute this gradient."""
    return is_fastest_forward(grad, weight, geometry) and in_order(input)


def forward(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """(N, C_in, *S), (C_out, C_in, 1, ..), (C_out,) or None -> (N, C_out, *S)."""
    output = input.new_empty((len(input), len(weight), *input.shape[2:]))
    bias = None if bias is None else bias.contiguous()
    backends.native().conv_pointwise_forward(
        input.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        output.data_ptr(),
        *_sizes(output, weight),
    )
    return output


def input_gradient(grad: Tensor, shape: torch.Size, weight: Tensor, geometry: Geometry) -> Tensor:
    """Compute dx (N, C_in, *S) of ``shape`` from grad (N, C_out, *S) and weight (C_out, C_in, 1, ..)."""
    result = grad.new_empty(shape)
    addresses = grad.data_ptr(), weight.data_ptr(), result.data_ptr()
    backends.native().conv_pointwise_input_gradient(*addresses, *_sizes(grad, weight))
    return result


def _sizes(output: Tensor, weight: Tensor) -> tuple[int, int, int, int, int]:
    return len(output), weight.shape[1], len(weight), prod(output.shape[2:]), torch.get_num_threads()
