"""Calls into fastgan._native and fastgan._native_cuda, which take raw addresses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops.library import dtype_name
from fastgan.ops.spectral_norm.layout import Layout


class Native:
    """The kernels of one of the two modules. They write into contiguous tensors."""

    def __init__(self, backend: str) -> None:
        self.module: Any = backends.native() if backend == "cpu" else backends.native_cuda()
        self.on_cpu = backend == "cpu"

    def forward(
        self,
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
        where = self._where(weights[0])
        self.module.spectral_norm_forward(dtype_name(weights[0]), rows, n_power_iterations, eps, v_first, where)

    def backward(
        self,
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
        self.module.spectral_norm_backward(dtype_name(weights[0]), rows, self._where(weights[0]))

    def _where(self, weight: Tensor) -> int:
        """Return the number of threads on a CPU, or the CUDA stream."""
        return torch.get_num_threads() if self.on_cpu else torch.cuda.current_stream(weight.device).cuda_stream


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
