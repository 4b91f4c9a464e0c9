from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastgan
from fastgan.nn import GradientPenalty


def critic():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(144, 1))


REAL = torch.randn(4, 3, 8, 8)


def test_it_is_the_function_with_its_settings():
    discriminator = critic()
    expected = fastgan.gradient_penalty(discriminator, REAL, kind="r1", weight=3)
    assert torch.equal(GradientPenalty("r1", weight=3)(discriminator, REAL), expected)


def test_a_lazy_penalty_is_taken_at_the_first_of_every_k_calls_and_weighs_k_times_as_much():
    discriminator, penalty = critic(), GradientPenalty("r1", every=3)
    full = GradientPenalty("r1")(discriminator, REAL)
    taken = [penalty(discriminator, REAL) for _ in range(7)]
    assert [bool(p > 0) for p in taken] == [True, False, False, True, False, False, True]
    torch.testing.assert_close(taken[3], 3 * full)
    (taken[1] + discriminator(REAL).sum()).backward()  # zero can be added to a loss


def test_its_place_in_the_round_is_part_of_its_state():
    discriminator, penalty = critic(), GradientPenalty("r1", every=3)
    penalty(discriminator, REAL)
    resumed = GradientPenalty("r1", every=3)
    resumed.load_state_dict(copy.deepcopy(penalty.state_dict()))
    assert [bool(resumed(discriminator, REAL) > 0) for _ in range(3)] == [False, False, True]


def test_bad_settings_are_refused_at_once():
    with pytest.raises(ValueError, match="kind must be one of"):
        GradientPenalty("r3")
    for every in (0, 2.5, "a"):
        with pytest.raises(ValueError, match=f"every must be an integer of at least 1, got {every!r}"):
            GradientPenalty("r1", every=every)
    with pytest.raises(TypeError, match=r"weight must be a number or a tensor .*, got 'a'"):
        GradientPenalty("r1", weight="a")
