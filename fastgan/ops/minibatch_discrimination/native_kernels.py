"""Calls into fastgan._native and fastgan._native_cuda. Only this file of the op passes raw addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops.library import data_pointers, dtype_name


class Native:
    """The kernels of one of the two modules. They write into contiguous tensors; None becomes the address 0."""

    def __init__(self, backend: str) -> None:
        self.on_cpu = backend == "cpu"

    def forward(self, m: Tensor, segments: Tensor | None, o: Tensor, first: int, exclude_self: bool) -> None:
        self._run("forward", segments, [m, o], m, (first, len(o)), exclude_self)

    def backward(self, h: Tensor, m: Tensor, segments: Tensor | None, dm: Tensor, first: int) -> None:
        self._run("backward", segments, [self._packed(h), m, dm], m, (first, len(dm)))

    def double_backward(
        self,
        w: Tensor,
        h: Tensor,
        m: Tensor,
        segments: Tensor | None,
        by_h: Tensor | None,
        by_m: Tensor | None,
        first: int,
    ) -> None:
        written = by_m if by_h is None else by_h
        if written is not None:
            tensors = [self._packed(w), self._packed(h), m, by_h, by_m]
            self._run("double_backward", segments, tensors, m, (first, len(written)))

    def _packed(self, operand: Tensor) -> Tensor:
        return operand if self.on_cpu else operand.movedim(0, -1).contiguous()  # (B, C, N) or (B, N)

    def _run(
        self,
        order: str,
        segments: Tensor | None,
        tensors: list[Tensor | None],
        m: Tensor,
        rows: tuple[int, int],
        *options: bool,
    ) -> None:
        if self.on_cpu:
            places, ends = _by_segment(segments)
            tensors = [places, ends, *tensors]
            sizes = (*m.shape, *rows, 1 if ends is None else len(ends))
        else:
            tensors = [segments, *tensors]
            kernels, dims, samples = m.shape
            sizes = (samples, kernels, dims, *rows)
        module = backends.native() if self.on_cpu else backends.native_cuda()
        kernel = getattr(module, f"minibatch_discrimination_{order}")
        kernel(dtype_name(m), data_pointers(*tensors), sizes, *options, self._where(m))

    def _where(self, m: Tensor) -> int:
        """Return the number of threads on a CPU, or the CUDA stream."""
        return torch.get_num_threads() if self.on_cpu else torch.cuda.current_stream(m.device).cuda_stream


def _by_segment(segments: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return the sample indices sorted by segment, and the end of each segment in that order."""
    if segments is None:
        return None, None
    ordered, order = segments.sort(stable=True)
    return order, ordered.unique_consecutive(return_counts=True)[1].cumsum(0)
