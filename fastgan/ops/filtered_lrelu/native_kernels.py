"""Calls into fastgan._native. Only this file of the op passes raw addresses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops.library import data_pointers, dtype_name


def filtered_lrelu(
    x: Tensor,
    bias: Tensor | None,
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
    """x and y are contiguous. The sizes are those of upfirdn2d's kernel, before and after the activation.

    The bias has the dtype in which sums are accumulated.
    """
    x_at, bias_at, *rest = data_pointers(x, bias, y, signs, inside)
    steps = sizes, separable, taps, second_sizes, second_separable, second_taps
    threads = torch.get_num_threads()
    backends.native().filtered_lrelu(
        dtype_name(x), x_at, bias_at, x.shape[1], *rest, read, *steps, slope, gain, clamp, threads
    )
