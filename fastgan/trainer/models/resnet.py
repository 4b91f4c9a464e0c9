"""SNGAN's residual networks, Miyato et al. 2018: two 3x3 convolutions per block, nearest up, average down."""

from __future__ import annotations

import itertools
import math

from torch import Tensor, nn

from fastgan.trainer.models.layers import SMALLEST, Shape, channels_at


class Up(nn.Module):
    """(N, C, S, ...) -> (N, D, 2S, ...). Convolutions have no biases, because batch norm follows."""

    def __init__(self, shape: Shape, inputs: int, outputs: int) -> None:
        super().__init__()
        self.shortcut = nn.Sequential(nn.Upsample(scale_factor=2), shape.conv(inputs, outputs, 1, bias=False))
        self.residual = nn.Sequential(
            *(shape.batch_norm(inputs), nn.ReLU(), nn.Upsample(scale_factor=2)),
            *(shape.conv(inputs, outputs, 3, padding=1, bias=False), shape.batch_norm(outputs), nn.ReLU()),
            shape.conv(outputs, outputs, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.shortcut(x) + self.residual(x)
        return y


class Down(nn.Module):
    """(N, C, S, ...) -> (N, D, S/2, ...). The first block of a discriminator has no ReLU at its input."""

    def __init__(self, shape: Shape, inputs: int, outputs: int, first: bool) -> None:
        super().__init__()
        # A 1x1 convolution and an average commute. This order is cheaper.
        self.shortcut = nn.Sequential(shape.halve(), shape.conv(inputs, outputs, 1))
        self.residual = nn.Sequential(
            *([] if first else [nn.ReLU()]),
            *(shape.conv(inputs, outputs, 3, padding=1), nn.ReLU(inplace=True)),
            *(shape.conv(outputs, outputs, 3, padding=1), shape.halve()),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.shortcut(x) + self.residual(x)
        return y


def generator(latent_dim: int, width: int, shape: Shape) -> nn.Sequential:
    first = shape.smallest(channels_at(SMALLEST, width))
    channels = [channels_at(size, width) for size in shape.sizes]
    blocks = [Up(shape, inputs, outputs) for inputs, outputs in itertools.pairwise(channels)]
    return nn.Sequential(
        *(nn.Linear(latent_dim, math.prod(first), bias=False), nn.Unflatten(1, first), *blocks),
        *(shape.batch_norm(channels[-1]), nn.ReLU(inplace=True)),
        *(shape.conv(channels[-1], shape.channels, 3, padding=1), nn.Tanh()),
    )


def features(width: int, shape: Shape, channels: int) -> nn.Sequential:
    sizes = list(reversed(shape.sizes[:-1]))
    widths = [channels, *(channels_at(size, width) for size in sizes)]
    blocks = [
        Down(shape, inputs, outputs, first=i == 0) for i, (inputs, outputs) in enumerate(itertools.pairwise(widths))
    ]
    return nn.Sequential(*blocks, nn.ReLU(inplace=True), Sum())


def feature_shape(width: int, shape: Shape) -> tuple[int, ...]:
    return (channels_at(SMALLEST, width),)


class Sum(nn.Module):
    """(N, C, *S) -> (N, C)"""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).sum(2)
