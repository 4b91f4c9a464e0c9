"""Gather sharded weights by a differentiable function. A backward that reads such a weight gathers it again.

The backward of a gather sums the gradient over the ranks, divides it as FSDP does, and returns the shard of each rank.
If FSDP keeps gradients for a later reduction, the gradient is added to them instead (kept.py).

A graph saves no gathered weight. It saves the shard and gathers the weight when a backward needs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fastgan import torch_private
from fastgan.ops.gradient_penalty.kept import Accumulation

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor  # the import is slow, and some builds of torch lack it


@dataclass(frozen=True, eq=False)
class Sharded:
    """A sharded parameter, with the settings to gather it and to reduce its gradient."""

    parameter: DTensor
    device: torch.device  # of the gathered weight; the shard may be on the host
    dtype: torch.dtype  # of the gathered weight
    reduce_dtype: torch.dtype | None  # of the sum of the gradients; None: the dtype of the gradients
    divisor: float  # of that sum
    streams: tuple[Any, ...]  # on which FSDP reduces the gradients of other forwards
    keeps: bool  # whether the gathered weight stays in memory for the backward
    accumulation: Accumulation

    def gathered(self, local: Tensor) -> Tensor:
        """Gather the whole weight from the shards of all ranks."""
        local = local.to(self.device, self.dtype)
        whole = self._distributed(local, self.parameter.placements).full_tensor()
        return whole.contiguous()

    def reduced(self, grad: Tensor) -> Tensor:
        """Return this rank's shard of the mean of a gradient over the ranks."""
        from torch.distributed.tensor import Partial

        for stream in self.streams:  # FSDP may write to the same parameter's grad there
            torch.cuda.current_stream(self.device).wait_stream(stream)
        grad = grad.to(self.reduce_dtype or grad.dtype) / self.divisor
        partial = self._distributed(grad.contiguous(), [Partial("sum")] * self.parameter.device_mesh.ndim)
        part = partial.redistribute(placements=self.parameter.placements).to_local()
        return part.to(self.parameter.to_local().device, self.parameter.dtype)

    def _distributed(self, local: Tensor, placements: Any) -> DTensor:
        from torch.distributed.tensor import DTensor

        size, mesh = self.parameter.shape, self.parameter.device_mesh
        stride = torch.empty(size, device="meta").stride()
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=size, stride=stride)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, sharded: Sharded) -> Tensor:
        ctx.sharded = sharded
        with torch_private.DisableTorchFunction():
            return sharded.gathered(local)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        if ctx.sharded.accumulation.take(grad):
            return None, None
        return _Reduce.apply(grad, ctx.sharded), None  # type: ignore[no-untyped-call]


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, sharded: Sharded) -> Tensor:
        ctx.sharded, ctx.dtype = sharded, grad.dtype
        with torch_private.DisableTorchFunction():
            return sharded.reduced(grad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        sharded = ctx.sharded
        whole: Tensor = _Gather.apply(grad / sharded.divisor, sharded)  # type: ignore[no-untyped-call]
        return whole.to(ctx.dtype), None


class _Source(NamedTuple):
    """The origin of a gathered weight."""

    local: Tensor  # this rank's shard of the parameter
    view: Tensor  # a view of it, for the graph of one forward


def source(weight: Tensor) -> _Source | None:
    """Return the shard of a gathered weight and the view that was gathered, or None for other tensors."""
    return getattr(weight, "_fastgan_source", None)


class _Kept(NamedTuple):
    """A tensor that a graph saves, as autograd does without hooks."""

    tensor: Tensor
    version: int


class _Regathered(NamedTuple):
    """A gathered weight, or a view of it. The graph saves its shard instead."""

    sharded: Sharded
    local: Tensor
    version: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Weights:
    """The gathered weights of one penalty."""

    def __init__(self) -> None:
        # The key is the storage, which views share. An expired weak reference shows that the storage was freed.
        self._gathered: dict[int, tuple[StorageWeakRef, Sharded, Tensor]] = {}

    def gather(self, sharded: Sharded) -> Tensor:
        """Return the whole weight, differentiable with respect to the sharded parameter."""
        local = sharded.parameter.to_local()
        view = local.view_as(local)
        whole: Tensor = _Gather.apply(view, sharded)  # type: ignore[no-untyped-call]
        if whole.requires_grad:
            whole._fastgan_source = _Source(local, view)  # type: ignore[attr-defined]
        if not sharded.keeps:
            self._remember(whole, sharded, local.detach())
        return whole

    def _remember(self, whole: Tensor, sharded: Sharded, local: Tensor) -> None:
        self._gathered = {key: entry for key, entry in self._gathered.items() if not entry[0].expired()}
        reference = StorageWeakRef(whole.untyped_storage())
        self._gathered[reference.cdata] = reference, sharded, local

    @contextmanager
    def regathered(self) -> Iterator[None]:
        """Inside this context, graphs save shards instead of gathered weights."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _pack(self, tensor: Tensor) -> _Kept | _Regathered:
        if type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided:
            found = self._gathered.get(tensor.untyped_storage()._cdata)
            if found is not None and not found[0].expired() and tensor.dtype == found[1].dtype:
                _, sharded, local = found
                place = tensor.size(), tensor.stride(), int(tensor.storage_offset())
                return _Regathered(sharded, local, sharded.parameter._version, *place)
        return _Kept(tensor.detach(), tensor._version)

    def _unpack(self, packed: _Kept | _Regathered) -> Tensor:
        if isinstance(packed, _Kept):
            _check_version(packed.tensor, packed.version, "a tensor that the backward reads")
            return packed.tensor
        _check_version(packed.sharded.parameter, packed.version, "a sharded weight")
        with torch.no_grad(), torch_private.DisableTorchFunction():
            whole = packed.sharded.gathered(packed.local)
            self._remember(whole, packed.sharded, packed.local)
            return whole.as_strided(packed.size, packed.stride, packed.offset)


def _check_version(tensor: Tensor, version: int, what: str) -> None:
    if tensor._version != version:
        raise RuntimeError(
            f"{what}, of shape {tuple(tensor.shape)}, was modified in place between a penalty's forward and its "
            f"backward (version {tensor._version}, expected {version}): call backward before the optimizer's step"
        )
