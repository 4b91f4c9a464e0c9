"""Penalties as training code uses them: compiled, checkpointed, scaled, accumulated, mixed with a loss."""

from __future__ import annotations

import copy
import sys
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastgan
from tests.harness import assert_close
from tests.ops.test_gradient_penalty import (
    DISCRIMINATORS,
    KINDS,
    Residual,
    by_definition,
    convolutional,
    gradients,
    images,
)


def penalty_alone(discriminator, x):
    return fastgan.gradient_penalty(discriminator, x, kind="r1")


def loss_and_penalty(discriminator, x):
    logits, penalty = fastgan.logits_and_penalty(discriminator, x)
    return F.softplus(-logits).mean() + penalty


def loss_and_penalty_from_logits(discriminator, x):
    x = x.detach().requires_grad_()
    with fastgan.twice_differentiable():
        logits = discriminator(x)
    return F.softplus(-logits).mean() + fastgan.penalty_from_logits(logits, x)


CALLS = pytest.mark.parametrize("call", [penalty_alone, loss_and_penalty, loss_and_penalty_from_logits])


def assert_same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e.double(), order=2)


def generator():
    return torch.Generator().manual_seed(3)


def losses(discriminator, exact, kind):
    """The penalty and a loss of the same discriminator, by fastgan and by definition."""
    real, fake = (x.double() for x in images())
    ours = fastgan.gradient_penalty(discriminator, real, fake, kind=kind, weight=7.0, generator=generator())
    plain = by_definition(exact, real, fake, kind, 7.0, generator())
    loss = lambda d: F.softplus(d(fake) - d(real)).mean()  # noqa: E731
    return loss(discriminator) + ours, loss(exact) + plain


def mixed(discriminator, exact, kind):
    ours, plain = losses(discriminator, exact, kind)
    return gradients(discriminator, ours), gradients(exact, plain)


def twice(discriminator, exact, kind):
    mixed(discriminator, exact, kind)
    return mixed(discriminator, exact, kind)


def retained(discriminator, exact, kind):
    ours, plain = losses(discriminator, exact, kind)
    ours.backward(retain_graph=True)
    plain.backward(retain_graph=True)
    return gradients(discriminator, ours), gradients(exact, plain)


def frozen(discriminator, exact, kind):
    for model in (discriminator, exact):
        next(model.parameters()).requires_grad_(False)
    ours, plain = mixed(discriminator, exact, kind)
    assert next(discriminator.parameters()).grad is None
    return ours, plain


def accumulated(discriminator, exact, kind):
    for _ in range(2):
        for loss in losses(discriminator, exact, kind):
            loss.backward()
    return [[p.grad for p in model.parameters() if p.grad is not None] for model in (discriminator, exact)]


SITUATIONS = pytest.mark.parametrize("situation", [mixed, twice, retained, frozen, accumulated])


def assert_exact(name, situation, kind):
    discriminator = DISCRIMINATORS[name]().double()
    if name == "spectral norm":
        discriminator.eval()  # so that both get the same weights at every read
    for actual, expected in zip(*situation(discriminator, copy.deepcopy(discriminator), kind), strict=True):
        assert_close(actual, expected, order=2)


@SITUATIONS
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_exact_in_every_situation(kind, situation):
    assert_exact("convolutional", situation, kind)


@SITUATIONS
@pytest.mark.parametrize("name", [name for name in DISCRIMINATORS if name != "convolutional"])
def test_every_discriminator_is_exact_in_every_situation(name, situation):
    assert_exact(name, situation, "wgan-gp")


@CALLS
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("how", ["whole", "part", "in place"])
def test_a_compiled_discriminator_gives_the_penalty_of_the_original(call, backend, how):
    discriminator, (x, _) = convolutional(), images()
    expected = gradients(discriminator, call(discriminator, x))
    torch.compiler.reset()
    if how == "whole":
        compiled = torch.compile(discriminator, backend=backend)
    elif how == "part":
        compiled = nn.Sequential(torch.compile(discriminator[:3], backend=backend), discriminator[3:])
    else:
        compiled = discriminator
        compiled.compile(backend=backend)
    assert_same(gradients(discriminator, call(compiled, x)), expected)
    assert compiled(x).requires_grad  # compiled as before


@CALLS
def test_a_compiled_training_step_gives_the_same(call):
    discriminator, (x, _) = convolutional(), images()
    expected = gradients(discriminator, call(discriminator, x))
    torch.compiler.reset()

    @torch.compile(backend="eager")
    def step():
        return 2 * call(discriminator, x)

    assert_same(gradients(discriminator, step() / 2), expected)


def test_threads_that_leave_in_any_order_leave_the_compiler_as_it_was():
    import torch._dynamo  # so that there is a stance to restore

    assert "torch._dynamo" in sys.modules
    stance = torch._dynamo.eval_frame._stance
    inside, leave = threading.Event(), threading.Event()

    def work():
        with fastgan.twice_differentiable():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=work)
    with fastgan.twice_differentiable():
        thread.start()
        inside.wait(10)
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    leave.set()
    thread.join()
    assert torch._dynamo.eval_frame._stance == stance


class Checkpointed(nn.Module):
    """Its parts run again in the backward."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        for part in self.body:
            x = checkpoint(part, x, use_reentrant=False)
        return x


@CALLS
@pytest.mark.parametrize("norm", [(), (nn.GroupNorm(2, 8),)], ids=["plain", "norm"])
def test_checkpointing_inside_the_discriminator_changes_nothing(call, norm):
    layers, (x, _) = convolutional(*norm).double(), images()
    discriminator = nn.Sequential(nn.Sequential(*layers[:2]), nn.Sequential(*layers[2:-2]), layers[-2:])
    expected = gradients(discriminator, call(discriminator, x.double()))
    assert_same(gradients(discriminator, call(Checkpointed(discriminator), x.double())), expected)


@CALLS
def test_a_scaled_loss_gives_the_gradients_of_the_loss_once_unscaled(call):
    discriminator, (x, _) = convolutional(), images()
    expected = gradients(discriminator, call(discriminator, x))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(discriminator.parameters(), lr=0.5)
    before = [p.detach().clone() for p in discriminator.parameters()]
    optimizer.zero_grad()
    scaler.scale(call(discriminator, x)).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**10  # nothing overflowed
    for p, b, e in zip(discriminator.parameters(), before, expected, strict=True):
        torch.testing.assert_close(p.detach(), b - 0.5 * e)


@CALLS
def test_a_scale_that_is_too_large_makes_the_scaler_skip_the_step(call):
    discriminator, (x, _) = convolutional(), images()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    optimizer = torch.optim.SGD(discriminator.parameters(), lr=0.5)
    before = [p.detach().clone() for p in discriminator.parameters()]
    scaler.scale(100 * call(discriminator, x)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**125
    assert all(torch.equal(p, b) for p, b in zip(discriminator.parameters(), before, strict=True))


@CALLS
def test_channels_last_changes_the_layout_and_nothing_else(call):
    discriminator = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Residual(4), nn.Flatten(), nn.Linear(64, 1)).double()
    x = images()[0].double()
    expected = gradients(discriminator, call(discriminator, x))
    other = copy.deepcopy(discriminator).to(memory_format=torch.channels_last)
    assert_same(gradients(other, call(other, x.contiguous(memory_format=torch.channels_last))), expected)


def test_a_penalty_alone_leaves_zeros_below_an_activation_and_nothing_above():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.2), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.LazyLinear(1))
    x = torch.randn(4, 3, 8, 8)
    model(x)
    fastgan.gradient_penalty(model, x, kind="r1").backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == ["2.bias", "4.bias"]
    assert not model[0].bias.grad.any()
    model.zero_grad()
    logits, penalty = fastgan.logits_and_penalty(model, x, kind="r1")
    (penalty + 0 * logits.sum()).backward()
    assert not any(p.grad.any() for name, p in model.named_parameters() if name.endswith("bias"))
