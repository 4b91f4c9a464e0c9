"""Gradient normalization, f / (|grad f| + |f|), against the formula in plain PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastgan.nn import GradientNormalized


def convolutional(*norms):
    layers = nn.Conv2d(3, 6, 4, 2, 1), nn.LeakyReLU(0.2), *norms, nn.Conv2d(6, 5, 3), nn.SiLU()
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(20, 1))


def patches():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 1, 3))


MODELS = {
    "convolutional": convolutional,
    "patches": patches,
    "batch norm": lambda: convolutional(nn.BatchNorm2d(6)),
    "one number": lambda: nn.Sequential(convolutional(), nn.Flatten(0)),
}


def plain(model, x):
    f = model(x)
    (g,) = torch.autograd.grad(f.sum(), x, create_graph=True)
    size = g.flatten(1).norm(dim=1).view(-1, *[1] * (f.ndim - 1))
    return f / (size + f.abs())


@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_those_of_the_formula(name):
    ours = MODELS[name]().double()
    theirs, wrapped = copy.deepcopy(ours), GradientNormalized(ours)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    actual, expected = wrapped(a), plain(theirs, b)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    factor = torch.randn_like(expected)
    found = torch.autograd.grad((actual * factor).sum(), [a, *ours.parameters()])
    wanted = torch.autograd.grad((expected * factor).sum(), [b, *theirs.parameters()])
    for mine, their in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-8, atol=1e-11)


def test_a_generator_is_trained_through_it():
    model, generator = convolutional().double(), nn.Conv2d(2, 3, 1).double()
    z = torch.randn(4, 2, 8, 8, dtype=torch.float64)
    found = torch.autograd.grad(GradientNormalized(model)(generator(z)).mean(), list(generator.parameters()))
    wanted = torch.autograd.grad(plain(model, generator(z)).mean(), list(generator.parameters()))
    for mine, their in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_has_its_value(context):
    model, x = convolutional(), torch.randn(4, 3, 8, 8)
    expected = GradientNormalized(model)(x)
    with context():
        actual = GradientNormalized(model)(x)
    assert not actual.requires_grad
    torch.testing.assert_close(actual, expected.detach())


def test_several_inputs_have_one_norm():
    class Joint(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(5, 4)

        def forward(self, pair, scale):
            return (torch.tanh(self.a(pair[0])) * self.b(pair[1])).sum(1, keepdim=True) * scale

    model = Joint().double()
    x, y = (torch.randn(6, n, dtype=torch.float64, requires_grad=True) for n in (3, 5))
    f = model((x, y), 2.0)
    g = torch.cat(torch.autograd.grad(f.sum(), (x, y), create_graph=True), 1)
    torch.testing.assert_close(
        GradientNormalized(model)((x, y), scale=2.0), f / (g.norm(dim=1, keepdim=True) + f.abs())
    )


def test_where_function_and_gradient_are_zero_the_result_is():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1, bias=False))
    nn.init.constant_(model[0].bias, -100.0)
    out = GradientNormalized(model)(torch.randn(5, 3))
    out.sum().backward()
    assert (out == 0).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_half_precision_is_returned_as_it_came():
    model = convolutional().bfloat16()
    assert GradientNormalized(model)(torch.randn(4, 3, 8, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_several_outputs_are_refused():
    class Two(nn.Module):
        def forward(self, x):
            return x.sum(1), x.mean(1)

    with pytest.raises(TypeError, match="one tensor of logits, got tuple"):
        GradientNormalized(Two())(torch.randn(4, 3))
