"""Calls into fastgan._native. Only this file of the op passes raw addresses; None becomes the address 0."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops.library import data_pointers, dtype_name
from fastgan.ops.minibatch_stddev.layout import Layout


def forward(x: Tensor, y: Tensor, layout: Layout, eps: float) -> None:
    backends.native().minibatch_stddev_forward(dtype_name(x), data_pointers(x, y), layout, eps, torch.get_num_threads())


def backward(dy: Tensor, x: Tensor, dx: Tensor, slope: Tensor, layout: Layout, eps: float) -> None:
    tensors = data_pointers(dy, x, dx, slope)
    backends.native().minibatch_stddev_backward(dtype_name(x), tensors, layout, eps, torch.get_num_threads())


def double_backward(
    h: Tensor, x: Tensor, slope: Tensor, by_dy: Tensor | None, by_x: Tensor | None, layout: Layout, eps: float
) -> None:
    tensors = data_pointers(h, x, slope, by_dy, by_x)
    backends.native().minibatch_stddev_double_backward(dtype_name(x), tensors, layout, eps, torch.get_num_threads())
