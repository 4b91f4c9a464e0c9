"""The input's gradient of a convolution with steps, through channels last, the order in which a CPU computes it.

oneDNN takes and gives channels last here whatever it is given, and PyTorch brings its result back by a copy that may
take as long as the convolution. Given channels last, and brought back by a kernel of ours, it is the same product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops.conv.geometry import Geometry
from fastgan.ops.conv.native_kernels import are_plain

# Elements of dx, and of each of its channels, under which the copy is fast enough (docs/decisions.md).
_LEAST, _LEAST_OF_CHANNEL = 1 << 20, 1 << 14
_ISAS = ("avx2", "avx512")  # where oneDNN's kernels are those of channels last


def takes(grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether `input_gradient` is the faster way to this gradient."""
    return (
        max(geometry.stride) > 1
        and are_plain(grad, weight, geometry)
        and grad.ndim == 4
        and input.numel() >= max(_LEAST, _LEAST_OF_CHANNEL * input.shape[1], weight.numel())
        and input.is_contiguous()
        and bool(torch.backends.mkldnn.enabled)
        and backends.native().isa() in _ISAS
    )


def input_gradient(grad: Tensor, shape: torch.Size, weight: Tensor, geometry: Geometry) -> Tensor:
    """dx of ``shape`` (N, C_in, H, W) from grad (N, C_out, H', W') and weight (C_out, C_in, kH, kW)."""
    sizes = (shape[2:], grad.shape[2:], weight.shape[2:], geometry.stride, geometry.padding, geometry.dilation)
    left = [s - ((o - 1) * step - 2 * p + d * (k - 1) + 1) for s, o, k, step, p, d in zip(*sizes, strict=True)]
    turned = torch.empty_like(grad, memory_format=torch.channels_last)
    _transpose(grad, turned, grad.shape[1])
    dx = torch.convolution(turned, weight, None, *geometry[:3], True, left, 1)
    dx = dx.contiguous(memory_format=torch.channels_last)  # which it is where oneDNN has made it
    result = grad.new_empty(shape)
    _transpose(dx, result, shape[2] * shape[3])
    return result


def _transpose(source: Tensor, target: Tensor, rows: int) -> None:
    """Each sample of the source, whose memory is (rows, columns), as (columns, rows)."""
    samples = len(source)
    columns = source.numel() // (samples * rows)
    backends.native().transpose(source.data_ptr(), target.data_ptr(), samples, rows, columns, torch.get_num_threads())
