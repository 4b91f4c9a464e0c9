from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

from fastgan.trainer.config import PRESETS
from fastgan.trainer.data.held_out import hold_out, sample_reals
from fastgan.trainer.data.sources import Images, load_source
from fastgan.trainer.gan import GAN
from fastgan.trainer.measure.diagnostics import Diagnostics, boundary_of, diversity, effective_number, sigmas
from fastgan.trainer.measure.equilibrium import duality_gap, value
from fastgan.trainer.models import normalize

CPU = torch.device("cpu")
RING8 = PRESETS["ring8"][1]


def ring8_gan(**optim: object) -> GAN:
    model = dataclasses.replace(RING8.model, width=16, pack=1)
    optim_config = dataclasses.replace(RING8.optim, **{"batch_size": 32, **optim})
    return GAN(model, optim_config, load_source("ring8", 0, CPU), 0, CPU)


def test_observing_leaves_no_trace_in_the_run(config):
    source = load_source("fashion-mnist", 2, CPU, config.data)
    held_out = hold_out(source, 16, 5)
    watched = GAN(config.model, config.optim, source, 0, CPU)  # batch norm in G, spectral norm in D
    plain = copy.deepcopy(watched)
    diagnostics = Diagnostics(watched, held_out, 9)
    for step in range(1, 3):
        diagnostics.before_step()
        random_state = torch.get_rng_state()
        watched.step()
        plain.step()
        diagnostics.observe(step)
        duality_gap(watched, held_out, step, steps=2)
        assert torch.equal(torch.get_rng_state(), random_state)
    for got, wanted in zip(watched.state_dict().values(), plain.state_dict().values(), strict=True):
        assert str(got) == str(wanted)
    got, wanted = watched.discriminator.state_dict(), plain.discriminator.state_dict()
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)
    assert watched.discriminator.training
    assert watched.generator.training


def test_gradient_norms_and_update_ratios_are_those_of_the_step_just_taken():
    gan = ring8_gan()
    diagnostics = Diagnostics(gan, None, 0)
    gan.step()
    before = {"g": copy.deepcopy(gan.generator), "d": copy.deepcopy(gan.discriminator)}
    diagnostics.before_step()
    gan.step()
    found = diagnostics.observe(2)
    for key, after in (("g", gan.generator), ("d", gan.discriminator)):
        gradient = torch.cat([p.grad.flatten() for p in after.parameters()]).double()
        old = torch.cat([p.detach().flatten() for p in before[key].parameters()]).double()
        new = torch.cat([p.detach().flatten() for p in after.parameters()]).double()
        assert found[f"{key}_grad_norm"] == pytest.approx(float(gradient.norm()), rel=1e-4)
        assert found[f"{key}_update_ratio"] == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-4)


def test_accuracies_signs_and_means_are_of_the_logits():
    gan = ring8_gan()
    gan.step()
    gan.discriminator = Constant(2.0)
    found = Diagnostics(gan, gan.source.fork(7), 0).observe(1)
    assert (found["d_real_accuracy"], found["d_fake_accuracy"]) == (1.0, 0.0)
    assert (found["d_real_sign"], found["d_fake_sign"]) == (1.0, 1.0)
    assert (found["d_train"], found["d_held_out"], found["d_fake"]) == (2.0, 2.0, 2.0)
    assert "overfit" not in found  # every sample is a new one


class Constant(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.value.expand(len(x), 1)


def test_a_loss_without_a_boundary_is_judged_midway():
    gan = ring8_gan()
    gan.loss = type("Relative", (), {"boundary": None})()
    assert float(boundary_of(gan, torch.tensor([3.0, 5.0]), torch.tensor([0.0]))) == 2.0


class Remembers(nn.Module):
    """A discriminator that knows its training images by heart."""

    def __init__(self, known: torch.Tensor) -> None:
        super().__init__()
        self.known = known.flatten(1)
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        nearest = torch.cdist(x.flatten(1), self.known, compute_mode="donot_use_mm_for_euclid_dist").min(1).values
        return torch.where(nearest < 1e-3, 1.0, -1.0)[:, None]


def test_overfit_is_one_for_a_discriminator_that_knows_its_images_and_nothing_else(config):
    source = load_source("fashion-mnist", 2, CPU, config.data)
    held_out = hold_out(source, 16, 5)
    gan = GAN(config.model, config.optim, source, 0, CPU)
    gan.discriminator = Remembers(sample_reals(source, source.size, 0)[0])
    found = Diagnostics(gan, held_out, 0).observe(1)
    assert found["overfit"] == pytest.approx(1.0)
    assert found["d_train"] == 1.0
    assert found["d_held_out"] == -1.0


@pytest.mark.parametrize("where", ["weight", "gradient"])
def test_every_nonfinite_weight_and_gradient_is_counted(where):
    gan = ring8_gan()
    gan.step()
    parameter = next(gan.generator.parameters())
    target = parameter.data if where == "weight" else parameter.grad
    target[0, :2] = torch.tensor([math.nan, math.inf])
    assert Diagnostics(gan, None, 0).observe(1)["nonfinite"] == 2


class TestDiversity:
    def test_n_samples_far_apart_count_as_n_and_equal_ones_as_one(self):
        apart = 100.0 * torch.arange(7.0)[:, None]
        assert float(effective_number(apart, torch.tensor(1.0))) == pytest.approx(7)
        assert float(effective_number(torch.ones(7, 3), torch.tensor(1.0))) == pytest.approx(1)

    def test_it_is_the_vendi_score_of_order_two(self):
        x = torch.randn(9, 3, dtype=torch.float64)
        kernel = torch.exp(-torch.cdist(x, x).square() / 2)
        eigenvalues = torch.linalg.eigvalsh(kernel / 9)
        wanted = 1 / float(eigenvalues.square().sum())
        assert float(effective_number(x, torch.tensor(1.0))) == pytest.approx(wanted, rel=1e-5)

    @pytest.mark.parametrize("modes", [1, 2, 4])
    def test_k_of_eight_modes_are_about_k_eighths(self, modes):
        source = load_source("ring8", 0, CPU)
        real = source.next(128)
        nearest = torch.cdist(real, source.modes).argmin(1)
        fake = real[nearest < modes]
        assert float(diversity(fake, real)) == pytest.approx(modes / 8, rel=0.2)


@pytest.mark.parametrize("kind", ["fused", "per-layer", "torch"])
def test_sigma_is_the_largest_singular_value_of_every_normalized_layer(kind):
    model = normalize(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3)), kind)
    for _ in range(100):
        model(torch.randn(2, 2, 4, 4))
    found = sigmas(model)
    assert list(found) == ["0.weight", "2.weight"]
    for name, layer in (("0.weight", model[0]), ("2.weight", model[2])):
        weight = layer.parametrizations.weight.original.detach().flatten(1)
        assert found[name] == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)), rel=1e-4)
    assert sigmas(nn.Linear(2, 2)) == {}


class TestHeldOut:
    def test_no_image_is_in_both_parts_and_none_is_lost(self):
        images = torch.arange(100, dtype=torch.uint8)[:, None]
        source = Images(images, 0, CPU)
        held_out = hold_out(source, 16, 1)
        assert held_out.size == 10
        found = torch.cat([source.next(90), held_out.next(10)]).add(1).mul(127.5).round()
        assert sorted(found[:, 0].tolist()) == list(range(100))

    def test_a_batch_must_still_be_filled(self):
        assert hold_out(Images(torch.zeros(17, 1, dtype=torch.uint8), 0, CPU), 17, 1) is None

    def test_fewer_than_asked_for_are_repeated(self):
        source = Images(torch.arange(3, dtype=torch.uint8)[:, None], 0, CPU)
        assert len(sample_reals(source, 8, 0)[0]) == 8
        assert len(sample_reals(source, 8, 0)[0].unique()) == 3


class TestDualityGap:
    def test_it_is_the_sum_of_what_each_player_can_gain(self):
        gan = ring8_gan()
        found = duality_gap(gan, gan.source.fork(1), 0, steps=3)
        assert found["duality_gap"] == pytest.approx(found["d_gain"] + found["g_gain"])

    def test_it_falls_as_the_game_nears_its_equilibrium(self):
        gan = ring8_gan()
        held_out = gan.source.fork(1)
        start = duality_gap(gan, held_out, 0)["duality_gap"]
        # At an equilibrium, G draws the data and D cannot distinguish it. This one is constructed.
        solved = ring8_gan()
        solved.generator = Draws(solved.source.fork(3))
        solved.discriminator = nn.Sequential(nn.Linear(2, 1))
        nn.init.zeros_(solved.discriminator[0].weight)
        nn.init.zeros_(solved.discriminator[0].bias)
        solved.g_adam = torch.optim.Adam(solved.generator.parameters(), 1e-3)
        solved.d_adam = torch.optim.Adam(solved.discriminator.parameters(), 2e-3)
        assert start > 0.1
        assert abs(duality_gap(solved, held_out, 0)["duality_gap"]) < 0.02

    def test_the_value_is_minus_the_discriminators_loss(self):
        gan = ring8_gan()
        gan.discriminator = Constant(0.0)
        assert value(gan, gan.source.next(64), None, torch.randn(64, 16)) == pytest.approx(-2 * math.log(2))


class Draws(nn.Module):
    """A generator that has learned everything."""

    def __init__(self, source: object) -> None:
        super().__init__()
        self.source = source
        self.shift = nn.Parameter(torch.zeros(2))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.source.next(len(z)) + self.shift
