"""GAN losses on logits. A loss is a pair: one for the discriminator, one for the generator."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import relu, softplus


class Loss(NamedTuple):
    discriminator: Callable[[Tensor, Tensor], Tensor]  # (real logits, fake logits) -> scalar
    generator: Callable[[Tensor], Tensor]  # (fake logits) -> scalar


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """mean(max(0, 1 - real)) + mean(max(0, 1 + fake)), Lim & Ye 2017."""
    return relu(1 - real).mean() + relu(1 + fake).mean()


def hinge_generator(fake: Tensor) -> Tensor:
    """-mean(fake)"""
    return -fake.mean()


def non_saturating_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """-mean(log sigmoid(real)) - mean(log(1 - sigmoid(fake))), Goodfellow et al. 2014."""
    return softplus(-real).mean() + softplus(fake).mean()


def non_saturating_generator(fake: Tensor) -> Tensor:
    """-mean(log sigmoid(fake))"""
    return softplus(-fake).mean()


LOSSES = {
    "hinge": Loss(hinge_discriminator, hinge_generator),
    "non-saturating": Loss(non_saturating_discriminator, non_saturating_generator),
}
