"""Shared parts of the networks: shapes in one to three dimensions, the discriminator's head, labels, spectral norm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastgan.nn as fnn
from fastgan.trainer.config import MinibatchStatistic, SpectralNorm
from fastgan.trainer.data.size import SMALLEST as SMALLEST
from fastgan.trainer.data.size import levels, why_not

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
ConvTranspose = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d

NUM_KERNELS, KERNEL_DIM = 100, 5  # of minibatch discrimination, as in Salimans et al. 2016


@dataclass(frozen=True)
class Shape:
    """The shape (channels, *sides) of a sample. ``size`` is the side of a square with as many levels of resolution."""

    channels: int
    size: int
    dims: int
    sides: tuple[int, ...] = ()  # default: equal to size

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> Shape:
        channels, *sides = shape
        problem = why_not(sides) if len(sides) <= 3 else "at most three sides"
        if problem:
            raise ValueError(f"no model supports samples of shape {shape}: {problem}")
        return cls(channels, SMALLEST << levels(sides), len(sides), tuple(sides))

    @property
    def sizes(self) -> list[int]:
        """The sides of a square at each resolution, from the smallest to the sample's. Channels depend on them."""
        return [SMALLEST << i for i in range((self.size // SMALLEST).bit_length())]

    def smallest(self, channels: int) -> tuple[int, ...]:
        return (channels, *self.sides_at(SMALLEST))

    def sides_at(self, size: int) -> tuple[int, ...]:
        """Return the sides at a resolution, which is one of ``sizes``."""
        sides = self.sides or (self.size,) * self.dims
        return tuple(side * size // self.size for side in sides)

    def conv(self, inputs: int, outputs: int, kernel: int, **options: Any) -> Conv:
        """Return a convolution in this number of dimensions."""
        kinds: tuple[type[Conv], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        return kinds[self.dims - 1](inputs, outputs, kernel, **options)

    def conv_transpose(self, inputs: int, outputs: int, kernel: int, **options: Any) -> ConvTranspose:
        kinds: tuple[type[ConvTranspose], ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        return kinds[self.dims - 1](inputs, outputs, kernel, **options)

    def batch_norm(self, channels: int) -> nn.Module:
        return (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[self.dims - 1](channels)

    def halve(self) -> nn.Module:
        return (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[self.dims - 1](2)


def channels_at(size: int, width: int) -> int:
    """Return the number of channels: ``width`` at 16 pixels a side, and twice as many at half the side.

    It is at most 4 * width, and at least min(width, 16).
    """
    return min(4 * width, max(width * 16 // size, min(width, 16)))


class Head(nn.Module):
    """Maps features (N, C, *S) or (N, F) to logits (N, 1) with a linear layer over all features.

    Args:
        shape: (C, *S) or (F,).
        minibatch: batch statistic that the linear layer also sees.
        classes: number of classes; the labels' embedding is projected on the features (Miyato & Koyama 2018).
    """

    def __init__(self, shape: tuple[int, ...], minibatch: MinibatchStatistic, classes: int | None) -> None:
        super().__init__()
        self.statistic, features = minibatch_statistic(minibatch, shape)
        self.linear = nn.Linear(features, 1)
        self.embedding = None if classes is None else nn.Embedding(classes, features)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.statistic(x).flatten(1)  # (N, F)
        logits: Tensor = self.linear(x)
        if self.embedding is not None:
            assert labels is not None
            logits = logits + (self.embedding(labels) * x).sum(1, keepdim=True)
        return logits


def minibatch_statistic(kind: MinibatchStatistic, shape: tuple[int, ...]) -> tuple[nn.Module, int]:
    """Return a layer on features (N, *shape), and the number of features per sample after it."""
    if kind == "stddev":
        return fnn.MinibatchStdDev(remainder="largest-divisor"), math.prod((shape[0] + 1, *shape[1:]))
    if kind == "discrimination":
        features = math.prod(shape)
        layer = fnn.MinibatchDiscrimination(features, NUM_KERNELS, KERNEL_DIM)
        return nn.Sequential(nn.Flatten(), layer), features + NUM_KERNELS
    return nn.Identity(), math.prod(shape)


class Discriminator(nn.Module):
    def __init__(self, features: nn.Module, head: Head) -> None:
        super().__init__()
        self.features, self.head = features, head

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        logits: Tensor = self.head(self.features(x), labels)
        return logits


class Labeled(nn.Module):
    """Wraps a generator of (N, 2 L) to take latents (N, L) and labels (N,). Embedded labels are concatenated to z."""

    def __init__(self, generator: nn.Module, classes: int, latent_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, latent_dim)
        self.generator = generator

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        samples: Tensor = self.generator(torch.cat([z, self.embedding(labels)], 1))
        return samples


class Scale(nn.Module):
    """x -> factor * x"""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x

    def extra_repr(self) -> str:
        return f"{self.factor:g}"


def normalize(model: nn.Module, kind: SpectralNorm, n_power_iterations: int = 1) -> nn.Module:
    """Apply spectral norm to every convolution, linear layer and embedding of `model`, in place."""
    if kind == "none":
        return model
    for layer in list(model.modules()):
        if isinstance(layer, Conv | nn.Linear | nn.Embedding):
            if kind == "torch":
                nn.utils.parametrizations.spectral_norm(layer, n_power_iterations=n_power_iterations)
            else:
                fnn.utils.spectral_norm(layer, n_power_iterations=n_power_iterations)
    return fnn.utils.fuse_spectral_norm(model) if kind == "fused" else model
