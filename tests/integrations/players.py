"""A small GAN that uses every op of fastgan, and one step of each player."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgan import nn as fnn
from fastgan import ops
from fastgan.nn.utils import fuse_spectral_norm, spectral_norm

LATENT, SHAPE = 5, (3, 8, 8)


class Generator(nn.Module):
    """With the functional norms and activations."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(LATENT, 96), nn.Conv2d(6, 3, 3, padding=1)
        self.weight, self.bias = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("var", torch.ones(6))

    def forward(self, z: Tensor) -> Tensor:
        h = ops.bias_act(ops.layer_norm(self.linear(z), (96,)), activation="silu").view(-1, 6, 4, 4)
        h = ops.batch_norm(h, self.mean, self.var, self.weight, self.bias, training=self.training)
        h = ops.relu(ops.group_norm(h, 3, self.weight, self.bias), inplace=True)
        h = ops.bias_act(ops.instance_norm(F.interpolate(h, scale_factor=2)), self.bias, clamp=3.0)
        return ops.bias_act(self.conv(h), activation="tanh")


class Discriminator(nn.Module):
    """With fused spectral norm, and minibatch statistics unless these are left out."""

    def __init__(self, minibatch: bool = True) -> None:
        super().__init__()
        statistics = [fnn.MinibatchStdDev(2)] if minibatch else []
        self.features = nn.Sequential(
            spectral_norm(nn.Conv2d(3, 6, 4, 2, 1)),
            nn.LeakyReLU(0.2),
            *statistics,
            spectral_norm(nn.Conv2d(6 + len(statistics), 4, 3)),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
        )
        self.compare = fnn.MinibatchDiscrimination(16, 5, 3) if minibatch else nn.Identity()
        self.head = spectral_norm(nn.Linear(21 if minibatch else 16, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.compare(self.features(x)))


def make_discriminator(minibatch: bool = True) -> nn.Module:
    return fuse_spectral_norm(Discriminator(minibatch))


def discriminator_loss(discriminator: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    return F.softplus(-discriminator(real)).mean() + F.softplus(discriminator(fake)).mean()


def generator_loss(generator: nn.Module, discriminator: nn.Module, z: Tensor) -> Tensor:
    return F.softplus(-discriminator(generator(z))).mean()
