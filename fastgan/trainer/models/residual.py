"""Residual networks without normalization, as in StyleGAN2 (Karras et al. 2020) and R3GAN (Huang et al. 2024).

A stage is two bottleneck blocks, x + 1x1(act(3x3 grouped(act(1x1(x))))). Resampling between stages uses averages. The
last convolution of a block is initialized to zero, so that a deep network starts like a shallow one (Fixup, Zhang et
al. 2019). The discriminator is piecewise affine throughout, which makes R1 and R2 in every step cheap.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from fastgan.trainer.models.layers import SMALLEST, Shape, channels_at

BLOCKS = 2  # per stage
GROUP = 16  # channels that a 3x3 convolution mixes
SLOPE = 0.2


class Block(nn.Module):
    def __init__(self, shape: Shape, channels: int, blocks: int) -> None:
        super().__init__()
        inner = 2 * channels
        first = shape.conv(channels, inner, 1)
        second = shape.conv(inner, inner, 3, padding=1, groups=max(1, inner // GROUP), bias=False)
        last = shape.conv(inner, channels, 1, bias=False)
        for conv in (first, second):
            # Fixup with three layers per branch: scale He's initialization of the first two by blocks^(-1/4).
            nn.init.kaiming_normal_(conv.weight, SLOPE)
            conv.weight.data.mul_(blocks**-0.25)
        nn.init.zeros_(last.weight)
        self.residual = nn.Sequential(
            first, nn.LeakyReLU(SLOPE, inplace=True), second, nn.LeakyReLU(SLOPE, inplace=True), last
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.residual(x)
        return y


def stage(shape: Shape, channels: int) -> list[nn.Module]:
    blocks = BLOCKS * len(shape.sizes)
    return [Block(shape, channels, blocks) for _ in range(BLOCKS)]


def generator(latent_dim: int, width: int, shape: Shape) -> nn.Sequential:
    first = shape.smallest(channels_at(SMALLEST, width))
    inputs = first[0]
    layers: list[nn.Module] = [nn.Linear(latent_dim, math.prod(first)), nn.Unflatten(1, first), *stage(shape, inputs)]
    for size in shape.sizes[1:]:
        outputs = channels_at(size, width)
        if outputs != inputs:
            layers.append(shape.conv(inputs, outputs, 1, bias=False))
        layers += [nn.Upsample(scale_factor=2), *stage(shape, outputs)]
        inputs = outputs
    return nn.Sequential(*layers, shape.conv(inputs, shape.channels, 1))


def features(width: int, shape: Shape, channels: int) -> nn.Sequential:
    sizes = list(reversed(shape.sizes))
    inputs = channels_at(sizes[0], width)
    layers: list[nn.Module] = [shape.conv(channels, inputs, 1)]
    for size in sizes[1:]:
        outputs = channels_at(size, width)
        layers += [*stage(shape, inputs), shape.halve()]
        if outputs != inputs:
            layers.append(shape.conv(inputs, outputs, 1, bias=False))
        inputs = outputs
    return nn.Sequential(*layers, *stage(shape, inputs))


def feature_shape(width: int, shape: Shape) -> tuple[int, ...]:
    return shape.smallest(channels_at(SMALLEST, width))
