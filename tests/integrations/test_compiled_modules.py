"""PathLengthPenalty and GradientNormalized inside torch.compile: one graph, and the numbers of the eager module."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgan
from fastgan.nn import GradientNormalized, PathLengthPenalty
from tests.integrations.compiled_problem import Critic, assert_same, gradients, images

pytestmark = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11), reason="before 2.11 a penalty breaks the graph"
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.undo()  # poisoned memory cannot be traced
    torch.compiler.reset()


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.mapping, self.linear = nn.Linear(8, 8), nn.Linear(8, 48)
        self.up = nn.ConvTranspose2d(3, 3, 4, 2, 1)

    def synthesis(self, latents):
        return self.up(F.leaky_relu(self.linear(latents)).view(-1, 3, 4, 4))


def of_a_mapping(generator, z, penalty):
    latents = generator.mapping(z)
    with fastgan.twice_differentiable():
        pictures = generator.synthesis(latents)
    return penalty(pictures, latents) + pictures.mean()


@fastgan.compilable
def of_a_leaf(generator, z, penalty):
    z.requires_grad_()
    return penalty(generator.synthesis(z), z)


@pytest.mark.parametrize("step", [of_a_mapping, of_a_leaf])
def test_path_lengths(step):
    generator, penalty, z = Generator(), PathLengthPenalty(), torch.randn(4, 8)
    twin = copy.deepcopy(penalty)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        torch.manual_seed(1)
        expected = gradients(generator, step(generator, z.clone(), twin))
        torch.manual_seed(1)
        assert_same(gradients(generator, compiled(generator, z.clone(), penalty)), expected, 1e-4)
    torch.testing.assert_close(penalty.average, twin.average)


def test_gradient_normalization():
    model, x = GradientNormalized(Critic(nn.GroupNorm(2, 6))), images()

    def step(model, x):
        return F.softplus(-model(x)).mean() + F.softplus(model(x.flip(0))).mean()

    expected = gradients(model, step(model, x))
    assert_same(gradients(model, torch.compile(step, backend="aot_eager", fullgraph=True)(model, x)), expected, 1e-4)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))
