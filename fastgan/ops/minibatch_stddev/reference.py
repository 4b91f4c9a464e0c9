"""Minibatch standard deviation in PyTorch: the reference, the fallback and the benchmark's baseline."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan.ops.library import accumulation_dtype


def minibatch_stddev(x: Tensor, size: int, num_channels: int, eps: float) -> Tensor:
    return append(x, statistics(x, size, num_channels, eps).repeat(size, 1))


def statistics(x: Tensor, size: int, num_channels: int, eps: float) -> Tensor:
    """Compute the statistic of each of the M groups and each block of channels: (M, F)."""
    y = x.to(accumulation_dtype(x.dtype))
    y = y.reshape(size, len(x) // size, num_channels, x.shape[1] // num_channels, *x.shape[2:])  # (G, M, F, C/F, *S)
    y = y - y.mean(0)
    y = (y.square().mean(0) + eps).sqrt()  # (M, F, C/F, *S)
    return y.flatten(2).mean(2)


def append(x: Tensor, statistics: Tensor) -> Tensor:
    """Append statistics (N, F) to x (N, C, *S) as its last channels."""
    planes = statistics.to(x.dtype).view(*statistics.shape, *(1 for _ in x.shape[2:]))
    return torch.cat([x, planes.expand(-1, -1, *x.shape[2:])], 1)
