"""DCGAN, Radford et al. 2016: strided convolutions that double the side from 4 up."""

from __future__ import annotations

import math

from torch import nn

from fastgan.trainer.models.layers import SMALLEST, Shape, channels_at


def generator(latent_dim: int, width: int, shape: Shape) -> nn.Sequential:
    """Convolutions have no biases, because batch norm follows."""
    first = shape.smallest(channels_at(SMALLEST, width))
    layers: list[nn.Module] = [
        nn.Linear(latent_dim, math.prod(first), bias=False),
        nn.Unflatten(1, first),  # (N, 4W, 4, ...)
        shape.batch_norm(first[0]),
        nn.ReLU(inplace=True),
    ]
    inputs = first[0]
    for size in shape.sizes[1:-1]:
        outputs = channels_at(size, width)
        layers += [
            shape.conv_transpose(inputs, outputs, 4, stride=2, padding=1, bias=False),
            shape.batch_norm(outputs),
            nn.ReLU(inplace=True),
        ]
        inputs = outputs
    return nn.Sequential(
        *layers, shape.conv_transpose(inputs, shape.channels, 4, stride=2, padding=1), nn.Tanh()
    )  # (N, C, S, ...)


def features(width: int, shape: Shape, channels: int) -> nn.Sequential:
    """The mirror image of the generator, without batch norm: spectral norm or a penalty bounds the layers instead."""
    layers: list[nn.Module] = []
    for size in reversed(shape.sizes[:-1]):
        outputs = channels_at(size, width)
        layers += [shape.conv(channels, outputs, 4, stride=2, padding=1), nn.LeakyReLU(0.1, inplace=True)]
        channels = outputs
    return nn.Sequential(*layers)


def feature_shape(width: int, shape: Shape) -> tuple[int, ...]:
    return shape.smallest(channels_at(SMALLEST, width))
