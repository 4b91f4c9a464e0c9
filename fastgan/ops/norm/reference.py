"""PyTorch's own normalizations: the reference, the fallback and the benchmark's baseline."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import batch_norm, group_norm, instance_norm, layer_norm

from fastgan.ops.library import accumulation_dtype
from fastgan.ops.norm.layout import Layout

__all__ = ["batch_norm", "group_norm", "instance_norm", "layer_norm", "normalized_rows"]


def normalized_rows(x: Tensor, weight: Tensor | None, bias: Tensor | None, layout: Layout, eps: float) -> Tensor:
    """Compute any of these norms with elementary operations.

    Its derivatives are correct to every order. Those of PyTorch's batch, layer and instance norm are wrong from the
    third order on, because PyTorch treats the statistics saved by the forward as constants.
    """
    moved = x.movedim(1, -1) if layout.channels_last else x
    channels = layout.groups, layout.channels // layout.groups
    inner = () if layout.channels_last else (layout.inner,)
    shape = layout.samples, layout.inner if layout.channels_last else layout.segments, *channels, *inner
    of_row = [1, *range(3, len(shape))]
    y = moved.reshape(shape).to(accumulation_dtype(x.dtype))
    y = y - y.mean(of_row, keepdim=True)
    y = y * (y.square().mean(of_row, keepdim=True) + eps).rsqrt()
    along = *channels, *(1 for _ in inner)
    if weight is not None:
        y = y * weight.reshape(along).to(y.dtype)
    if bias is not None:
        y = y + bias.reshape(along).to(y.dtype)
    y = y.reshape(moved.shape).to(x.dtype)
    return y.movedim(-1, 1) if layout.channels_last else y
