"""Minibatch standard deviation over the batches of all ranks.

Ranks exchange moments, not samples: the sums of each group, then its sums of squares about the mean, (M, C, *S) each,
where the batch of all ranks is (M G, C, *S). Derivatives of any order exist.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastgan.ops.library import accumulation_dtype
from fastgan.ops.minibatch_stddev import reference
from fastgan.ops.minibatch_stddev.grouping import size_of_groups


def minibatch_stddev(
    x: Tensor, group_size: int | None, num_channels: int, eps: float, remainder: str, process_group: dist.ProcessGroup
) -> Tensor:
    first, samples = _place(len(x), x.device, process_group)
    size = size_of_groups(samples, group_size, remainder)
    groups = samples // size
    group = torch.arange(first, first + len(x), device=x.device) % groups  # the group of each local sample

    def mean(values: Tensor) -> Tensor:
        """Average over the members of each group on all ranks: (N, C, *S) -> (M, C, *S)."""
        sums = values.new_zeros(groups, *values.shape[1:]).index_add(0, group, values)
        result: Tensor = _SumOverRanks.apply(sums, process_group)  # type: ignore[no-untyped-call]
        return result / size

    y = x.to(accumulation_dtype(x.dtype))
    y = y - mean(y)[group]
    y = (mean(y.square()) + eps).sqrt()
    y = y.unflatten(1, (num_channels, -1)).flatten(2).mean(2)  # (M, F)
    return reference.append(x, y[group])


def _place(samples: int, device: torch.device, process_group: dist.ProcessGroup) -> tuple[int, int]:
    """Return the index of this rank's first sample in the batch of all ranks, and the size of that batch."""
    counts = torch.empty(process_group.size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(counts, counts.new_tensor([samples]), group=process_group)
    before = counts.tolist()
    return sum(before[: process_group.rank()]), sum(before)


class _SumOverRanks(torch.autograd.Function):
    """Sum the tensors of all ranks. For the sum of all ranks' losses, this map is its own adjoint."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, process_group: dist.ProcessGroup) -> Tensor:
        ctx.process_group = process_group
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=process_group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _SumOverRanks.apply(grad, ctx.process_group), None  # type: ignore[no-untyped-call]
