"""Calls into fastgan._native. Only this file of the op passes raw addresses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops.library import dtype_name


def filtered_lrelu(
    x: Tensor,
    y: Tensor,
    signs: Tensor | None,
    inside: Tensor | None,
    read: bool,
    sizes: Sequence[int],
    separable: bool,
    taps: Sequence[float],
    second_sizes: Sequence[int],
    second_separable: bool,
    second_taps: Sequence[float],
    slope: float,
    gain: float,
    clamp: float,
) -> None:
    """x and y are contiguous. The sizes are those of upfirdn2d's kernel, before and after the activation."""
    bits = (0 if mask is None else mask.data_ptr() for mask in (signs, inside))
    steps = sizes, separable, taps, second_sizes, second_separable, second_taps
    threads = torch.get_num_threads()
    backends.native().filtered_lrelu(
        dtype_name(x), x.data_ptr(), y.data_ptr(), *bits, read, *steps, slope, gain, clamp, threads
    )
