"""Generators for timed training steps, built from PyTorch's layers."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

LATENT = 128


def dcgan(channels: tuple[int, ...] = (512, 256, 128, 64), pixels: int = 64) -> nn.Module:
    """Radford et al. (2016): transposed convolutions, batch norm and ReLU."""
    side = pixels >> len(channels)
    layers: list[nn.Module] = [nn.Linear(LATENT, channels[0] * side * side), nn.Unflatten(1, (channels[0], side, side))]
    for a, b in pairwise(channels):
        layers += [nn.BatchNorm2d(a), nn.ReLU(), nn.ConvTranspose2d(a, b, 4, 2, 1)]
    last = nn.ConvTranspose2d(channels[-1], 3, 4, 2, 1)
    return nn.Sequential(*layers, nn.BatchNorm2d(channels[-1]), nn.ReLU(), last, nn.Tanh())


class _UpBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1, self.conv2 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.interpolate(F.relu(self.norm1(x)), scale_factor=2))
        return self.conv2(F.relu(self.norm2(h))) + F.interpolate(self.skip(x), scale_factor=2)  # type: ignore[no-any-return]


def resnet(widths: tuple[int, ...] = (512, 256, 128, 64, 32), pixels: int = 64) -> nn.Module:
    """Miyato et al. (2018), without class labels: residual blocks that double the image."""
    side = pixels >> (len(widths) - 1)
    blocks = [_UpBlock(a, b) for a, b in pairwise(widths)]
    return nn.Sequential(
        nn.Linear(LATENT, widths[0] * side * side),
        nn.Unflatten(1, (widths[0], side, side)),
        *blocks,
        nn.BatchNorm2d(widths[-1]),
        nn.ReLU(),
        nn.Conv2d(widths[-1], 3, 3, padding=1),
        nn.Tanh(),
    )
