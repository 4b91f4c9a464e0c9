"""A call as the kernels see it: taps, factors, position of the first tap, and sizes.

Let z be the input with inserted zeros: z[u i] = x[i], and 0 elsewhere. The result is
y[o] = sum_k f[k] z[o d + k - start]. The transpose is the same operation with u and d exchanged, reversed taps and
start' = K - 1 - start.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from fastgan import torch_private

Pair = tuple[int, int]  # (y, x)


class Taps(NamedTuple):
    """The vertical, then the horizontal taps of a separable filter. Otherwise the rows of its plane."""

    values: tuple[float, ...]
    height: int
    width: int
    separable: bool

    @property
    def shape(self) -> Pair:
        return self.height, self.width

    def flipped(self) -> Taps:
        if not self.separable:
            return self._replace(values=self.values[::-1])
        return self._replace(values=self.values[: self.height][::-1] + self.values[self.height :][::-1])

    def plane(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the filter (h, w)."""
        values = torch.tensor(self.values, dtype=torch.float64)
        if self.separable:
            values = torch.outer(values[: self.height], values[self.height :])
        return values.view(self.height, self.width).to(device, dtype)


class Plan(NamedTuple):
    taps: Taps | Tensor  # a tensor (h, w) where no values can be read, as while a graph is recorded
    up: Pair
    down: Pair
    start: Pair
    in_size: Pair
    out_size: Pair
    backend: str

    def transposed(self) -> Plan:
        taps = self.taps
        start = taps.shape[0] - 1 - self.start[0], taps.shape[1] - 1 - self.start[1]
        flipped = taps.flip((0, 1)) if isinstance(taps, Tensor) else taps.flipped()
        return Plan(flipped, self.down, self.up, start, self.out_size, self.in_size, self.backend)


def image_size(x: Tensor) -> Pair:
    """Return the last two sizes, (H, W). They are constants in a graph of torch.jit.trace."""
    h, w = x.shape[-2:]
    if torch_private.jit_trace() is None:
        return h, w
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # converting a size to a number
        return int(h), int(w)


def is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format
