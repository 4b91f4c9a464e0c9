"""The options of a call, and the layout in which the kernels see the input."""

from __future__ import annotations

from math import inf, prod
from typing import NamedTuple

import torch
from torch import Tensor

PIECEWISE = ("linear", "relu", "leaky_relu")
SMOOTH = ("silu", "gelu", "gelu_tanh", "tanh", "sigmoid", "softplus")
ACTIVATIONS = (*PIECEWISE, *SMOOTH)
UNFUSED = ("elu", "selu")  # PyTorch's own operations
ALIASES = {"lrelu": "leaky_relu", "swish": "silu"}  # of StyleGAN's code
GAINS = dict.fromkeys(("relu", "leaky_relu", "silu"), 2**0.5)  # where gain is None; elsewhere 1
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Options(NamedTuple):
    """y = gain * act(x + b), clamped to [-clamp, clamp]."""

    activation: str
    negative_slope: float = 0.0
    gain: float = 1.0
    clamp: float = inf


class Layout(NamedTuple):
    """The elements in memory order, as (outer, channels, inner)."""

    outer: int
    channels: int
    inner: int

    @property
    def size(self) -> int:
        return self.outer * self.channels * self.inner


def is_dense(x: Tensor) -> bool:
    """Return whether the elements fill one block of memory, without gaps or overlaps."""
    return x.is_contiguous() or x.stride() == torch.empty_like(x, device="meta").stride()


def layout_of(x: Tensor, dim: int | None) -> Layout:
    """Return the memory layout of x, or of a dense copy of it, around the dimension ``dim``. None: there is no bias."""
    if dim is None:
        return Layout(1, 1, x.numel())
    sizes = list(x.shape)
    if not x.is_contiguous():
        stride = x.stride()
        order = sorted(range(x.ndim), key=lambda d: -stride[d])
        sizes, dim = [sizes[d] for d in order], order.index(dim)
    return Layout(prod(sizes[:dim]), sizes[dim], prod(sizes[dim + 1 :]))


def bytes_of_bits(size: int) -> int:
    """Return the bytes that hold one bit per element, in whole 32-bit words."""
    return (size + 31) // 32 * 4
