"""DistributedDataParallel and FSDP2 around discriminators with spectral norm: two ranks train as one with all samples.

Each step calls D twice and takes a penalty before one backward, and gathers its gradients over two parts of the batch.
"""

from __future__ import annotations

import os
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.utils import parametrizations

import fastgan
from fastgan.nn import utils
from tests.distributed.processes import RANKS, as_rank, found_by_ranks, needs_gloo

N, PARTS, STEPS = 4, 2, 3


def critic(norm, fuse):
    layers = norm(nn.Conv2d(3, 4, 3)), nn.LeakyReLU(0.2), norm(nn.Conv2d(4, 6, 3)), nn.Flatten(), norm(nn.Linear(96, 1))
    return fuse(nn.Sequential(*layers).double())


def converted(model):
    assert len(fastgan.convert(model).replaced) == 3
    return model


FORMS = {
    "apart": (utils.spectral_norm, lambda model: model),
    "fused": (utils.spectral_norm, utils.fuse_spectral_norm),
    "fused hooks": (nn.utils.spectral_norm, utils.fuse_spectral_norm),
    "converted": (parametrizations.spectral_norm, converted),
}


def sharded(model, by_layer):
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    if by_layer:
        for layer in model:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def buffers_broadcast(model, broadcast):
    return nn.parallel.DistributedDataParallel(model, broadcast_buffers=broadcast)


WRAPPERS = {
    "DDP, buffers broadcast": lambda model: buffers_broadcast(model, True),
    "DDP, buffers kept": lambda model: buffers_broadcast(model, False),
    "FSDP2 of the whole": lambda model: sharded(model, by_layer=False),
    "FSDP2 of each layer": lambda model: sharded(model, by_layer=True),
}
EVERY = os.environ.get("FASTGAN_TESTS") == "all"
CASES = [
    (form, wrapper) for i, form in enumerate(FORMS) for j, wrapper in enumerate(WRAPPERS) if EVERY or (i + j) % 2 == 0
]


def train(form, wrap, rows):
    """Weights, u and v after some steps."""
    torch.manual_seed(2)
    model = wrap(critic(*FORMS[form]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    data = torch.randn(STEPS, PARTS, 2, RANKS * N, 3, 8, 8, dtype=torch.float64)
    for step in data:
        optimizer.zero_grad()
        for part, (real, fake) in enumerate(step):
            accumulate = model.no_sync() if part < PARTS - 1 and hasattr(model, "no_sync") else nullcontext()
            with accumulate:
                loss = nn.functional.softplus(-model(real[rows])).mean() + model(fake[rows]).square().mean()
                loss = loss + fastgan.gradient_penalty(model, real[rows], kind="r1", weight=0.5)
                loss.backward()
        optimizer.step()
    return [t.full_tensor() if hasattr(t, "full_tensor") else t for t in model.state_dict().values()]


def work(rank):
    own = slice(rank * N, (rank + 1) * N)
    return {case: train(case[0], WRAPPERS[case[1]], own) for case in CASES}


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    return found_by_ranks(__file__, tmp_path_factory.mktemp("ranks"))


@needs_gloo
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_two_ranks_train_as_one_process_with_all_samples(of_ranks, case):
    expected = train(case[0], lambda model: model, slice(None))
    for trained in of_ranks:
        for actual, wanted in zip(trained[case], expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-12)


if __name__ == "__main__":
    as_rank(work)
