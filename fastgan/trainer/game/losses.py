"""GAN losses on logits. A loss is a pair of functions, for the discriminator and for the generator."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import relu, softplus

from fastgan.trainer.game.names import LossName as LossName


class Loss(NamedTuple):
    """The functions that the discriminator and the generator minimize.

    Both functions take (real logits, fake logits) of equal shape and return a scalar. Only relativistic generators use
    the real logits; for other losses they may be None.
    """

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor | None, Tensor], Tensor]
    boundary: float | None = 0.0  # logit that separates real from fake; None if only differences of logits matter
    relativistic: bool = False


def non_saturating_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """-mean(log sigmoid(real)) - mean(log(1 - sigmoid(fake))), Goodfellow et al. 2014."""
    return softplus(-real).mean() + softplus(fake).mean()


def non_saturating_generator(real: Tensor | None, fake: Tensor) -> Tensor:
    """-mean(log sigmoid(fake))"""
    return softplus(-fake).mean()


def saturating_generator(real: Tensor | None, fake: Tensor) -> Tensor:
    """mean(log(1 - sigmoid(fake))), the minimax game. Its gradient vanishes if the discriminator is confident."""
    return -softplus(fake).mean()


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """mean(max(0, 1 - real)) + mean(max(0, 1 + fake)), Lim & Ye 2017."""
    return relu(1 - real).mean() + relu(1 + fake).mean()


def linear_generator(real: Tensor | None, fake: Tensor) -> Tensor:
    """-mean(fake)"""
    return -fake.mean()


def least_squares_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """mean((real - 1)^2) / 2 + mean(fake^2) / 2, Mao et al. 2017."""
    return ((real - 1).square().mean() + fake.square().mean()) / 2


def least_squares_generator(real: Tensor | None, fake: Tensor) -> Tensor:
    """mean((fake - 1)^2) / 2"""
    return (fake - 1).square().mean() / 2


def wasserstein_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """mean(fake) - mean(real), Arjovsky et al. 2017. It needs a smooth discriminator, for example through a penalty."""
    return fake.mean() - real.mean()


def relativistic_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """mean_i softplus(fake_i - real_i), Jolicoeur-Martineau 2018; with R1 and R2, R3GAN (Huang et al. 2024)."""
    return softplus(fake - real).mean()


def relativistic_generator(real: Tensor | None, fake: Tensor) -> Tensor:
    """mean_i softplus(real_i - fake_i)"""
    assert real is not None
    return softplus(real - fake).mean()


LOSSES: dict[LossName, Loss] = {
    "non-saturating": Loss(non_saturating_discriminator, non_saturating_generator),
    "saturating": Loss(non_saturating_discriminator, saturating_generator),
    "hinge": Loss(hinge_discriminator, linear_generator),
    "least-squares": Loss(least_squares_discriminator, least_squares_generator, boundary=0.5),
    "wasserstein": Loss(wasserstein_discriminator, linear_generator, boundary=None),
    "relativistic": Loss(relativistic_discriminator, relativistic_generator, boundary=None, relativistic=True),
}
