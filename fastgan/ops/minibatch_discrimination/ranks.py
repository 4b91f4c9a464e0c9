"""The samples of all processes of a group, in the order of their ranks. Without a group, one process is everyone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

Group = Any  # torch.distributed.ProcessGroup, which is not there in every build of PyTorch


def first_row(rows: int, group: Group | None) -> int:
    """Where this process's samples begin among everyone's."""
    return 0 if group is None else dist.get_rank(group) * rows


def gather(rows: Tensor, group: Group | None) -> Tensor:
    """Everyone's rows, of which each process has as many, without a graph."""
    if group is None:
        return rows
    everyone = rows.new_empty(dist.get_world_size(group) * len(rows), *rows.shape[1:])
    # As bytes: not every backend of torch.distributed knows every dtype.
    dist.all_gather_into_tensor(everyone.view(torch.uint8), rows.contiguous().view(torch.uint8), group=group)
    return everyone


def differentiable_gather(rows: Tensor, group: Group | None) -> Tensor:
    """Everyone's rows, differentiable to any order: each process's gradient is that of the sum of all losses."""
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
        return _OwnShare.apply(grad, ctx.group), None  # type: ignore[no-untyped-call]


class _OwnShare(torch.autograd.Function):
    """The sum over processes, of which each keeps its own rows: the transpose of the gathering."""

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
