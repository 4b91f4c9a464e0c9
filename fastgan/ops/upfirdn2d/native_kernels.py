"""Calls into fastgan._native. Only this file of the op passes raw addresses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops.library import dtype_name


def upfirdn2d(x: Tensor, y: Tensor, sizes: Sequence[int], separable: bool, taps: Sequence[float]) -> None:
    """Run the kernel. x and y are contiguous in the layout of ``sizes`` (see autograd.py)."""
    threads = torch.get_num_threads()
    backends.native().upfirdn2d(dtype_name(x), x.data_ptr(), y.data_ptr(), sizes, separable, taps, threads)
