"""Calls into fastgan._native. Only this file of the op passes raw addresses; None becomes the address 0."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops.library import data_pointers, dtype_name
from fastgan.ops.norm.layout import Backward, DoubleBackward, Forward, Layout


def forward(t: Forward, layout: Layout, eps: float) -> None:
    tensors = [*data_pointers(*t[:-1]), *_rows(t.statistics, 3)]
    backends.native().norm_forward(dtype_name(t.x), tensors, layout, eps, torch.get_num_threads())


def backward(t: Backward, layout: Layout) -> None:
    tensors = [*data_pointers(*t[:2]), *_rows(t.statistics, 2), *data_pointers(*t[3:])]
    backends.native().norm_backward(dtype_name(t.x), tensors, layout, torch.get_num_threads())


def double_backward(t: DoubleBackward, layout: Layout) -> None:
    tensors = [*data_pointers(*t[:5]), *_rows(t.statistics, 2), *data_pointers(*t[6:])]
    backends.native().norm_double_backward(dtype_name(t.x), tensors, layout, torch.get_num_threads())


def _rows(statistics: Tensor, count: int) -> list[int]:
    """Return the addresses of the first ``count`` statistics, and 0 for those that are not kept."""
    kept, rows = statistics.shape
    begin, step = statistics.data_ptr(), rows * statistics.itemsize
    return [begin + i * step if i < kept else 0 for i in range(count)]
