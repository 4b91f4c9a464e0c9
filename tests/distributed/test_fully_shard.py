"""FSDP2 over gloo: fused spectral norm of a discriminator sharded whole is right; what would not be is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn

import fastgan
from fastgan.nn import utils

fsdp = pytest.importorskip("torch.distributed.fsdp", reason="needs torch.distributed")
if not hasattr(fsdp, "fully_shard"):
    pytest.skip("this PyTorch has no fully_shard", allow_module_level=True)

ROOT = Path(__file__).parents[2]
RANKS, N, STEPS = 2, 4, 3


def discriminator():
    torch.manual_seed(1)
    layers = nn.Conv2d(3, 6, 4, 2, 1), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(96, 1)
    first, second, head = (utils.spectral_norm(layer.double()) for layer in layers)
    return nn.Sequential(first, nn.LeakyReLU(0.2), second, nn.ReLU(), nn.Flatten(), head)


def whole(model):
    return fsdp.fully_shard(model, mesh=mesh())


def by_layers(model):
    for layer in model:
        if any(True for _ in layer.parameters()):
            fsdp.fully_shard(layer, mesh=mesh())
    return whole(model)


def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (RANKS,))


WRAPS = {
    "fused, then sharded": lambda model: whole(utils.fuse_spectral_norm(model)),
    "sharded, then fused": lambda model: utils.fuse_spectral_norm(whole(model)),
}
BY_LAYERS = {
    "fused, then by layers": lambda model: by_layers(utils.fuse_spectral_norm(model)),
    "by layers, then fused": lambda model: utils.fuse_spectral_norm(by_layers(model)),
}


def train(model, rows):
    """The weights and u, v after some steps of the hinge loss."""
    real, fake = torch.randn(2, RANKS * N, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = torch.relu(1 - model(real[rows])).mean() + torch.relu(1 + model(fake[rows])).mean()
        loss.backward()
        optimizer.step()
    return [value.full_tensor() if hasattr(value, "full_tensor") else value for value in model.state_dict().values()]


def refusal(wrap, loss):
    model = wrap(discriminator())
    try:
        loss(model, torch.randn(N, 3, 8, 8, dtype=torch.float64)).sum().backward()
    except (RuntimeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def from_logits(model, images):
    images.requires_grad_()
    return fastgan.penalty_from_logits(model(images), images)


PENALTIES = {
    "gradient_penalty": lambda model, images: fastgan.gradient_penalty(model, images, kind="r1"),
    "logits_and_penalty": lambda model, images: fastgan.logits_and_penalty(model, images)[1],
    "penalty_from_logits": from_logits,
}


def work(rank, directory):
    store = dist.FileStore(str(Path(directory, "store")), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    found = {name: train(wrap(discriminator()), slice(rank * N, (rank + 1) * N)) for name, wrap in WRAPS.items()}
    found |= {name: refusal(whole, penalty) for name, penalty in PENALTIES.items()}
    found |= {name: refusal(wrap, lambda model, images: model(images)) for name, wrap in BY_LAYERS.items()}
    torch.save(found, Path(directory, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    processes = [subprocess.Popen([*command, str(rank), str(directory)], env=environment) for rank in range(RANKS)]
    try:
        assert [process.wait(120) for process in processes] == [0] * RANKS
    finally:
        for process in processes:
            process.kill()
    return [torch.load(directory / f"{rank}.pt") for rank in range(RANKS)]


needs_gloo = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")


@needs_gloo
@pytest.mark.parametrize("wrap", WRAPS)
def test_a_model_sharded_whole_trains_as_one_process_with_all_samples(of_ranks, wrap):
    expected = train(utils.fuse_spectral_norm(discriminator()), slice(None))
    for found in of_ranks:
        assert len(found[wrap]) == len(expected) == 12
        for actual, wanted in zip(found[wrap], expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-12)


@needs_gloo
@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_penalty_of_a_sharded_discriminator_is_refused(of_ranks, penalty):
    for found in of_ranks:
        assert found[penalty].startswith("RuntimeError: the discriminator is sharded by fully_shard")
        assert "DistributedDataParallel" in found[penalty]


@needs_gloo
@pytest.mark.parametrize("order", BY_LAYERS)
def test_fused_weights_of_layers_that_are_sharded_one_by_one_are_refused(of_ranks, order):
    for found in of_ranks:
        assert found[order].startswith("TypeError: fuse_spectral_norm needs the model's weights whole")


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
