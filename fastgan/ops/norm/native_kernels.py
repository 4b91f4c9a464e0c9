"""Calls into fastgan._native: the only place of this op where addresses are taken. None is the address 0."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops.norm.layout import Layout


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    layout: Layout,
    eps: float,
) -> None:
    tensors = _addresses(x, weight, bias, y, mean, rstd)
    backends.native().norm_forward(_name(x), tensors, layout, eps, torch.get_num_threads())


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    layout: Layout,
) -> None:
    tensors = _addresses(dy, x, mean, rstd, weight, dx, dweight, dbias)
    backends.native().norm_backward(_name(x), tensors, layout, torch.get_num_threads())


def double_backward(
    h: Tensor | None,
    h_weight: Tensor | None,
    h_bias: Tensor | None,
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    by_dy: Tensor | None,
    by_x: Tensor | None,
    by_weight: Tensor | None,
    layout: Layout,
) -> None:
    tensors = _addresses(h, h_weight, h_bias, dy, x, mean, rstd, weight, by_dy, by_x, by_weight)
    backends.native().norm_double_backward(_name(x), tensors, layout, torch.get_num_threads())


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
