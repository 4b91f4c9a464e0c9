"""Minibatch discrimination in memory linear in the batch, fused up to the second derivative, across ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist

from fastgan import backends
from fastgan.ops.library import symbolic
from fastgan.ops.minibatch_discrimination.autograd import discriminate
from fastgan.ops.minibatch_discrimination.ranks import Group

__all__ = ["minibatch_discrimination"]

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@symbolic
def minibatch_discrimination(
    activations: Tensor,
    *,
    exclude_self: bool = True,
    segments: Tensor | None = None,
    process_group: Group | None = None,
    backend: str | None = None,
) -> Tensor:
    """How close a sample is to the others of its batch: o[i, b] = sum over j of exp(-sum_c |m[i, b, c] - m[j, b, c]|).

    Nothing of the size N x N is stored up to the second derivative: memory is O(N B C). Sums are kept in float32
    (float64 for float64); the same inputs give the same bits.

    Args:
        activations: m, (N, B, C), float16, bfloat16, float32 or float64. Where N, B or C is 0 there is nothing to
            compare, and o is a sum over nothing or over exp(0).
        exclude_self: leave out j = i.
        segments: (N,) integers: only j of the same segment count, real and fake halves apart, say.
        process_group: j runs over the samples of all its ranks, each of which passes as many and takes every
            derivative that the others take; a gradient is that of the sum of all ranks' losses. None: this process's.
        backend: run on this backend instead of the fastest.

    Returns:
        (N, B), of the dtype of the activations.

    Raises:
        TypeError: something is not a tensor, a bool or a process group, or a dtype is not as above.
        ValueError: a shape or device is not as above.
        BackendUnavailable: the backend asked for cannot run here.

    Differentiable to any order, with 0 for the derivative of |.| at 0. From the third order on PyTorch's operations
    hold every pair of samples at once. Source: Salimans et al., Improved Techniques for Training GANs (2016).
    """
    if not isinstance(activations, Tensor):
        raise TypeError(f"activations must be a tensor, got {type(activations).__name__}")
    if activations.dtype not in _DTYPES:
        raise TypeError(f"activations must be float16, bfloat16, float32 or float64, got {activations.dtype}")
    if activations.ndim != 3:
        raise ValueError(f"activations must be (N, B, C), got shape {tuple(activations.shape)}")
    if not isinstance(exclude_self, bool):
        raise TypeError(f"exclude_self must be a bool, got {type(exclude_self).__name__}")
    if segments is not None:
        _check_segments(segments, activations)
    if process_group is not None and not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        raise TypeError(f"process_group must be a process group or None, got {type(process_group).__name__}")
    chosen = backends.select("minibatch_discrimination", activations.device, activations.dtype, backend)
    if not activations.numel():
        chosen = "reference"  # nothing to compute
    return discriminate(activations, segments, exclude_self, process_group, chosen)


def _check_segments(segments: Tensor, activations: Tensor) -> None:
    if not isinstance(segments, Tensor):
        raise TypeError(f"segments must be a tensor or None, got {type(segments).__name__}")
    if segments.dtype not in _INTEGERS:
        raise TypeError(f"segments must be integers, got {segments.dtype}")
    if segments.shape != activations.shape[:1]:
        raise ValueError(f"segments must have shape ({len(activations)},), got {tuple(segments.shape)}")
    if segments.device != activations.device:
        raise ValueError(
            f"segments must be on the device of the activations, {activations.device}, got {segments.device}"
        )
