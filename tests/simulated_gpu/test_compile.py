"""Steps that torch.compile captures whole, on CUDA tensors: PyTorch runs the graph's operations."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

import fastgan
from tests.integrations.players import SHAPE, discriminator_loss, make_discriminator


def wgan_gp(discriminator, real, fake):
    penalty = fastgan.gradient_penalty(discriminator, real, fake, kind="wgan-gp")
    return discriminator(fake).mean() - discriminator(real).mean() + penalty


def one_pass(discriminator, real, fake):
    logits, penalty = fastgan.logits_and_penalty(discriminator, real, kind="r1")
    return F.softplus(-logits).mean() + F.softplus(discriminator(fake)).mean() + penalty


@pytest.mark.parametrize("loss", [discriminator_loss, wgan_gp, one_pass])
def test_a_compiled_step_is_one_graph_and_the_eager_step(loss):
    discriminator = make_discriminator().cuda()
    real, fake = torch.randn(2, 4, *SHAPE, device="cuda")
    found = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        model = copy.deepcopy(discriminator)
        torch.cuda.manual_seed(1)
        value = function(model, real, fake)
        gradients = torch.autograd.grad(value, list(model.parameters()), materialize_grads=True)
        found.append([value.detach(), *gradients, *model.buffers()])
    for actual, expected in zip(*reversed(found), strict=True):
        assert actual.is_cuda
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)
