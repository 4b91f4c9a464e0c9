from __future__ import annotations

import math

import pytest
import torch

from fastgan.trainer.losses import LOSSES

REAL = [-2.0, -1.0, 0.5, 1.0, 3.0]
FAKE = [-3.0, -1.0, 0.0, 0.5, 2.0]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize(
    ("name", "discriminator", "generator"),
    [
        ("hinge", mean([max(0, 1 - r) for r in REAL]) + mean([max(0, 1 + f) for f in FAKE]), -mean(FAKE)),
        (
            "non-saturating",
            -mean([math.log(sigmoid(r)) for r in REAL]) - mean([math.log(1 - sigmoid(f)) for f in FAKE]),
            -mean([math.log(sigmoid(f)) for f in FAKE]),
        ),
    ],
)
def test_losses_equal_their_formulas(name, discriminator, generator):
    loss = LOSSES[name]
    real, fake = torch.tensor(REAL, dtype=torch.float64), torch.tensor(FAKE, dtype=torch.float64)
    assert loss.discriminator(real, fake).item() == pytest.approx(discriminator, rel=1e-12)
    assert loss.generator(fake).item() == pytest.approx(generator, rel=1e-12)


def test_the_non_saturating_loss_stays_finite_where_the_logarithm_would_not():
    extreme = torch.tensor([-1e4, 1e4])
    loss = LOSSES["non-saturating"]
    assert loss.discriminator(extreme, extreme).item() == 1e4
    assert loss.generator(extreme).item() == 5e3
