"""CUDA graphs: a whole step of the discriminator is captured without a synchronization and replays correctly.

Replays are compared with eager steps. The eager steps are tested without a GPU too.
"""

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
    penalty = fastgan.gradient_penalty(discriminator, real, fake, kind="wgan-gp", weight=1.0)
    return discriminator(fake).mean() - discriminator(real).mean() + penalty


def relativistic(discriminator, real, fake):
    (a, r1), (b, r2) = (fastgan.logits_and_penalty(discriminator, x, kind="r1", weight=1.0) for x in (real, fake))
    return F.softplus(b - a).mean() + r1 + r2


@pytest.fixture
def no_synchronization():
    """Allow synchronization until `forbid` is called, because the first step makes plans and compiles kernels."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("minibatch", [True, False], ids=["minibatch statistics", "no statistics"])
@pytest.mark.parametrize("loss", [loss_alone, with_r1, with_wgan_gp, relativistic])
def test_a_whole_step_is_captured_and_replays_to_the_eager_steps(loss, minibatch, no_synchronization):
    discriminator = make_discriminator(minibatch).cuda()
    twin = copy.deepcopy(discriminator)
    real, fake = torch.randn(2, 4, *SHAPE, device="cuda")

    def step(model, optimizer):
        value = loss(model, real, fake)
        value.backward()
        optimizer.step()
        return value

    torch.manual_seed(1)
    optimizer = torch.optim.SGD(discriminator.parameters(), lr=0.05)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(WARM_UP):
            if i == WARM_UP - 1:
                no_synchronization()
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

    torch.manual_seed(1)  # replays continue the random numbers of the warm-up, as eager steps do
    eager = torch.optim.SGD(twin.parameters(), lr=0.05)
    for _ in range(WARM_UP + REPLAYS):
        eager.zero_grad()
        expected = step(twin, eager)
    torch.testing.assert_close(captured, expected, rtol=1e-3, atol=1e-5)
    for actual, wanted in zip(discriminator.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-5)


def replayed(step):
    """Capture `step` and return a function that replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay():
        graph.replay()
        return [result.clone() for result in results]

    return replay


def wgan_gp(discriminator, real, fake, alpha):
    """The penalty of Gulrajani et al. (2017) at the points given by alpha."""
    x_hat = (alpha * real + (1 - alpha) * fake).requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(x_hat).sum(), x_hat, create_graph=True)
    return 10 * (gradient.flatten(1).norm(dim=1) - 1).square().mean()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_each_call_of_a_wgan_gp_step_draws_its_points_anew_and_has_their_gradient(device):
    discriminator = make_discriminator().to(device).eval()  # u and v stay: only the points change the penalty
    parameters = list(discriminator.parameters())
    real, fake = torch.randn(2, 4, *SHAPE, device=device)

    def step():
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # for the comparison with float64
            penalty = fastgan.gradient_penalty(discriminator, real, fake, kind="wgan-gp")
            return penalty.detach(), *torch.autograd.grad(penalty, parameters, materialize_grads=True)

    call = replayed(step) if device == "cuda" else step
    torch.manual_seed(2)
    calls = [call() for _ in range(2)]
    torch.manual_seed(2)
    alphas = [torch.rand(4, 1, 1, 1, device=device) for _ in calls]

    twin = copy.deepcopy(discriminator).double()
    with fastgan.use_backend("reference"):
        for (actual, *gradients), alpha in zip(calls, alphas, strict=True):
            expected = wgan_gp(twin, real.double(), fake.double(), alpha.double())
            wanted = torch.autograd.grad(expected, list(twin.parameters()), materialize_grads=True)
            torch.testing.assert_close(actual.double(), expected.detach(), rtol=1e-4, atol=1e-6)
            for gradient, right in zip(gradients, wanted, strict=True):
                torch.testing.assert_close(gradient.double(), right, rtol=1e-3, atol=1e-4 * float(right.abs().max()))
    assert float(calls[0][0]) != pytest.approx(float(calls[1][0]), rel=1e-2)
