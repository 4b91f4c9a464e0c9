from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastgan
from fastgan.nn import GradientPenalty


def critic():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(144, 1))


REAL = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


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


def off_step(penalty, discriminator, *inputs):
    """With every=2, the second call returns zero."""
    penalty(discriminator, *inputs)
    zero = penalty(discriminator, *inputs)
    assert zero.requires_grad
    assert not zero.any()
    return zero


def test_the_zero_between_has_a_backward_that_gives_no_parameter_anything():
    discriminator = critic()
    zero = off_step(GradientPenalty("r1", every=2), discriminator, REAL)
    discriminator.zero_grad()
    zero.backward()
    assert all(p.grad is None for p in discriminator.parameters())


def test_the_zero_between_changes_no_loss_that_it_is_added_to():
    discriminator, penalty = critic(), GradientPenalty("r1", every=2)
    plain = torch.autograd.grad(discriminator(REAL).sum(), list(discriminator.parameters()))
    loss = discriminator(REAL).sum() + off_step(penalty, discriminator, REAL)
    for actual, expected in zip(torch.autograd.grad(loss, list(discriminator.parameters())), plain, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"reduction": "none"}, {"reduction": "none", "dims": 1}])
def test_the_zero_between_has_the_shape_and_dtype_of_the_penalty(options, dtype):
    discriminator, penalty = critic().to(dtype), GradientPenalty("wgan-gp", every=2, **options)
    due = penalty(discriminator, REAL.to(dtype), REAL.to(dtype))
    zero = penalty(discriminator, REAL.to(dtype), REAL.to(dtype))
    assert (zero.shape, zero.dtype) == (due.shape, due.dtype)


def test_the_zero_between_of_several_inputs():
    pair = REAL, torch.randn(4, 5).double(), torch.arange(4)
    zero = off_step(GradientPenalty("r1", every=2), lambda inputs: inputs[0].sum((1, 2, 3)) + inputs[1].sum(1), pair)
    assert (zero.shape, zero.dtype) == ((), torch.float64)


def test_the_zero_between_may_be_scaled():
    discriminator, scaler = critic(), torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = torch.optim.SGD(discriminator.parameters(), lr=0.1)
    before = [p.detach().clone() for p in discriminator.parameters()]
    zero = off_step(GradientPenalty("r1", every=2), discriminator, REAL)
    scaler.scale(zero).backward()
    zero = off_step(GradientPenalty("r1", every=2), discriminator, REAL)
    scaler.scale(discriminator(REAL).mean() + zero).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not any(torch.equal(p, q) for p, q in zip(discriminator.parameters(), before, strict=True))


def test_it_runs_in_a_compiled_step():
    discriminator, penalty = critic(), GradientPenalty("r1", every=3)

    @torch.compile(backend="eager")
    def step(x):
        return discriminator(x).mean() + penalty(discriminator, x)

    for i in range(5):
        discriminator.zero_grad()
        step(REAL).backward()
        compiled = [p.grad for p in discriminator.parameters()]
        discriminator.zero_grad()
        loss = discriminator(REAL).mean()
        (loss if i % 3 else loss + 3 * fastgan.gradient_penalty(discriminator, REAL, kind="r1")).backward()
        for actual, p in zip(compiled, discriminator.parameters(), strict=True):
            torch.testing.assert_close(actual, p.grad)


def test_a_parameter_as_weight_is_trained():
    weight = nn.Parameter(torch.tensor(2.0))
    penalty = GradientPenalty("r1", weight=weight, every=2)
    assert list(penalty.parameters()) == [weight]
    due = penalty(critic(), REAL)
    due.backward()
    torch.testing.assert_close(weight.grad, due.detach() / 2)


def test_its_settings_are_shown():
    shown = repr(GradientPenalty("wgan-gp", weight=5, every=4, select=0, target=0.5, dims=1, reduction="sum"))
    assert shown == "GradientPenalty('wgan-gp', weight=5, every=4, select=0, target=0.5, dims=1, reduction='sum')"
    assert repr(GradientPenalty("r1")) == "GradientPenalty('r1', weight=None, every=1)"


def test_its_place_in_the_round_is_part_of_its_state():
    discriminator, penalty = critic(), GradientPenalty("r1", every=3)
    penalty(discriminator, REAL)
    resumed = GradientPenalty("r1", every=3)
    resumed.load_state_dict(copy.deepcopy(penalty.state_dict()))
    assert [bool(resumed(discriminator, REAL) > 0) for _ in range(3)] == [False, False, True]


def test_bad_settings_are_refused_at_once():
    with pytest.raises(ValueError, match="kind must be one of"):
        GradientPenalty("r3")
    for every in (0, 2.5, "a", True):
        with pytest.raises(ValueError, match=f"every must be an integer of at least 1, got {every!r}"):
            GradientPenalty("r1", every=every)
    with pytest.raises(TypeError, match=r"weight must be a number or a tensor .*, got 'a'"):
        GradientPenalty("r1", weight="a")
    with pytest.raises(TypeError, match="select must be an index"):
        GradientPenalty("r1", select=0.5)
    with pytest.raises(ValueError, match="reduction must be"):
        GradientPenalty("r1", reduction="average")
