"""Multilayer perceptrons for points: a small one, and PacGAN's networks for mode-collapse experiments."""

from __future__ import annotations

from torch import Tensor, nn

PACGAN_UNITS = 200


def hidden(inputs: int, width: int) -> nn.Sequential:
    """Three hidden layers of ``width`` units: (N, inputs) -> (N, width)."""
    layers: list[nn.Module] = []
    for size in (inputs, width, width):
        layers += [nn.Linear(size, width), nn.LeakyReLU(0.1, inplace=True)]
    return nn.Sequential(*layers)


def mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(*hidden(inputs, width), nn.Linear(width, outputs))


def pacgan_generator(latent_dim: int, outputs: int) -> nn.Sequential:
    """Four hidden layers of 400 units with batch norm and ReLU, Lin et al. 2018."""
    layers: list[nn.Module] = []
    for size in (latent_dim, 400, 400, 400):
        layers += [nn.Linear(size, 400), nn.BatchNorm1d(400), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(400, outputs))


def pacgan_features(inputs: int) -> nn.Sequential:
    """Three hidden layers of 200 maxout units of five pieces: (N, inputs) -> (N, 200)."""
    return nn.Sequential(*(Maxout(size, PACGAN_UNITS, 5) for size in (inputs, PACGAN_UNITS, PACGAN_UNITS)))


class Maxout(nn.Module):
    """(N, inputs) -> (N, outputs), each the maximum of ``pieces`` affine functions, Goodfellow et al. 2013."""

    def __init__(self, inputs: int, outputs: int, pieces: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs * pieces)
        self.pieces = pieces

    def forward(self, x: Tensor) -> Tensor:
        pieces = self.linear(x).unflatten(1, (-1, self.pieces))  # (N, outputs, pieces)
        largest: Tensor = pieces.max(2).values
        return largest
