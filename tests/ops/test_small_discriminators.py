"""Discriminators so small that their penalties are left to PyTorch: which, and that the numbers are the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgan
from fastgan.ops.gradient_penalty.small import is_small
from tests.ops.test_gradient_penalty import DISCRIMINATORS, KINDS, by_definition, gradients, images

pytestmark = pytest.mark.small


def mlp(width):
    return nn.Sequential(nn.Linear(2, width), nn.LeakyReLU(0.2), nn.Linear(width, 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_the_penalty_and_its_gradients_are_those_by_definition(name, kind):
    discriminator = DISCRIMINATORS[name]().double()
    exact = copy.deepcopy(discriminator)
    real, fake = (x.double() for x in images())
    seeds = [torch.Generator().manual_seed(1) for _ in range(2)]
    penalty = fastgan.gradient_penalty(discriminator, real, fake, kind=kind, weight=3.0, generator=seeds[0])
    expected = by_definition(exact, real, fake, kind, 3.0, seeds[1])
    for actual, wanted in zip(gradients(discriminator, penalty), gradients(exact, expected), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("compiled", [False, True], ids=["as it is", "compiled"])
def test_loss_and_penalty_in_one_backward_are_those_by_definition(compiled):
    exact = mlp(16).double()
    discriminator = copy.deepcopy(exact)
    x = torch.randn(8, 2, dtype=torch.float64)
    called = torch.compile(discriminator, backend="aot_eager") if compiled else discriminator
    logits, penalty = fastgan.logits_and_penalty(called, x)
    expected = F.softplus(-exact(x)).mean() + by_definition(exact, x, None, "r1", 10.0, None)
    actual = gradients(discriminator, F.softplus(-logits).mean() + penalty)
    for ours, wanted in zip(actual, gradients(exact, expected), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-12)


def test_their_functions_are_pytorchs_and_the_explanation_says_so():
    discriminator, x = mlp(16), torch.randn(8, 2)
    outputs = []
    discriminator[1].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    fastgan.gradient_penalty(discriminator, x, kind="r1")
    fastgan.logits_and_penalty(discriminator, x)
    assert "so small" in fastgan.explain_penalty(discriminator, x)
    assert [output.grad_fn.name() for output in outputs] == ["LeakyReluBackward0"] * 3
    with fastgan.use_backend("cpu"):
        assert fastgan.explain_penalty(discriminator, x) == "one pass"
        fastgan.gradient_penalty(discriminator, x, kind="r1")
    assert "LeakyReluBackward0" not in {output.grad_fn.name() for output in outputs[3:]}


def test_a_large_one_and_what_is_no_module_are_not_small():
    x = torch.randn(64, 2)
    assert is_small(mlp(2**17 - 1), x)  # 2^19 parameters and one less than three, each once a sample
    assert not is_small(mlp(2**17), x)
    assert not is_small(mlp(2**17 - 1), torch.randn(65, 2))
    assert not is_small(nn.Conv2d(3, 8, 4), torch.randn(128, 3, 64, 64)), "a weight is used at every position"
    assert is_small(nn.Conv2d(3, 8, 4), torch.randn(2, 3, 64, 64))
    assert not is_small(lambda x: x.square(), x), "nobody knows its parameters"
    assert not is_small(nn.Flatten(), x), "nor these"
    assert not is_small(nn.LazyLinear(1), x), "nor is their number known"
    assert not is_small(mlp(16), x.to("meta"))
    found = []
    torch.func.grad(lambda x: (found.append(is_small(mlp(16), x)), x.sum())[1])(x)
    assert found == [False], "inside a transform"


class Constant(nn.Linear):
    def forward(self, x):
        return self.bias.expand(len(x))


class Named(nn.Linear):
    def forward(self, x):
        return {"logits": x}


@pytest.mark.parametrize("call", [fastgan.gradient_penalty, fastgan.logits_and_penalty])
def test_errors_are_those_of_any_discriminator(call):
    x = torch.randn(4, 2)
    with pytest.raises(ValueError, match="does not depend on its input"):
        call(Constant(2, 1), x, kind="r1")
    with torch.no_grad(), pytest.raises(RuntimeError, match="needs gradients"):
        call(mlp(16), x, kind="r1")
    with pytest.raises(ValueError, match="must return logits alone"):
        call(Named(2, 1), x, kind="r1")
