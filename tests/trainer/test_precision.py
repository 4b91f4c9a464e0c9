from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from fastgan.trainer.config import ModelConfig, OptimConfig
from fastgan.trainer.data.sources import load_source
from fastgan.trainer.gan import GAN

CPU = torch.device("cpu")
MODEL = ModelConfig(width=4, latent_dim=4, spectral_norm="none")
OPTIM = OptimConfig(batch_size=8, loss="non-saturating", penalty="r1", penalty_weight=1.0)


def game(model: ModelConfig = MODEL, **optim: object) -> GAN:
    return GAN(model, dataclasses.replace(OPTIM, **optim), load_source("discs", 2, CPU), 0, CPU)  # type: ignore[arg-type]


def gradients(gan: GAN) -> torch.Tensor:
    """Return the gradients of both players on one batch, without the factor of the scaler."""
    gan.discriminator_gradient(gan.batch())
    gan.generator_gradient(gan.generator_batch())
    found = []
    for network, scaler in ((gan.discriminator, gan.d_scaler), (gan.generator, gan.g_scaler)):
        factor = scaler.get_scale() if scaler.is_enabled() else 1.0
        found += [parameter.grad.flatten() / factor for parameter in network.parameters()]
    return torch.cat(found)


@pytest.mark.parametrize("penalty", ["none", "r1", "r1+r2", "wgan-gp"])
@pytest.mark.parametrize(("precision", "error"), [("bfloat16", 0.1), ("float16", 0.02)])
def test_a_half_precision_gradient_is_that_of_float32_but_for_rounding(precision, error, penalty):
    wanted = gradients(game(penalty=penalty))
    got = gradients(game(penalty=penalty, precision=precision))
    assert got.dtype == torch.float32
    assert not torch.equal(got, wanted)
    assert float((got - wanted).norm() / wanted.norm()) < error


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_half_precision_game_keeps_float32_weights_and_goes_on_from_its_state(precision):
    first, second = game(precision=precision), game(precision=precision)
    for _ in range(2):
        first.step()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert torch.equal(first.step(), second.step())
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in first.generator.parameters())
    assert first.samples(torch.randn(2, 4)).dtype == torch.float32


def test_a_gradient_that_overflows_is_skipped_and_the_scale_is_halved():
    gan = game(precision="float16")
    scale = gan.d_scaler.get_scale()
    before = [p.detach().clone() for p in gan.discriminator.parameters()]
    gan.discriminator_gradient(gan.batch())
    next(gan.discriminator.parameters()).grad.fill_(torch.inf)
    gan.d_scaler.step(gan.d_adam)
    gan.d_scaler.update()
    assert all(torch.equal(p, b) for p, b in zip(gan.discriminator.parameters(), before, strict=True))
    assert gan.d_scaler.get_scale() == scale / 2


@pytest.mark.parametrize("architecture", ["dcgan", "resnet"])
def test_channels_last_gives_the_same_gradients(architecture):
    model = dataclasses.replace(MODEL, architecture=architecture)
    last = game(dataclasses.replace(model, channels_last=True))
    weights = [p for p in last.discriminator.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
    assert weights
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    wanted, got = gradients(game(model)), gradients(last)
    assert float((got - wanted).norm() / wanted.norm()) < 1e-4
