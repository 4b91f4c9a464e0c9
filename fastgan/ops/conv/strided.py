"""Strided convolutions between many channels on a CPU: kernels for the forward and the input gradient."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops.conv.geometry import Geometry
from fastgan.ops.conv.native_kernels import are_plain, in_order, plane_of

_BLOCK = {"avx2": 16, "avx512": 32}  # channels of the result that the kernel computes together
_LEAST_CHANNELS = 16  # channels that are summed over
_LEAST_POSITIONS = 256  # output positions; with fewer, reordering the weights takes longer than the forward


def is_fastest_forward(input: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Return whether `forward` is the fastest way to compute this output."""
    if not (_is_eligible(input, weight, geometry) and in_order(input) and _has_fast_forward()):
        return False
    shape = _output_shape(input, weight, geometry)
    return (
        weight.shape[1] >= _LEAST_CHANNELS
        and _fills_blocks(len(weight))
        and min(shape) > 0
        and shape[0] * shape[2] * shape[3] >= _LEAST_POSITIONS
    )


@cache
def _has_fast_forward() -> bool:
    """Return whether the kernel for the forward is faster than the vendor's on this processor.

    With AVX2 it is not, and neither with AVX-512 on AMD's Zen 4, which computes half a vector at a time.
    """
    native = backends.native()
    return bool(native.isa() == "avx512" and native.is_intel())


def is_fastest(grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Return whether `input_gradient` is the fastest way to compute this gradient."""
    return (
        _is_eligible(grad, weight, geometry)
        and in_order(input)
        and len(weight) >= _LEAST_CHANNELS
        and _fills_blocks(weight.shape[1])
    )


def _is_eligible(images: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """``images`` is the input, or the gradient of the output."""
    return (
        max(geometry.stride) > 1
        and are_plain(images, weight, geometry)
        and images.ndim - 2 == len(geometry.stride) == len(geometry.padding) == len(geometry.dilation) == 2
        and min(*geometry.stride, *geometry.dilation) > 0 <= min(geometry.padding)
        and weight.stride(-1) == 1
    )


def _fills_blocks(channels: int) -> bool:
    """Return whether at most a quarter of the lanes are idle."""
    block = _BLOCK.get(backends.native().isa())
    return block is not None and 4 * channels >= 3 * block * -(-channels // block)


def _output_shape(input: Tensor, weight: Tensor, geometry: Geometry) -> tuple[int, ...]:
    sizes = zip(input.shape[2:], weight.shape[2:], *geometry[:3], strict=True)
    return len(input), len(weight), *((size + 2 * p - d * (k - 1) - 1) // step + 1 for size, k, step, p, d in sizes)


def forward(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """(N, C_in, H, W), (C_out, C_in, kH, kW), (C_out,) or None -> (N, C_out, H', W')."""
    output = input.new_empty(_output_shape(input, weight, geometry))
    bias = None if bias is None else bias.contiguous()
    backends.native().conv_strided_forward(
        input.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        output.data_ptr(),
        len(input),
        *weight.shape[1::-1],
        plane_of(input.shape, output.shape, weight, geometry),
        torch.get_num_threads(),
    )
    return output


def input_gradient(grad: Tensor, shape: torch.Size, weight: Tensor, geometry: Geometry) -> Tensor:
    """Compute dx (N, C_in, H, W) of ``shape`` from grad (N, C_out, H', W') and weight (C_out, C_in, kH, kW)."""
    result = grad.new_empty(shape)
    backends.native().conv_strided_input_gradient(
        grad.data_ptr(),
        weight.data_ptr(),
        result.data_ptr(),
        len(grad),
        *weight.shape[1::-1],
        plane_of(shape, grad.shape, weight, geometry),
        torch.get_num_threads(),
    )
    return result
