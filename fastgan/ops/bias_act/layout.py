"""What is asked for, and how an input is seen by the kernels."""

from __future__ import annotations

from math import inf, prod
from typing import NamedTuple

import torch
from torch import Tensor

PIECEWISE = ("linear", "relu", "leaky_relu")
SMOOTH = ("silu", "gelu", "gelu_tanh", "tanh", "sigmoid", "softplus")
ACTIVATIONS = (*PIECEWISE, *SMOOTH)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Options(NamedTuple):
    """y = gain act(x + b), cut off at -clamp and clamp."""

    activation: str
    negative_slope: float = 0.0
    gain: float = 1.0
    clamp: float = inf


class Layout(NamedTuple):
    """Elements as they lie in memory, as (outer, channels, inner)."""

    outer: int
    channels: int
    inner: int

    @property
    def size(self) -> int:
        return self.outer * self.channels * self.inner


def is_dense(x: Tensor) -> bool:
    """Whether its elements fill one piece of memory, each once."""
    return x.is_contiguous() or x.stride() == torch.empty_like(x, device="meta").stride()


def layout_of(x: Tensor, dim: int | None) -> Layout:
    """How x, or a dense copy of it, lies in memory around a dimension; None: there is no bias."""
    if dim is None:
        return Layout(1, 1, x.numel())
    sizes = list(x.shape)
    if not x.is_contiguous():
        stride = x.stride()
        order = sorted(range(x.ndim), key=lambda d: -stride[d])
        sizes, dim = [sizes[d] for d in order], order.index(dim)
    return Layout(prod(sizes[:dim]), sizes[dim], prod(sizes[dim + 1 :]))


def bytes_of_bits(size: int) -> int:
    """A bit an element, in whole words of 32."""
    return (size + 31) // 32 * 4
