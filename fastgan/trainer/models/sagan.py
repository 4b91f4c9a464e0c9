"""SAGAN's residual networks, Zhang et al. 2019: SNGAN's blocks and self-attention at one resolution.

The attention is a scaled dot product over the positions of an image, with one head. Its result is multiplied by a
learned factor that starts at zero, so that a network first learns from its neighborhoods.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgan.trainer.models import resnet
from fastgan.trainer.models.layers import SMALLEST, Shape, channels_at

MOST_TOKENS = 1024  # positions that attend to each other
REDUCTION = 8  # of the channels of queries and keys


class SelfAttention(nn.Module):
    """x + factor * attention(x), for x (N, C, S, ...)"""

    def __init__(self, shape: Shape, channels: int) -> None:
        super().__init__()
        inner = max(1, channels // REDUCTION)
        self.query = shape.conv(channels, inner, 1, bias=False)
        self.key = shape.conv(channels, inner, 1, bias=False)
        self.value = shape.conv(channels, max(1, channels // 2), 1, bias=False)
        self.out = shape.conv(max(1, channels // 2), channels, 1, bias=False)
        self.factor = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        # (N, 1, S * ..., channels)
        query, key, value = (conv(x).flatten(2).mT.unsqueeze(1) for conv in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(query, key, value).squeeze(1).mT
        y: Tensor = x + self.factor * self.out(attended.unflatten(2, x.shape[2:]))
        return y


def attended_size(shape: Shape) -> int:
    """Return the largest resolution below the sample's that has at most MOST_TOKENS positions."""
    fits = [size for size in shape.sizes[:-1] if math.prod(shape.sides_at(size)) <= MOST_TOKENS]
    return max([SMALLEST, *fits])


def generator(latent_dim: int, width: int, shape: Shape) -> nn.Sequential:
    layers = list(resnet.generator(latent_dim, width, shape))
    size = attended_size(shape)
    blocks = 2 + shape.sizes.index(size)  # a linear layer, a reshape, then a block for each doubling of the side
    return nn.Sequential(*layers[:blocks], SelfAttention(shape, channels_at(size, width)), *layers[blocks:])


def features(width: int, shape: Shape, channels: int) -> nn.Sequential:
    layers = list(resnet.features(width, shape, channels))
    size = attended_size(shape)
    blocks = shape.sizes[::-1].index(size)
    return nn.Sequential(*layers[:blocks], SelfAttention(shape, channels_at(size, width)), *layers[blocks:])


def feature_shape(width: int, shape: Shape) -> tuple[int, ...]:
    return resnet.feature_shape(width, shape)
