"""Calls into fastgan._native and fastgan._native_cuda: the only place of this op where addresses are taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops.spectral_norm.layout import Layout


def forward(
    backend: str,
    weights: Sequence[Tensor],
    outputs: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    saved: Tensor,
    layout: Layout,
    n_power_iterations: int,
    eps: float,
    v_first: bool,
) -> None:
    rows = forward_rows(weights, outputs, us, vs, saved, layout)
    module, where = _module(backend, weights[0])
    module.spectral_norm_forward(_name(weights[0]), rows, n_power_iterations, eps, v_first, where)


def forward_rows(
    weights: Sequence[Tensor],
    outputs: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    saved: Tensor,
    layout: Layout,
) -> list[tuple[int, ...]]:
    base, size = saved.data_ptr(), saved.element_size()
    return [
        (w.data_ptr(), o.data_ptr(), u.data_ptr(), v.data_ptr(), base + at * size, 0, *matrix)
        for w, o, u, v, at, matrix in zip(weights, outputs, us, vs, layout.offsets, layout.matrices, strict=True)
    ]


def backward(
    backend: str,
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    outputs: Sequence[Tensor],
    saved: Tensor,
    layout: Layout,
) -> None:
    base, size = saved.data_ptr(), saved.element_size()
    rows = [
        (w.data_ptr(), o.data_ptr(), 0, 0, base + at * size, g.data_ptr(), *matrix)
        for g, w, o, at, matrix in zip(grads, weights, outputs, layout.offsets, layout.matrices, strict=True)
    ]
    module, where = _module(backend, weights[0])
    module.spectral_norm_backward(_name(weights[0]), rows, where)


def _module(backend: str, weight: Tensor) -> tuple[Any, int]:
    """The module, and where it runs: a number of threads, or a CUDA stream."""
    if backend == "cpu":
        return backends.native(), torch.get_num_threads()
    return backends.native_cuda(), torch.cuda.current_stream(weight.device).cuda_stream


def _name(weight: Tensor) -> str:
    return str(weight.dtype).removeprefix("torch.")
