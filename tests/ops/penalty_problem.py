"""Discriminators, inputs and calls for the tests of penalties, and PyTorch's gradients of the formulas."""

from __future__ import annotations

import copy

import torch
from torch import nn

import fastgan
from fastgan.nn import GradientPenalty
from tests.harness import assert_close

N = 5


def affine():
    return nn.Sequential(nn.Conv2d(3, 6, 4, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(96, 1)).double()


def curved():
    return nn.Sequential(nn.Conv2d(3, 6, 4, 2, 1), nn.Softplus(), nn.Flatten(), nn.Linear(96, 1)).double()


def images(n=N):
    return 2 * torch.randn(n, 3, 8, 8, dtype=torch.float64)


def by_logits(discriminator, x, **options):
    x = x.detach().requires_grad_()
    with fastgan.twice_differentiable():
        logits = discriminator(x)
    return fastgan.penalty_from_logits(logits, x, **options)


def at_fakes(discriminator, x, kind, **options):
    """Interpolates of x and x, for kinds that need a fake."""
    return fastgan.gradient_penalty(discriminator, x, x, kind=kind, **options)


def module(discriminator, x, **options):
    return GradientPenalty(**options)(discriminator, x, x)


CALLS = {
    "gradient_penalty": at_fakes,
    "logits_and_penalty": lambda D, x, **options: fastgan.logits_and_penalty(D, x, **options)[1],
    "penalty_from_logits": by_logits,
    "GradientPenalty": module,
}
DISCRIMINATORS = {"one pass": affine, "general path": curved}


def input_gradient(discriminator, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)[0]


def gradients(modules, loss):
    modules.zero_grad()
    loss.backward()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in modules.parameters()])


def assert_equal(call, make, formula, **options):
    discriminator, x = make(), images()
    exact = copy.deepcopy(discriminator)
    actual, expected = call(discriminator, x, **options), formula(input_gradient(exact, x))
    assert expected.abs().min() > 0
    assert_close(actual, expected, order=1)
    assert_close(gradients(discriminator, actual.sin().sum()), gradients(exact, expected.sin().sum()), order=2)


def norm(g, dims=(1, 2, 3)):
    return g.square().sum(dims).sqrt()
