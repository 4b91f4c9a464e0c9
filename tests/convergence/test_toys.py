from __future__ import annotations

import dataclasses

import pytest
import torch

from fastgan.trainer.config import PRESETS
from fastgan.trainer.data.sources import load_source
from fastgan.trainer.gan import GAN

pytestmark = pytest.mark.small

CPU = torch.device("cpu")


@pytest.fixture
def one_thread():
    """Use one thread. Networks of 64 units do not gain from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(steps: int, **optim: object) -> tuple[GAN, torch.Tensor]:
    """Return the ring8 preset after `steps`, and 2000 of its samples."""
    preset = PRESETS["ring8"][1]
    gan = GAN(
        preset.model,
        dataclasses.replace(preset.optim, **optim),
        load_source("ring8", 2, CPU),
        seed=0,
        device=CPU,
    )
    for _ in range(steps):
        gan.step()
    noise = torch.randn(2000, preset.model.latent_dim, generator=torch.Generator().manual_seed(3))
    return gan, gan.samples(noise)


def test_ring8_with_fused_spectral_norm_covers_all_modes_within_1200_steps(one_thread):
    gan, samples = trained(1200)
    near = gan.source.shares(samples, radius=0.1)  # the next mode is 0.77 away
    assert float(near.min()) > 0.02  # every mode gets at least a sixth of its fair share
    assert float(near.sum()) > 0.4


def test_ring8_untrained_covers_no_mode_well(one_thread):
    gan, samples = trained(1)
    assert float(gan.source.shares(samples, radius=0.1).sum()) < 0.1
