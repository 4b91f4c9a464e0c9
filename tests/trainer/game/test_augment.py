from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from fastgan.trainer.config import ModelConfig, OptimConfig
from fastgan.trainer.data.sources import load_source
from fastgan.trainer.game.augment import (
    CHANGES,
    NUMBERS,
    Augment,
    brightness,
    contrast,
    cutout,
    mirror,
    saturation,
    translation,
)
from fastgan.trainer.gan import GAN

CPU = torch.device("cpu")
YES, NO = torch.ones(1, dtype=torch.bool), torch.zeros(1, dtype=torch.bool)


def numbers(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([value]) for value in values]


def image() -> torch.Tensor:
    return torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_is_not_taken_leaves_the_image_as_it_is(change):
    assert torch.allclose(change(image(), NO, *numbers(0.1, 0.2)), image(), atol=1e-6)


def test_each_change_does_what_it_says():
    x = image()
    assert torch.equal(mirror(x, YES, *numbers(0.4, 0.0)), x.flip(3))
    assert torch.equal(mirror(x, YES, *numbers(0.6, 0.0)), x)
    assert torch.allclose(brightness(x, YES, *numbers(0.75, 0.0)), x + 0.25)
    assert torch.allclose(saturation(x, YES, *numbers(0.0, 0.0)), x.mean(1, keepdim=True).expand_as(x))
    assert torch.allclose(contrast(x, YES, *numbers(0.0, 0.0)), (x + x.mean()) / 2, atol=1e-6)
    moved = translation(x, YES, *numbers(0.999, 0.0))  # two pixels down, two to the left
    assert torch.equal(moved[:, :, 2:, :-2], x[:, :, :-2, 2:])
    assert not moved[:, :, :2].any()
    assert not moved[:, :, :, -2:].any()
    cut = cutout(x, YES, *numbers(0.5, 0.0))
    assert not cut[:, :, 5:12, :4].any()
    assert torch.equal(cut[:, :, :, 4:], x[:, :, :, 4:])
    assert torch.equal(cut[:, :, :5], x[:, :, :5])


def test_augmentation_is_differentiable_twice():
    augment = Augment("diffaugment", CPU)
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    u = torch.rand(2, *NUMBERS, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: augment(x, u), x, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: augment(x, u).square(), x, fast_mode=True)


def test_ada_changes_as_large_a_share_of_the_images_as_p_says():
    augment = Augment("ada", CPU)
    x = torch.ones(4000, 1, 8, 8)
    u = torch.rand(4000, *NUMBERS, generator=torch.Generator().manual_seed(0))
    assert torch.equal(augment(x, u), x)
    augment.p.fill_(0.1)
    same = (augment(x, u) - x).abs().amax((1, 2, 3)) < 1e-6
    # Of constant gray images, brightness and translation change all but the unmoved (1 / 9).
    assert float(same.float().mean()) == pytest.approx(0.9 * (1 - 0.1 * 8 / 9), abs=0.03)


@pytest.mark.parametrize(("kind", "mirrors", "cuts"), [("diffaugment", False, True), ("ada", True, False)])
def test_only_diffaugment_cuts_holes_and_only_ada_mirrors(kind, mirrors, cuts):
    augment = Augment(kind, CPU)
    augment.p.fill_(1.0)
    u = torch.full((1, *NUMBERS), 0.5)  # neither brighter, nor of another contrast or saturation, nor moved
    u[:, 0, 1] = 0.0
    x = image()
    found = augment(x, u)
    assert torch.allclose(found[:, :, :, 12:], (x.flip(3) if mirrors else x)[:, :, :, 12:], atol=1e-6)
    assert bool((found[:, :, 8, 8] == 0).all()) == cuts


@pytest.mark.parametrize(("sign", "wanted"), [(1.0, 4 * 100 / 500_000), (0.2, 0.0)])
def test_p_rises_while_the_discriminator_is_too_sure_and_falls_to_nothing_else(sign, wanted):
    augment = Augment("ada", CPU)
    for _ in range(7):
        augment.look(torch.tensor(sign), 100)
    assert float(augment.p) == pytest.approx(wanted)
    other = Augment("ada", CPU)
    other.load_state_dict(copy.deepcopy(augment.state_dict()))
    for one in (augment, other):
        one.look(torch.tensor(sign), 100)
    assert float(other.p) == float(augment.p) == pytest.approx(2 * wanted)


def test_adas_speed_and_target_are_settings():
    augment = GAN(
        ModelConfig(width=4),
        OptimConfig(batch_size=8, augment="ada", ada_images=1000, ada_target=0.1),
        load_source("discs", 2, CPU),
        0,
        CPU,
    ).augment
    for _ in range(4):
        augment.look(torch.tensor(0.2), 50)
    assert float(augment.p) == pytest.approx(200 / 1000)


@pytest.mark.parametrize("kind", ["diffaugment", "ada"])
def test_a_game_with_augmentation_goes_on_from_its_state(kind):
    model = ModelConfig(width=4, latent_dim=4)
    optim = OptimConfig(batch_size=8, augment=kind, penalty="r1", loss="relativistic")
    games = [GAN(model, optim, load_source("discs", 2, CPU), 0, CPU) for _ in range(2)]
    for _ in range(3):
        games[0].step()
    games[1].load_state_dict(copy.deepcopy(games[0].state_dict()))
    assert torch.equal(games[0].step(), games[1].step())
    plain = GAN(model, dataclasses.replace(optim, augment="none"), load_source("discs", 2, CPU), 0, CPU)
    assert not torch.equal(plain.step(), games[0].step())


def test_only_images_are_augmented():
    with pytest.raises(ValueError, match="needs images"):
        GAN(ModelConfig(), OptimConfig(augment="ada"), load_source("ring8", 2, CPU), 0, CPU)
