"""Compiled losses with penalties in two processes, each with half of the batch, against one with all."""

from __future__ import annotations

import os

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch._dynamo.backends.distributed import DDPOptimizer
from torch._dynamo.backends.registry import lookup_backend
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import fastgan
from tests.distributed.processes import RANKS, as_rank, found_by_ranks, needs_gloo

N, STEPS = 4, 2
BACKEND = "aot_eager"


def critic():
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(3, 6, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(6, 6, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(96, 1),
    )


def gradient_penalty(model, real, fake):
    return F.softplus(model(fake) - model(real)).mean() + fastgan.gradient_penalty(model, real, fake, kind="r1+r2")


def one_pass(model, real, fake):
    logits, penalty = fastgan.logits_and_penalty(model, real)
    return F.softplus(model(fake)).mean() + F.softplus(-logits).mean() + penalty


@fastgan.compilable
def by_hand(model, real, fake):
    real.requires_grad_()
    logits = model(real)
    (grad,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
    return F.softplus(model(fake)).mean() + F.softplus(-logits).mean() + grad.square().sum((1, 2, 3)).mean()


class Losses(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.discriminator, self.loss = critic(), loss

    def forward(self, real, fake):
        return self.loss(self.discriminator, real, fake)


def reduced_by_hooks(module):
    def reduce(parameter):
        dist.all_reduce(parameter.grad)
        parameter.grad /= RANKS

    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(reduce)
    return module


def sharded(module):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(module, mesh=init_device_mesh("cpu", (RANKS,)))


def wrapped_discriminator(losses):
    losses.discriminator = DistributedDataParallel(losses.discriminator)
    return losses


LOSSES = {"gradient_penalty": gradient_penalty, "logits_and_penalty": one_pass, "by hand": by_hand}
# The wrapped module, and the number of graphs: None where PyTorch decides.
WAYS = {
    "DDP of the compiled loss": (
        lambda losses, backend: DistributedDataParallel(torch.compile(losses, backend=backend, fullgraph=True)),
        1,
    ),
    "DDP, compiled": (lambda losses, backend: torch.compile(DistributedDataParallel(losses), backend=backend), 1),
    "hooks after the compiled loss": (
        lambda losses, backend: reduced_by_hooks(torch.compile(losses, backend=backend, fullgraph=True)),
        1,
    ),
    "DDP inside the loss, compiled around": (
        lambda losses, backend: torch.compile(wrapped_discriminator(losses), backend=backend),
        None,
    ),
}
CASES = [
    ("gradient_penalty", "DDP of the compiled loss"),
    ("logits_and_penalty", "DDP inside the loss, compiled around"),
]
if os.environ.get("FASTGAN_TESTS") == "all":
    CASES += [
        ("by hand", "DDP, compiled"),
        ("logits_and_penalty", "DDP of the compiled loss"),
        ("by hand", "DDP of the compiled loss"),
        ("gradient_penalty", "hooks after the compiled loss"),
    ]


def train(module, rows):
    """Return the gradients of all steps."""
    optimizer = torch.optim.SGD(module.parameters(), 0.05)
    data = torch.randn(STEPS, 2, RANKS * N, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    found = []
    for real, fake in data:
        optimizer.zero_grad()
        module(real[rows], fake[rows]).backward()
        found += [parameter.grad.clone() for parameter in module.parameters()]
        optimizer.step()
    return found


def split_at_every_parameter(self, *arguments, _init=DDPOptimizer.__init__, **keywords):
    """Make several buckets, as for a discriminator of many megabytes."""
    _init(self, *arguments, **keywords)
    self.first_bucket_cap = 1


def work(rank):
    DDPOptimizer.__init__ = split_at_every_parameter
    rows, results = slice(rank * N, rank * N + N), []
    for loss, way in CASES:
        torch.compiler.reset()
        graphs = []

        def backend(graph, inputs, graphs=graphs):
            graphs.append(graph)
            return lookup_backend(BACKEND)(graph, inputs)

        results.append((train(WAYS[way][0](Losses(LOSSES[loss]), backend), rows), len(graphs)))
    discriminator = DistributedDataParallel(critic())
    step = torch.compile(
        lambda x: fastgan.gradient_penalty(discriminator, x, kind="r1"), backend=BACKEND, fullgraph=True
    )
    with pytest.raises(Exception, match=r"DistributedDataParallel\(torch.compile\(losses\)\)"):
        step(torch.randn(N, 3, 8, 8))
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return found_by_ranks(__file__, tmp_path_factory.mktemp("ranks"))


@needs_gloo
@pytest.mark.parametrize("case", CASES, ids=lambda case: ", ".join(case))
def test_two_processes_train_as_one_with_all_samples(case, ranks):
    loss, way = case
    expected = train(Losses(LOSSES[loss]), slice(None))
    for results in ranks:
        grads, graphs = results[CASES.index(case)]
        for actual, wanted in zip(grads, expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)
        assert graphs == WAYS[way][1] or WAYS[way][1] is None


if __name__ == "__main__":
    as_rank(work)
