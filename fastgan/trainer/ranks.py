"""Data parallelism over several processes: torchrun starts them, and each computes its rows of every batch.

A batch spans all ranks. Every rank draws the whole batch from the same random streams and computes its own rows.
Gradients are averaged, and statistics over the batch (minibatch statistics, batch norm) cover all ranks, so n ranks
compute the same as one, up to rounding. Gradients are averaged once per step, after the backward pass. This module does
not use DistributedDataParallel, which averages during the backward pass: a penalty runs several graph passes per step.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastgan.nn as fnn


class Ranks:
    """This process's rank among the processes of a run; rank 0 of 1 if torchrun did not start it."""

    def __init__(self, device: torch.device, group: Any = None) -> None:
        self.device, self.group = device, group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    @classmethod
    def here(cls, device: torch.device) -> Ranks:
        """Read the ranks from torchrun's environment variables. CPUs use gloo, GPUs use NCCL."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(device)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(device, dist.group.WORLD)

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        memo[id(self.group)] = self.group  # layers refer to it too, and a process group cannot be copied
        return self

    def rows(self, batch_size: int) -> slice:
        """Return the slice of a batch that belongs to this rank."""
        share = batch_size // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    @torch.no_grad()
    def average(self, model: nn.Module) -> None:
        """Average a model's gradients over the ranks, in one all-reduce."""
        if self.group is None:
            return
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, group=self.group)
        flat /= self.size
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over the ranks, on every rank."""
        if self.group is not None:
            values = values.clone()
            dist.all_reduce(values, group=self.group)
            values /= self.size
        return values

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank, so that all ranks stop at the same step."""
        if self.group is None:
            return flag
        found = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return bool(found)

    def wait(self) -> None:
        if self.group is not None:
            dist.barrier(self.group)

    def join(self, model: nn.Module) -> None:
        """Make the layers of a model compute batch statistics over all ranks, in place."""
        if self.group is None:
            return
        for layer in model.modules():
            if isinstance(layer, fnn.MinibatchStdDev | fnn.MinibatchDiscrimination):
                layer.process_group = self.group
            elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.__class__ = RankBatchNorm
                layer.process_group = self.group


class RankBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the batches of all ranks, which have equal size. For generators; differentiable once.

    PyTorch's SyncBatchNorm does not support CPUs.
    """

    process_group: Any

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            evaluated: Tensor = super().forward(input)
            return evaluated
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        x = input.float() if input.dtype != torch.float64 else input
        dims = [d for d in range(x.ndim) if d != 1]
        shape = [-1 if d == 1 else 1 for d in range(x.ndim)]
        ranks = dist.get_world_size(self.process_group)
        mean = _Sum.apply(x.mean(dims), self.process_group) / ranks  # type: ignore[no-untyped-call]
        centered = x - mean.view(shape)
        variance = _Sum.apply(centered.square().mean(dims), self.process_group) / ranks  # type: ignore[no-untyped-call]
        count = ranks * x.numel() // x.shape[1]
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            unbiased = variance * (count / (count - 1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked += 1
        y: Tensor = centered * torch.rsqrt(variance + self.eps).view(shape)
        return (y * self.weight.view(shape) + self.bias.view(shape)).to(input.dtype)


class _Sum(torch.autograd.Function):
    """The sum over the ranks. It is its own adjoint for the sum of all ranks' losses."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(grad.contiguous(), ctx.group), None  # type: ignore[no-untyped-call]
