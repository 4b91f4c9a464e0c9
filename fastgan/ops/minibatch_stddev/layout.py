"""The layout in which the kernels see an input."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Layout(NamedTuple):
    """Sample ``g * groups + m`` is member g of group m. In memory it is (outer, features, run).

    A sample of the result is (outer, features * run + features * tail): the values, then each statistic ``tail`` times.
    Contiguous (N, C, *S): outer 1, run C / F * S, tail S. channels_last: outer S, run C / F, tail 1.
    """

    groups: int
    size: int
    outer: int
    features: int
    run: int
    tail: int

    @property
    def values(self) -> int:
        """The number of values in a group and block, over all members of the group."""
        return self.outer * self.run * self.size


def layout_of(x: Tensor, size: int, features: int) -> Layout:
    samples, channels, *spatial = x.shape
    inner = prod(spatial)
    if not x.is_contiguous() and x.ndim in _CHANNELS_LAST and x.is_contiguous(memory_format=_CHANNELS_LAST[x.ndim]):
        return Layout(samples // size, size, inner, features, channels // features, 1)
    return Layout(samples // size, size, 1, features, channels // features * inner, inner)


def memory_format(layout: Layout, ndim: int) -> torch.memory_format:
    return torch.contiguous_format if layout.outer == 1 else _CHANNELS_LAST[ndim]
