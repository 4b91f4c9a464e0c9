from __future__ import annotations

import dataclasses
import re
from typing import Any, get_args

import pytest
import torch
from torch import nn

import fastgan
from fastgan import cli
from fastgan.trainer.config import PRESETS
from fastgan.trainer.data.sources import load_source
from fastgan.trainer.game.regularizer import APPROXIMATE, PenaltyName, Regularizer
from fastgan.trainer.gan import GAN

CPU = torch.device("cpu")
PENALTIES = [name for name in get_args(PenaltyName) if name != "none"]
NORM = 5.0  # of the linear discriminator's gradient, everywhere
ON_LINEAR = {
    "wgan-gp": (NORM - 1) ** 2,
    "wgan-lp": (NORM - 1) ** 2,
    "dragan": (NORM - 1) ** 2,
    "zero-centered": NORM**2,
    "max-gp": NORM**2,
    "r1": NORM**2 / 2,
    "r2": NORM**2 / 2,
    "r1+r2": NORM**2,
    "r1-finite-difference": NORM**2 / 2,
}


def regularizer(penalty: str, *, every: int = 1, kernels: str = "fastgan", together: bool = True) -> Regularizer:
    return Regularizer(penalty, 3.0, every, kernels, together)  # type: ignore[arg-type]


def linear() -> nn.Linear:
    layer = nn.Linear(2, 1).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 4.0]]))
    return layer


def halves(*shape: int) -> tuple[torch.Tensor, ...]:
    """Reals, fakes, no labels, alpha and noise."""
    generator = torch.Generator().manual_seed(1)
    real, fake = (torch.randn(6, *shape, dtype=torch.float64, generator=generator) for _ in range(2))
    alpha, noise = (torch.rand(6, *s, dtype=torch.float64, generator=generator) for s in ((), shape))
    return real, fake, None, alpha, noise  # type: ignore[return-value]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("kernels", ["fastgan", "torch"])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_penalty_of_a_linear_discriminator_is_known(penalty, kernels, together):
    judged = regularizer(penalty, kernels=kernels, together=together)(linear(), *halves(2))
    assert judged.penalty.item() == pytest.approx(3 * ON_LINEAR[penalty], rel=1e-12)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("penalty", ["none", *PENALTIES])
def test_logits_penalty_and_gradients_are_those_of_pytorch_at_kinks_too(penalty, together):
    torch.manual_seed(0)
    pure = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.LeakyReLU(0.2), nn.Conv2d(4, 4, 3), nn.LeakyReLU(0.2)),
        *(nn.Flatten(), nn.Linear(64, 1)),
    ).double()
    results = []
    for kernels in ("torch", "fastgan"):
        judged = regularizer(penalty, kernels=kernels, together=together)(pure, *halves(1, 8, 8))
        loss = judged.real.square().mean() + judged.fake.exp().mean()
        if judged.penalty is not None:
            loss = loss + judged.penalty
        results.append([judged.real, judged.fake, loss, *torch.autograd.grad(loss, list(pure.parameters()))])
    for wanted, got in zip(*results, strict=True):
        # The step depends on the norm of the gradients, so a difference cancels other digits in each.
        rtol = 1e-8 if penalty in APPROXIMATE else 1e-10
        assert torch.allclose(got, wanted, rtol=rtol, atol=1e-2 * rtol)


def test_a_lazy_penalty_comes_at_every_kth_call_and_counts_k_times():
    judge = regularizer("r1", every=3)
    penalties = [judge(linear(), *halves(2)).penalty for _ in range(7)]
    assert [penalty is not None for penalty in penalties] == [True, False, False, True, False, False, True]
    assert penalties[3].item() == pytest.approx(3 * 3 * ON_LINEAR["r1"])


@pytest.mark.parametrize("kernels", ["fastgan", "torch"])
@pytest.mark.parametrize("penalty", ["none", *PENALTIES])
def test_a_discriminator_that_mixes_its_batch_never_sees_reals_beside_fakes(penalty, kernels):
    layer = linear()
    sizes = []
    layer.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    regularizer(penalty, kernels=kernels, together=False)(layer, *halves(2))
    assert set(sizes) == {6}


def test_a_batch_in_parts_counts_once():
    judge = regularizer("r1", every=2)
    penalties = [judge(linear(), *halves(2), part=part).penalty for part in (0, 1, 0, 1, 0)]
    assert [penalty is not None for penalty in penalties] == [True, True, False, False, True]


def test_the_count_goes_on_from_a_state():
    first, second = regularizer("wgan-gp", every=2), regularizer("wgan-gp", every=2)
    first(linear(), *halves(2))
    second.load_state_dict(first.state_dict())
    assert [second(linear(), *halves(2)).penalty is None for _ in range(3)] == [True, False, True]


@pytest.mark.parametrize("penalty", ["wgan-gp", "dragan"])
def test_random_points_lie_between_reals_and_fakes_or_around_the_reals(penalty):
    real, fake, _, alpha, noise = halves(2)
    seen = []
    layer = linear()
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    regularizer(penalty)(layer, real, fake, None, alpha, noise)
    wanted = fake + alpha[:, None] * (real - fake)
    if penalty == "dragan":
        wanted = real + alpha[:, None] * 0.5 * real.std() * noise
    assert torch.allclose(seen[1], wanted)


def test_a_penalty_changes_the_discriminators_step_and_keeps_its_gradient_small():
    def slope(**optim: Any) -> float:
        preset = PRESETS["ring8"][1]
        model = dataclasses.replace(preset.model, spectral_norm="none", width=16, pack=1)
        game = GAN(model, dataclasses.replace(preset.optim, **optim), load_source("ring8", 2, CPU), 0, CPU)
        for _ in range(60):
            game.step()
        x = game.real().requires_grad_()
        (grad,) = torch.autograd.grad(game.discriminator(x).sum(), x)
        return float(grad.norm(dim=1).mean())

    assert slope(penalty="r1", penalty_weight=10.0) < 0.5 * slope()


VERIFY = ["verify", "--dataset", "ring8", "--steps", "2", "--timed-steps", "1", "--device", "cpu"]


@pytest.mark.parametrize("penalty", ["r1", "wgan-gp"])
def test_verify_covers_a_penalty_with_smooth_networks_and_with_kinks(penalty, capsys):
    assert cli.main([*VERIFY, "--penalty", penalty, "--loss", "relativistic"]) == 0
    output = capsys.readouterr().out
    assert f"relativistic loss, penalty {penalty}" in output
    assert len(re.findall("^ +tolerance ", output, flags=re.MULTILINE)) == 2  # one table in float32, one in float64


def test_a_difference_of_forwards_has_nearly_the_gradient_of_r1():
    torch.manual_seed(0)
    smooth = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    grads = []
    for penalty in ("r1", "r1-finite-difference"):
        judged = regularizer(penalty)(smooth, *halves(2))
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(judged.penalty, smooth[0].parameters())]))
    assert not torch.equal(*grads)
    assert torch.allclose(*grads, rtol=1e-6, atol=1e-8)


def test_verify_refuses_an_approximation(capsys):
    assert cli.main([*VERIFY, "--penalty", "r1-finite-difference"]) == 2
    assert "penalty r1-finite-difference is an approximation" in capsys.readouterr().err


def test_a_penalty_whose_gradient_is_lost_makes_verify_fail(monkeypatch, capsys):
    correct = fastgan.logits_and_penalty

    def detached(*args: Any, **kwargs: Any) -> Any:
        logits, penalty = correct(*args, **kwargs)
        return logits, penalty.detach()

    monkeypatch.setattr(fastgan, "logits_and_penalty", detached)
    assert cli.main([*VERIFY, "--penalty", "r1"]) == 1
    output = capsys.readouterr().out
    assert "FAIL: 2 steps" in output
    assert "BREACH step 1: gradient of discriminator" in output
