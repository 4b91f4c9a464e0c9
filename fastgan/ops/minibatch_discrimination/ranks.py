"""Gather the samples of all ranks of a process group, in the order of the ranks. Without a group there is one rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

Group = Any  # torch.distributed.ProcessGroup, which some builds of PyTorch lack


def first_row(rows: int, group: Group | None) -> int:
    """Return the index of this rank's first sample among the samples of all ranks."""
    return 0 if group is None else dist.get_rank(group) * rows


def gather(rows: Tensor, group: Group | None) -> Tensor:
    """Gather the rows of all ranks, without a graph. Every rank must have the same number of rows."""
    if group is None:
        return rows
    everyone = rows.new_empty(dist.get_world_size(group) * len(rows), *rows.shape[1:])
    # As bytes, because some backends of torch.distributed do not support every dtype.
    dist.all_gather_into_tensor(everyone.view(torch.uint8), rows.contiguous().view(torch.uint8), group=group)
    return everyone


def differentiable_gather(rows: Tensor, group: Group | None) -> Tensor:
    """Gather the rows of all ranks, differentiably to any order. Gradients are those of the sum of all losses."""
    if group is None:
        return rows
    everyone: Tensor = _Gather.apply(rows, group)  # type: ignore[no-untyped-call]
    return everyone


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return gather(rows, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _ReduceScatter.apply(grad, ctx.group), None  # type: ignore[no-untyped-call]


class _ReduceScatter(torch.autograd.Function):
    """Sum over ranks and keep this rank's rows. This is the transpose of gathering."""

    @staticmethod
    def forward(ctx: Any, everyone: Tensor, group: Group) -> Tensor:
        ctx.group = group
        half = everyone.dtype in (torch.float16, torch.bfloat16)
        total = everyone.to(torch.float32 if half else everyone.dtype, copy=True).contiguous()
        dist.all_reduce(total, group=group)
        rows = len(total) // dist.get_world_size(group)
        return total.narrow(0, first_row(rows, group), rows).to(everyone.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(grad, ctx.group), None  # type: ignore[no-untyped-call]
