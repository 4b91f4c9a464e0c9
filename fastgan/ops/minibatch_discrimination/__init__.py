"""Minibatch discrimination with memory linear in the batch, fused kernels up to the second derivative, and ranks."""

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
    """Measure the closeness of each sample to the others: o[i, b] = sum_j exp(-sum_c |m[i, b, c] - m[j, b, c]|).

    Up to the second derivative, no tensor of size N x N is stored: memory is O(N B C). Sums are accumulated in float32
    (float64 for float64 input), and the same inputs give the same bits.

    Order of derivative: any. The derivative of |.| at 0 is 0. PyTorch operations compute the third and higher orders;
    these hold every pair of samples at once.

    Source: Salimans et al., Improved Techniques for Training GANs (2016).

    ```python
    import torch
    import fastgan

    closeness = fastgan.ops.minibatch_discrimination(torch.randn(16, 100, 5))  # (16, 100)
    ```

    Args:
        activations: m, (N, B, C); float16, bfloat16, float32 or float64. If N or B is 0, the result is empty. If C is
            0, every distance is 0.
        exclude_self: exclude the pairs with j = i.
        segments: (N,) integers, or None. Only samples of the same segment are compared, for example to keep real and
            fake samples apart.
        process_group: j runs over the samples of all ranks. Every rank must pass the same number of samples and take
            the same derivatives. Gradients are those of the sum of all ranks' losses. None: samples of this process.
        backend: name of the backend to use. None: the fastest one.

    Returns:
        (N, B), dtype of the activations.

    Raises:
        TypeError: an argument is not a tensor, bool or process group, or has an unsupported dtype.
        ValueError: a shape or device does not fit.
        BackendUnavailable: the requested backend cannot run here.
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
