"""DistributedDataParallel over gloo: two processes, each with half of the batch, give the gradients of one with all."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgan
from fastgan.nn import GradientPenalty, utils
from tests.distributed.processes import RANKS, as_rank, found_by_ranks, needs_gloo

N, STEPS = 4, 2


class Critic(nn.Module):
    def __init__(self, *norm):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 4, 2, 1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm, self.head = nn.Sequential(*norm), nn.Linear(96, 1)

    def forward(self, x):
        h = F.leaky_relu(self.first(x), 0.2)
        return self.head((h + F.relu(self.norm(self.second(h)))).flatten(1))


def spectral():
    critic = Critic()
    for layer in (critic.first, critic.second, critic.head):
        utils.spectral_norm(layer)
    return utils.fuse_spectral_norm(critic)


CRITICS = {"affine": Critic, "group norm": lambda: Critic(nn.GroupNorm(2, 6)), "spectral norm": spectral}


def wgan_gp(discriminator, real, fake):
    penalty = fastgan.gradient_penalty(discriminator, real, fake, kind="r1+r2")
    return (discriminator(fake) - discriminator(real)).mean() + penalty


def one_pass(discriminator, real, fake):
    (a, r1), (b, r2) = (fastgan.logits_and_penalty(discriminator, x) for x in (real, fake))
    return F.softplus(b - a).mean() + r1 + r2


LAZY = GradientPenalty("r1", every=STEPS)


def lazy(discriminator, real, fake):
    """Take a step with a penalty, then a step without one."""
    return F.softplus(discriminator(fake) - discriminator(real)).mean() + LAZY(discriminator, real)


LOSSES = {"gradient_penalty": wgan_gp, "logits_and_penalty": one_pass, "lazy": lazy}
CASES = [(critic, loss) for critic in CRITICS for loss in LOSSES]


def gradients(critic, loss, wrap, rows):
    """Return the gradients after two steps. State left by the first step could corrupt the second."""
    torch.manual_seed(1)
    discriminator = CRITICS[critic]().double()
    wrapped = wrap(discriminator)
    real, fake = torch.randn(2, RANKS * N, 3, 8, 8, dtype=torch.float64)
    optimizer = torch.optim.SGD(discriminator.parameters(), lr=0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        LOSSES[loss](wrapped, real[rows], fake[rows]).backward()
        optimizer.step()
    return [p.grad for p in discriminator.parameters()]


def work(rank):
    own = slice(rank * N, (rank + 1) * N)
    # Without broadcasting: u and v are equal on all ranks and must not change between two forwards. Not for BatchNorm.
    wrap = lambda model: nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)  # noqa: E731
    assert fastgan.explain_penalty(wrap(Critic()), torch.randn(2, 3, 8, 8)) == "one pass"
    return [gradients(*case, wrap, own) for case in CASES]


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    return found_by_ranks(__file__, tmp_path_factory.mktemp("ranks"))


@needs_gloo
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_two_ranks_have_the_gradients_of_one_process_with_all_samples(of_ranks, case):
    expected = gradients(*case, lambda model: model, slice(None))
    for found in of_ranks:
        for actual, wanted in zip(found[CASES.index(case)], expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-12)


if __name__ == "__main__":
    as_rank(work)
