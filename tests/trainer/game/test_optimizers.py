from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from fastgan.trainer.config import PRESETS, OptimConfig
from fastgan.trainer.data.sources import load_source
from fastgan.trainer.game.optimizers import ExtraAdam, OptimisticAdam, make_optimizer
from fastgan.trainer.gan import GAN

CPU = torch.device("cpu")
LR, BETAS = 0.1, (0.5, 0.9)
GRADIENTS = [torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.3, 1.0, -4.0]), torch.tensor([2.0, 0.1, 0.2])]


def directions() -> list[torch.Tensor]:
    """Adam's, by its textbook formulas."""
    m = v = torch.zeros(3, dtype=torch.float64)
    found = []
    for t, g in enumerate((g.double() for g in GRADIENTS), 1):
        m = 0.5 * m + 0.5 * g
        v = 0.9 * v + 0.1 * g * g
        found.append((m / (1 - 0.5**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-8))
    return found


def test_optimistic_adam_takes_twice_the_direction_less_the_last_one():
    x = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = OptimisticAdam([x], LR, BETAS)
    wanted, last = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for gradient, direction in zip(GRADIENTS, directions(), strict=True):
        x.grad = gradient.double()
        optimizer.step()
        wanted = wanted - 2 * LR * direction + LR * last
        last = direction
        assert torch.allclose(x, wanted, rtol=1e-12)


def test_extra_adam_steps_from_the_start_with_the_direction_found_ahead():
    x = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = ExtraAdam([x], LR, BETAS)
    first, second, third = directions()
    x.grad = GRADIENTS[0].double()
    optimizer.extrapolate()
    assert torch.allclose(x, 1 - LR * first, rtol=1e-12)
    x.grad = GRADIENTS[1].double()
    optimizer.step()
    assert torch.allclose(x, 1 - LR * second, rtol=1e-12)
    x.grad = GRADIENTS[2].double()
    optimizer.step()  # without looking ahead
    assert torch.allclose(x, 1 - LR * (second + third), rtol=1e-12)


def distance_after(name: str, steps: int) -> float:
    """Return the final distance from the equilibrium, the origin, in min_x max_y x y + (x^2 - y^2) / 50."""
    x, y = (nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (1.0, 0.5))
    players = [make_optimizer(name, [p], 0.02, (0.0, 0.9)) for p in (x, y)]  # type: ignore[arg-type]

    def gradients() -> None:
        x.grad, y.grad = (y + x / 25).detach(), (-x + y / 25).detach()

    for _ in range(steps):
        gradients()
        if name == "extra-adam":
            for player in players:
                player.extrapolate()  # type: ignore[attr-defined]
            gradients()
        for player in players:
            player.step()
    return float(torch.hypot(x, y).detach())


def test_looking_ahead_ends_nearer_to_the_equilibrium_of_a_game_that_circles():
    plain = distance_after("adam", 600)
    assert distance_after("optimistic-adam", 600) < 0.5 * plain
    assert distance_after("extra-adam", 600) < 0.5 * plain


def game(name: str) -> GAN:
    preset = PRESETS["ring8"][1]
    optim = dataclasses.replace(preset.optim, optimizer=name, batch_size=16)  # type: ignore[arg-type]
    model = dataclasses.replace(preset.model, width=8)
    return GAN(model, optim, load_source("ring8", 2, CPU), 0, CPU)


@pytest.mark.parametrize("name", ["adam", "optimistic-adam", "extra-adam"])
def test_a_game_goes_on_from_its_state_to_the_same_bits(name):
    first, second = game(name), game(name)
    for _ in range(3):
        first.step()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    losses = [(first.step(), second.step()) for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in losses)
    for wanted, got in zip(first.generator.parameters(), second.generator.parameters(), strict=True):
        assert torch.equal(got, wanted)


def test_both_players_look_ahead_before_either_moves(monkeypatch):
    calls = []
    for method in ("extrapolate", "step"):
        original = getattr(ExtraAdam, method)

        def noted(self, method=method, original=original):
            calls.append(method)
            original(self)

        monkeypatch.setattr(ExtraAdam, method, noted)
    game("extra-adam").step()
    assert calls == ["extrapolate", "extrapolate", "step", "step"]


def test_extra_adam_refuses_several_discriminator_steps():
    with pytest.raises(ValueError, match="d_steps must be 1, got 2"):
        OptimConfig(optimizer="extra-adam", d_steps=2)
