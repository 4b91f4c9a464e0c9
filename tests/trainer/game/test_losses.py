from __future__ import annotations

import math

import pytest
import torch

from fastgan.trainer.game.losses import LOSSES

REAL = [-2.0, -1.0, 0.5, 1.0, 3.0]
FAKE = [-3.0, -1.0, 0.0, 0.5, 2.0]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


NON_SATURATING = -mean([math.log(sigmoid(r)) for r in REAL]) - mean([math.log(1 - sigmoid(f)) for f in FAKE])


@pytest.mark.parametrize(
    ("name", "discriminator", "generator"),
    [
        ("hinge", mean([max(0, 1 - r) for r in REAL]) + mean([max(0, 1 + f) for f in FAKE]), -mean(FAKE)),
        ("non-saturating", NON_SATURATING, -mean([math.log(sigmoid(f)) for f in FAKE])),
        ("saturating", NON_SATURATING, mean([math.log(1 - sigmoid(f)) for f in FAKE])),
        (
            "least-squares",
            (mean([(r - 1) ** 2 for r in REAL]) + mean([f**2 for f in FAKE])) / 2,
            mean([(f - 1) ** 2 for f in FAKE]) / 2,
        ),
        ("wasserstein", mean(FAKE) - mean(REAL), -mean(FAKE)),
        (
            "relativistic",
            -mean([math.log(sigmoid(r - f)) for r, f in zip(REAL, FAKE, strict=True)]),
            -mean([math.log(sigmoid(f - r)) for r, f in zip(REAL, FAKE, strict=True)]),
        ),
    ],
)
def test_losses_equal_their_formulas(name, discriminator, generator):
    loss = LOSSES[name]
    real, fake = torch.tensor(REAL, dtype=torch.float64), torch.tensor(FAKE, dtype=torch.float64)
    assert loss.discriminator(real, fake).item() == pytest.approx(discriminator, rel=1e-12)
    assert loss.generator(real, fake).item() == pytest.approx(generator, rel=1e-12)


def test_only_a_relativistic_generator_needs_reals():
    fake = torch.tensor(FAKE)
    for loss in LOSSES.values():
        if not loss.relativistic:
            loss.generator(None, fake)
    assert [name for name, loss in LOSSES.items() if loss.relativistic] == ["relativistic"]


@pytest.mark.parametrize("name", ["non-saturating", "relativistic"])
def test_a_logarithmic_loss_stays_finite_where_the_logarithm_would_not(name):
    low, high = torch.tensor([-1e4]), torch.tensor([1e4])
    loss = LOSSES[name]
    assert loss.discriminator(low, high).item() == 2e4
    assert loss.generator(high, low).item() == {"non-saturating": 1e4, "relativistic": 2e4}[name]


def test_the_saturating_generator_has_no_gradient_where_the_discriminator_is_sure():
    fake = torch.tensor([-30.0], requires_grad=True)
    slopes = {
        name: float(torch.autograd.grad(LOSSES[name].generator(None, fake), fake)[0])
        for name in ("saturating", "non-saturating")
    }
    assert abs(slopes["saturating"]) < 1e-12
    assert slopes["non-saturating"] == pytest.approx(-1)
