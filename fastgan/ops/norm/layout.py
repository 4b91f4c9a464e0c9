"""The layout in which the kernels see an input, and the operands of each kernel."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from torch import Tensor


class Layout(NamedTuple):
    """An input as (samples, segments, channels, inner), or as (samples, inner, channels) if channels are last.

    A row is the set of values that share a mean and a variance: one of the ``groups`` of channels of a sample, over all
    segments and inner positions. LayerNorm is (N, 1, M, 1) with one group, so each element of a row has its own weight.
    BatchNorm is (1, N, C, inner) with C groups.
    """

    samples: int
    segments: int
    channels: int
    inner: int
    groups: int
    channels_last: bool = False

    @property
    def rows(self) -> int:
        return self.samples * self.groups


def of_channels(x: Tensor, groups: int) -> Layout:
    """Return the layout whose rows are groups of channels of each sample of (N, C, *)."""
    batch, channels, *spatial = x.shape
    return Layout(batch, 1, channels, prod(spatial), groups, channels_last(x))


def of_batch(x: Tensor) -> Layout:
    """Return the layout whose rows are the channels of (N, C, *), over all samples."""
    batch, channels, *spatial = x.shape
    inner = prod(spatial)
    if inner == 1 or channels_last(x):
        return Layout(1, 1, channels, batch * inner, channels, True)
    return Layout(1, batch, channels, inner, channels)


def channels_last(x: Tensor) -> bool:
    return x.ndim in (4, 5) and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


class Forward(NamedTuple):
    """``statistics`` is (2, rows) or (3, rows): mean, 1 / sqrt(var + eps) and, if present, the unbiased variance."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    y: Tensor
    statistics: Tensor


class Backward(NamedTuple):
    dy: Tensor
    x: Tensor
    statistics: Tensor
    weight: Tensor | None
    dx: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None


class DoubleBackward(NamedTuple):
    """``h``, ``h_weight`` and ``h_bias`` are the gradients of dx, dweight and dbias."""

    h: Tensor | None
    h_weight: Tensor | None
    h_bias: Tensor | None
    dy: Tensor
    x: Tensor
    statistics: Tensor
    weight: Tensor | None
    by_dy: Tensor | None
    by_x: Tensor | None
    by_weight: Tensor | None
