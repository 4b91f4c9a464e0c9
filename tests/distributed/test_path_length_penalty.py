"""The average length covers the samples of all ranks. Gradient normalization works with sharded discriminators."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastgan.nn import GradientNormalized, PathLengthPenalty
from tests.distributed.processes import RANKS, as_rank, found_by_ranks, needs_gloo

N = 3


def generator():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.SiLU(), nn.Linear(12, 3 * 16), nn.Unflatten(1, (3, 4, 4))).double()


def lengths(make, latents, seed):
    torch.manual_seed(seed)
    images = make(latents)
    noise = torch.randn_like(images) / 4
    (g,) = torch.autograd.grad((images * noise).sum(), latents, create_graph=True)
    return g.norm(dim=1)


def data():
    torch.manual_seed(9)
    return torch.randn(2, RANKS, N, 6, dtype=torch.float64).requires_grad_()


def critic():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.SiLU(), nn.Linear(5, 1)).double()


def normalized(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = critic(), init_device_mesh("cpu", (RANKS,))
    for layer in model[0], model[2]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    GradientNormalized(model)(data()[0, rank].detach()).mean().backward()
    return [p.grad.full_tensor() for p in model.parameters()]


def work(rank):
    module, make = PathLengthPenalty().double(), generator()
    steps = []
    for step, latents in enumerate(data()):
        w = latents[rank].detach().requires_grad_()
        images = make(w)
        torch.manual_seed(10 * step + rank)
        steps.append((module(images, w).detach(), module.average.clone()))
    return steps, normalized(rank)


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    return found_by_ranks(__file__, tmp_path_factory.mktemp("ranks"))


@needs_gloo
def test_the_average_is_that_of_all_ranks(of_ranks):
    average = torch.zeros((), dtype=torch.float64)
    for step, latents in enumerate(data()):
        each = [lengths(generator(), latents[rank], 10 * step + rank) for rank in range(RANKS)]
        average = average.lerp(torch.cat(each).mean().detach(), 0.01)
        for rank, (steps, _) in enumerate(of_ranks):
            torch.testing.assert_close(steps[step], (2 * (each[rank] - average).square().mean().detach(), average))


@needs_gloo
def test_a_sharded_discriminator_normalized_by_its_gradient(of_ranks):
    model = critic()
    sum(GradientNormalized(model)(x.detach()).mean() / RANKS for x in data()[0]).backward()
    for _, found in of_ranks:
        for mine, p in zip(found, model.parameters(), strict=True):
            torch.testing.assert_close(mine, p.grad)


if __name__ == "__main__":
    as_rank(work)
