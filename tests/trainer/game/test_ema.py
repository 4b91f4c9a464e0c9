from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastgan.trainer.game.ema import EMA


def test_the_average_follows_its_formula_through_the_warm_up():
    module = nn.Linear(2, 1, bias=False)
    ema = EMA(module, 0.25)
    wanted = module.weight.detach().clone()
    for t in range(6):
        with torch.no_grad():
            module.weight.copy_(torch.tensor([[float(t), -2.0 * t]]))
        decay = min(0.25, (1 + t) / (10 + t))
        wanted = decay * wanted + (1 - decay) * module.weight.detach()
        ema.update(module)
    assert (1 + 0) / (10 + 0) < 0.25 < (1 + 5) / (10 + 5)  # both branches were taken
    torch.testing.assert_close(ema.module.weight, wanted)


def test_running_statistics_are_averaged_and_counters_copied():
    module = nn.BatchNorm1d(3)
    ema = EMA(module, 0.9)
    module(torch.randn(16, 3) + 5)
    ema.update(module)
    torch.testing.assert_close(ema.module.running_mean, 0.9 * module.running_mean)  # started at 0, decay 1/10
    assert ema.module.num_batches_tracked == 1


def test_the_average_is_in_eval_mode_and_shares_nothing_with_the_module():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = EMA(module, 0.9)
    assert not ema.module.training
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    before = [tensor.clone() for tensor in ema.module.state_dict().values()]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    assert all(map(torch.equal, ema.module.state_dict().values(), before))


def test_the_update_count_survives_a_checkpoint():
    module = nn.Linear(1, 1)
    ema, other = EMA(module, 0.99), EMA(module, 0.99)
    for _ in range(3):
        ema.update(module)
    other.load_state_dict(ema.state_dict())
    with torch.no_grad():
        module.weight.add_(1)
    ema.update(module)
    other.update(module)
    assert torch.equal(ema.module.weight, other.module.weight)


def test_a_ramp_up_limits_the_half_life_to_a_share_of_the_updates():
    module = nn.Linear(1, 1)
    ema = EMA(module, 0.9, rampup=0.5)
    half_lives = []
    for _ in range(30):
        half_lives.append(math.log(0.5) / math.log(ema.decay_now()))
        ema.update(module)
    constant = math.log(0.5) / math.log(0.9)  # 6.6 updates
    wanted = [min(0.5 * (t + 1), constant) for t in range(30)]
    assert 0.5 * 13 < constant < 0.5 * 30  # both branches were taken
    assert half_lives == pytest.approx(wanted)
