"""Calls into fastgan._native. Only this file of the op passes raw addresses."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops.library import dtype_name


def pool(x: Tensor, kernel_size: tuple[int, ...], divisor: int | None) -> Tensor:
    """Pool a contiguous x (N, C, *sizes) whose sizes are multiples of the window's sizes."""
    sizes = [size // width for size, width in zip(x.shape[2:], kernel_size, strict=True)]
    y = x.new_empty((*x.shape[:2], *sizes))
    _run(backends.native().avg_pool, x, y, sizes, kernel_size, divisor)
    return y


def transpose(y: Tensor, shape: torch.Size, kernel_size: tuple[int, ...], divisor: int | None) -> Tensor:
    """Apply the transpose to a contiguous y (N, C, *pooled sizes); ``shape`` is the shape of the result."""
    x = y.new_empty(shape)
    _run(backends.native().avg_pool_transpose, y, x, y.shape[2:], kernel_size, divisor)
    return x


def _run(
    kernel: Any, source: Tensor, target: Tensor, pooled: Sequence[int], window: tuple[int, ...], divisor: int | None
) -> None:
    ahead = (1,) * (3 - len(window))
    shape = (source.shape[0] * source.shape[1], *ahead, *pooled, *ahead, *window)
    number = prod(window) if divisor is None else divisor
    kernel(dtype_name(source), source.data_ptr(), target.data_ptr(), shape, number, torch.get_num_threads())
