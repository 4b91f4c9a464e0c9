"""Calls into fastgan._native. Only this file of the op passes raw addresses; None becomes the address 0."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops.bias_act.layout import Layout, Options
from fastgan.ops.library import data_pointers, dtype_name


def piecewise_forward(
    x: Tensor,
    bias: Tensor | None,
    y: Tensor,
    signs: Tensor | None,
    inside: Tensor | None,
    layout: Layout,
    options: Options,
) -> None:
    tensors = data_pointers(x, bias, y, signs, inside)
    backends.native().piecewise_forward(dtype_name(x), tensors, layout, options, torch.get_num_threads())


def piecewise_apply(
    g: Tensor | None,
    bias: Tensor | None,
    signs: Tensor | None,
    inside: Tensor | None,
    out: Tensor | None,
    sums: Tensor | None,
    layout: Layout,
    options: Options,
) -> None:
    # If g and out are both None, the dtype does not matter.
    typed = next(t for t in (g, out, sums) if t is not None)
    tensors = data_pointers(g, bias, signs, inside, out, sums)
    backends.native().piecewise_apply(dtype_name(typed), tensors, layout, options, torch.get_num_threads())


def smooth_forward(x: Tensor, bias: Tensor | None, y: Tensor, layout: Layout, options: Options) -> None:
    tensors = data_pointers(x, bias, y)
    backends.native().smooth_forward(dtype_name(x), tensors, layout, options, torch.get_num_threads())


def smooth_backward(
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    dx: Tensor | None,
    dbias: Tensor | None,
    layout: Layout,
    options: Options,
) -> None:
    tensors = data_pointers(dy, x, bias, dx, dbias)
    backends.native().smooth_backward(dtype_name(x), tensors, layout, options, torch.get_num_threads())


def smooth_double_backward(
    h: Tensor | None,
    h_bias: Tensor | None,
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    by_dy: Tensor | None,
    by_x: Tensor | None,
    by_bias: Tensor | None,
    layout: Layout,
    options: Options,
) -> None:
    tensors = data_pointers(h, h_bias, dy, x, bias, by_dy, by_x, by_bias)
    backends.native().smooth_double_backward(dtype_name(x), tensors, layout, options, torch.get_num_threads())
