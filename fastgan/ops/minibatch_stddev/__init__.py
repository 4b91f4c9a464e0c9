"""Minibatch standard deviation: shows the discriminator how much the samples of a group differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops.library import symbolic
from fastgan.ops.minibatch_stddev import reference
from fastgan.ops.minibatch_stddev.autograd import append_stddev
from fastgan.ops.minibatch_stddev.grouping import size_of_groups

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # not in every build of PyTorch

__all__ = ["minibatch_stddev"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_REMAINDERS = ("error", "largest-divisor")


@symbolic
def minibatch_stddev(
    x: Tensor,
    *,
    group_size: int | None = 4,
    num_channels: int = 1,
    eps: float = 1e-8,
    remainder: Literal["error", "largest-divisor"] = "error",
    process_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """Append the standard deviation over groups of samples, averaged over channels and positions, as new channels.

    With G = min(group_size, N), sample n belongs to group n % (N / G). The channels are split into F = num_channels
    blocks of C / F channels. For each group and block, the statistic is the mean of sqrt(var + eps) over the block and
    over all positions, where var is the biased variance over the G members. It is computed in float32 (float64 for
    float64 input) and rounded once to the dtype of x. The same inputs give the same bits. The result is channels_last
    if the input is, and contiguous otherwise.

    Order of derivative: any. PyTorch operations compute the third and higher orders.

    Source: Karras et al., Progressive Growing of GANs (2018). The groups are from Karras et al., StyleGAN (2019).

    ```python
    import torch
    import fastgan

    y = fastgan.ops.minibatch_stddev(torch.randn(8, 32, 4, 4), group_size=4)
    assert y.shape == (8, 33, 4, 4)
    ```

    Args:
        x: (N, C, *S); float16, bfloat16, float32 or float64. S may be empty.
        group_size: number of samples in a group. None: the whole batch.
        num_channels: number of appended channels, a divisor of C.
        eps: added to the variance, greater than 0.
        remainder: what to do if G does not divide N. ``"error"`` raises, and ``"largest-divisor"`` replaces G by the
            largest divisor of N that is not greater than G.
        process_group: form groups over the batches of all ranks, concatenated in the order of the ranks. The ranks may
            have different N. Gradients are those of the sum of all ranks' losses. Every rank must make the same calls
            and take the same derivatives. This runs in PyTorch.
        backend: name of the backend to use. None: the fastest one.

    Returns:
        (N, C + num_channels, *S), dtype of x.

    Raises:
        TypeError: ``x`` is not a tensor, or has an unsupported dtype.
        ValueError: a shape or number does not fit.
        BackendUnavailable: the requested backend cannot run here.
    """
    _check(x, group_size, num_channels, eps, remainder)
    if process_group is not None:
        from fastgan.ops.minibatch_stddev import across_ranks

        backends.select("minibatch_stddev_across_ranks", x.device, x.dtype, backend)
        return across_ranks.minibatch_stddev(x, group_size, num_channels, eps, remainder, process_group)
    size = size_of_groups(len(x), group_size, remainder)
    chosen = backends.select("minibatch_stddev", x.device, x.dtype, backend)
    if chosen == "reference":
        return reference.minibatch_stddev(x, size, num_channels, eps)
    return append_stddev(x, size, num_channels, eps, chosen)


def _check(x: Tensor, group_size: int | None, num_channels: int, eps: float, remainder: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.ndim < 2 or not x.numel():
        raise ValueError(f"x must be (N, C, *S) with at least one element, got shape {tuple(x.shape)}")
    check_settings(group_size, num_channels, eps, remainder)
    if x.shape[1] % num_channels:
        raise ValueError(f"num_channels must divide the {x.shape[1]} channels of x, got {num_channels}")


def check_settings(group_size: int | None, num_channels: int, eps: float, remainder: str) -> None:
    """Check the settings that do not depend on the input."""
    if group_size is not None and (not isinstance(group_size, int) or group_size < 1):
        raise ValueError(f"group_size must be a positive integer or None, got {group_size!r}")
    if not isinstance(num_channels, int) or num_channels < 1:
        raise ValueError(f"num_channels must be a positive integer, got {num_channels!r}")
    if not isinstance(eps, float | int) or not eps > 0:
        raise ValueError(f"eps must be a positive number, got {eps!r}")
    if remainder not in _REMAINDERS:
        raise ValueError(f"remainder must be one of {_REMAINDERS}, got {remainder!r}")
