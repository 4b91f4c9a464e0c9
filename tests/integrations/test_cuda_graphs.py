"""CUDA graphs: a whole step of the discriminator is captured, asks nothing of the host, and replays to the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

import fastgan
from tests.integrations.players import SHAPE, discriminator_loss, make_discriminator

WARM_UP, REPLAYS = 3, 3


def loss_alone(discriminator, real, fake):
    return discriminator_loss(discriminator, real, fake)


def with_r1(discriminator, real, fake):
    penalty = fastgan.gradient_penalty(discriminator, real, kind="r1", weight=1.0)
    return discriminator_loss(discriminator, real, fake) + penalty


def with_wgan_gp(discriminator, real, fake):
    penalty = fastgan.gradient_penalty(discriminator, real, fake, kind="wgan-gp")
    return discriminator(fake).mean() - discriminator(real).mean() + 0 * penalty  # its points are drawn anew


def relativistic(discriminator, real, fake):
    (a, r1), (b, r2) = (fastgan.logits_and_penalty(discriminator, x, kind="r1", weight=1.0) for x in (real, fake))
    return F.softplus(b - a).mean() + r1 + r2


@pytest.fixture
def no_synchronisation():
    """Allowed until `forbid` is called: plans are made, and kernels compiled, at the first step."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("minibatch", [True, False], ids=["minibatch statistics", "no statistics"])
@pytest.mark.parametrize("loss", [loss_alone, with_r1, with_wgan_gp, relativistic])
def test_a_whole_step_is_captured_and_replays_to_the_eager_steps(loss, minibatch, no_synchronisation):
    discriminator = make_discriminator(minibatch).cuda()
    twin = copy.deepcopy(discriminator)
    real, fake = torch.randn(2, 4, *SHAPE, device="cuda")

    def step(model, optimizer):
        value = loss(model, real, fake)
        value.backward()
        optimizer.step()
        return value

    optimizer = torch.optim.SGD(discriminator.parameters(), lr=0.05)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(WARM_UP):
            if i == WARM_UP - 1:
                no_synchronisation()
            optimizer.zero_grad()
            step(discriminator, optimizer)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad()
    with torch.cuda.graph(graph):
        captured = step(discriminator, optimizer)
    for _ in range(REPLAYS):
        graph.replay()
    torch.cuda.set_sync_debug_mode("default")

    eager = torch.optim.SGD(twin.parameters(), lr=0.05)
    for _ in range(WARM_UP + REPLAYS):
        eager.zero_grad()
        expected = step(twin, eager)
    torch.testing.assert_close(captured, expected, rtol=1e-3, atol=1e-5)
    for actual, wanted in zip(discriminator.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-5)
