"""Discriminators for timed training steps: the layers of published networks, with adjustable width and resolution.

They use PyTorch's layers only; ``fastgan.convert`` must find what it can replace.
"""

from __future__ import annotations

from itertools import pairwise
from math import log2

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations


def critic(channels: tuple[int, ...] = (3, 32, 64, 128, 128), pixels: int = 64) -> nn.Module:
    """Strided convolutions and leaky ReLUs."""
    layers = [m for a, b in pairwise(channels) for m in (nn.Conv2d(a, b, 4, 2, 1), nn.LeakyReLU(0.2))]
    side = pixels >> (len(channels) - 1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * side * side, 1))


def layer_norm_critic(width: int, pixels: int = 64) -> nn.Module:
    """Gulrajani et al. (2017): like `critic`, with LayerNorm before each activation except the first."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
    for level in range(1, 4):
        inputs, outputs, side = width << (level - 1), width << level, pixels >> (level + 1)
        layers += [nn.Conv2d(inputs, outputs, 4, 2, 1), nn.LayerNorm([outputs, side, side]), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear((width << 3) * (pixels >> 4) ** 2, 1))


def mlp(width: int = 512, depth: int = 3) -> nn.Module:
    """A critic for toy distributions in the plane."""
    sizes = [2, *[width] * depth]
    return nn.Sequential(
        *(m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.LeakyReLU(0.2))), nn.Linear(width, 1)
    )


class _SpectralBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, *, first: bool = False, down: bool = True) -> None:
        super().__init__()
        self.first, self.down = first, down
        self.conv1 = parametrizations.spectral_norm(nn.Conv2d(inputs, outputs, 3, padding=1))
        self.conv2 = parametrizations.spectral_norm(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = parametrizations.spectral_norm(nn.Conv2d(inputs, outputs, 1)) if down else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x))))
        skip = self.skip(x)
        return F.avg_pool2d(h, 2) + F.avg_pool2d(skip, 2) if self.down else h + skip


class SNGANResNet(nn.Module):
    """Miyato et al. (2018), without class labels: five blocks that halve the image and one that does not."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        widths = [3, *(width << level for level in range(5))]
        blocks = [_SpectralBlock(a, b, first=a == 3) for a, b in pairwise(widths)]
        self.blocks = nn.Sequential(*blocks, _SpectralBlock(widths[-1], widths[-1], down=False))
        self.head = parametrizations.spectral_norm(nn.Linear(widths[-1], 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.blocks(x)).sum((2, 3)))  # type: ignore[no-any-return]


class MinibatchStdDev(nn.Module):
    """Karras et al. (2018): append one channel with the standard deviation within groups of four samples."""

    def forward(self, x: Tensor) -> Tensor:
        samples, channels, height, width = x.shape
        groups = x.reshape(min(4, samples), -1, channels, height, width)
        deviation = (groups.var(0, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))
        return torch.cat([x, deviation.repeat(len(groups)).view(-1, 1, 1, 1).expand(-1, 1, height, width)], 1)


class _StyleBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(inputs, inputs, 3, padding=1), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.conv2(F.leaky_relu(self.conv1(x), 0.2)), 0.2)
        return (F.avg_pool2d(h, 2) + self.skip(F.avg_pool2d(x, 2))) * 0.5**0.5  # type: ignore[no-any-return]


class StyleGAN2(nn.Module):
    """Karras et al. (2020): residual blocks down to 4 x 4, optional minibatch standard deviation, two dense layers."""

    def __init__(self, pixels: int, width: int, widest: int = 512, *, stddev: bool = True) -> None:
        super().__init__()
        widths = [min(width << level, widest) for level in range(int(log2(pixels)) - 1)]
        self.first = nn.Conv2d(3, widths[0], 1)
        self.blocks = nn.Sequential(*(_StyleBlock(a, b) for a, b in pairwise(widths)))
        self.stddev = MinibatchStdDev() if stddev else nn.Identity()
        self.conv = nn.Conv2d(widths[-1] + stddev, widths[-1], 3, padding=1)
        self.dense, self.head = nn.Linear(16 * widths[-1], widths[-1]), nn.Linear(widths[-1], 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(F.leaky_relu(self.first(x), 0.2))
        h = F.leaky_relu(self.conv(self.stddev(h)), 0.2)
        return self.head(F.leaky_relu(self.dense(h.flatten(1)), 0.2))  # type: ignore[no-any-return]


class _R3Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, 2 * width, 1)
        self.conv2 = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=width // 8)  # 16 channels per group
        self.conv3 = nn.Conv2d(2 * width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.conv2(F.leaky_relu(self.conv1(x), 0.2)), 0.2)
        return x + self.conv3(h)  # type: ignore[no-any-return]


class R3GAN(nn.Module):
    """Huang et al. (2024): inverted bottlenecks with grouped convolutions, no normalization, down to 4 x 4."""

    def __init__(self, pixels: int, width: int, widest: int = 768) -> None:
        super().__init__()
        widths = [min(width << level, widest) for level in range(int(log2(pixels)) - 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 1), _R3Block(widths[0]), _R3Block(widths[0])]
        for a, b in pairwise(widths):
            layers += [nn.AvgPool2d(2), nn.Conv2d(a, b, 1, bias=False), _R3Block(b), _R3Block(b)]
        self.blocks, self.head = nn.Sequential(*layers), nn.Linear(16 * widths[-1], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).flatten(1))  # type: ignore[no-any-return]
