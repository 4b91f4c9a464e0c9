"""Discriminators, the ways to shard them with FSDP2, losses with penalties, and the gradients to expect."""

from __future__ import annotations

import copy
import os

import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import fastgan
from fastgan.nn import GradientPenalty, utils

EVERY = os.environ.get("FASTGAN_TESTS") == "all"  # otherwise each model and loss with the ways in turn
N = 3


def convolutions(*norms, activation=None, norm=lambda layer: layer):
    """5 and 7 channels, which two and four ranks share unevenly. Some ranks have no part of the single output."""
    activation = activation or nn.LeakyReLU(0.2)
    first, second, head = norm(nn.Conv2d(3, 5, 4, 2, 1)), norm(nn.Conv2d(5, 7, 3)), norm(nn.Linear(28, 1))
    return nn.Sequential(first, activation, second, *norms, activation, nn.Flatten(), head)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.read, self.head = nn.GRU(24, 6, batch_first=True), nn.Linear(6, 1)

    def forward(self, x):
        return self.head(self.read(x.flatten(1, 2).transpose(1, 2).contiguous())[0][:, -1])


class Twice(nn.Module):
    """One layer is called twice, and two layers share a weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.tied = nn.Linear(192, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.tied.weight = self.inner.weight
        self.head = nn.Linear(6, 1)

    def forward(self, x):
        h = F.relu(self.embed(x.flatten(1)))
        return self.head(F.relu(self.tied(F.relu(self.inner(F.relu(self.inner(h)))))))


class Frozen(nn.Sequential):
    def __init__(self):
        super().__init__(*convolutions())
        self[0].requires_grad_(False)


MODELS = {
    "affine": convolutions,
    "smooth": lambda: convolutions(activation=nn.SiLU()),
    "batch norm": lambda: convolutions(nn.BatchNorm2d(7)),
    "group norm": lambda: convolutions(nn.GroupNorm(7, 7)),
    "spectral norm": lambda: convolutions(norm=utils.spectral_norm),
    "fused spectral norm": lambda: utils.fuse_spectral_norm(convolutions(norm=utils.spectral_norm)),
    "PyTorch's spectral norm": lambda: convolutions(norm=parametrizations.spectral_norm),
    "PyTorch's older spectral norm": lambda: convolutions(norm=nn.utils.spectral_norm),
    "recurrent": Recurrent,
    "twice": Twice,
    "frozen": Frozen,
}


def of_layers(model, mesh, **options):
    from torch.distributed.fsdp import fully_shard

    for layer in model.children():
        if list(layer.parameters()) and not isinstance(model, Twice):
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def of_whole(model, mesh, **options):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=mesh, **options)


def of_groups(model, mesh, **options):
    from torch.distributed.fsdp import fully_shard

    children = [child for child in model.children() if list(child.parameters())]
    if not isinstance(model, Twice):
        fully_shard(children[:2], mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


SHARDED = {"whole": of_whole, "layers": of_layers, "groups": of_groups}


def r1(model, real, fake):
    logits, penalty = fastgan.logits_and_penalty(model, real, kind="r1")
    return F.softplus(-logits).mean() + penalty


def penalty_alone(model, real, fake):
    return fastgan.gradient_penalty(model, real, kind="r1+r2" if fake is not None else "r1", fake=fake)


def plain(model, real, fake):
    """FSDP's hooks alone."""
    return F.softplus(model(fake)).mean() + model(real).square().mean()


def whole_step(model, real, fake):
    """Forwards with FSDP's hooks before and after the penalties."""
    loss = F.softplus(model(fake)).mean()
    logits, penalty = fastgan.logits_and_penalty(model, real, kind="r1")
    return loss + F.softplus(-logits).mean() + penalty + model(real).square().mean()


def lazy(model, real, fake):
    return GradientPenalty("r1", every=2)(model, real)


def inside_a_function(model, real, fake):
    return fastgan.gradient_penalty(lambda x: model(x), real, kind="r1")


def approximate(model, real, fake):
    return fastgan.gradient_penalty(model, real, kind="r1-finite-difference")


LOSSES = {f.__name__: f for f in (r1, penalty_alone, plain, whole_step, lazy, inside_a_function, approximate)}


def built(name):
    torch.manual_seed(0)
    return MODELS[name]().double()


def data():
    """Return the real and fake samples of this rank."""
    torch.manual_seed(5)
    return torch.randn(2, dist.get_world_size(), N, 3, 8, 8, dtype=torch.float64)[:, dist.get_rank()]


def gradients(model):
    """Return the gradients by name. None counts as zeros, because some ranks have no part of a parameter."""
    whole = ((name, p, p.grad) for name, p in model.named_parameters())
    return {name: torch.zeros(p.shape, dtype=p.dtype) if grad is None else whole_of(grad) for name, p, grad in whole}


def whole_of(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def mean_of_ranks(model, loss):
    """Return the mean of the ranks' gradients, which each rank computes with the whole model."""
    own = copy.deepcopy(model)
    loss(own, *data()).backward()
    means = {name: grad.double() / dist.get_world_size() for name, grad in gradients(own).items()}
    for mean in means.values():
        dist.all_reduce(mean)
    return means


def check(found):
    gradients, expected, parts = found
    assert parts
    assert gradients.keys() == expected.keys()
    for name, grad in gradients.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-12)


def case(mesh, name, way, loss):
    """Return the gradients of a sharded model, the expected ones, and whether they are sharded like the parameters."""
    expected = mean_of_ranks(built(name), LOSSES[loss])
    model = SHARDED[way](built(name), mesh)
    LOSSES[loss](model, *data()).backward()
    parts = all(p.grad is None or p.grad.placements == p.placements for p in model.parameters())
    return gradients(model), expected, parts
