"""Distance of a run from an equilibrium of its game: an estimate of the duality gap on held-out data."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from fastgan.trainer.data.drawn import Source
from fastgan.trainer.data.held_out import sample_reals
from fastgan.trainer.gan import GAN
from fastgan.trainer.measure.diagnostics import evaluating, preserved_buffers

STEPS = 20  # training steps of each best response
BATCHES = 4  # batches that the value is averaged over


def duality_gap(gan: GAN, held_out: Source, seed: int, steps: int = STEPS) -> dict[str, float]:
    """max_D' V(D', G) - min_G' V(D, G'), with the value V(D, G) = -(the discriminator's loss).

    The gap is zero at an equilibrium, where neither network can gain by changing alone, and positive elsewhere. In mode
    collapse D' gains; if the discriminator lags behind or is fooled, D' or G' gains. Each best response is a copy that
    trains for `steps` of the run's own steps on training data, while the other network is fixed. V is then computed on
    samples that neither has seen. A few steps do not reach the optimum, so this estimates the gap from below, and noise
    can make it slightly negative. Grnarova et al. 2019, A Domain Agnostic Measure for Monitoring and Evaluating
    GANs.

    Returns:
        duality_gap, and its two halves: d_gain = V(D', G) - V(D, G), g_gain = V(D, G) - V(D, G').
    """
    with torch.random.fork_rng(devices=[gan.device] if gan.device.type == "cuda" else []):
        torch.manual_seed(seed)
        stronger_d, stronger_g = twin(gan, seed), twin(gan, seed + 1)
        for _ in range(steps):
            stronger_d.discriminator_step(stronger_d.batch())
            stronger_g.generator_step(stronger_g.generator_batch())
        batch = BATCHES * gan.optim.batch_size
        real, labels = sample_reals(held_out, batch, seed)
        z = torch.randn(batch, gan.latent_dim, generator=torch.Generator().manual_seed(seed), device="cpu").to(
            gan.device
        )
        now, d_best, g_best = (value(player, real, labels, z) for player in (gan, stronger_d, stronger_g))
    return {"duality_gap": d_best - g_best, "d_gain": d_best - now, "g_gain": now - g_best}


@torch.no_grad()
def value(gan: GAN, real: Tensor, labels: Tensor | None, z: Tensor) -> float:
    """Return V(D, G) on `real` (N, ...) and on the generator's samples of `z` (N, latent_dim)."""
    labels = labels if gan.classes else None
    total = 0.0
    size = gan.optim.batch_size
    with preserved_buffers(gan.generator), evaluating(gan.discriminator):
        for part in (slice(start, start + size) for start in range(0, len(real), size)):
            y = None if labels is None else labels[part]
            real_logits, fake_logits = gan.logits(real[part], y), gan.logits(gan.fakes(z[part], y), y)
            total -= float(gan.loss.discriminator(real_logits, fake_logits))
    return total * size / len(real)


def twin(gan: GAN, seed: int) -> GAN:
    """Copy the networks and optimizers. The copy has its own random streams and shares the training data."""
    own = {
        id(gan.source): gan.source.fork(seed),
        id(gan.noise): torch.Generator().manual_seed(seed),
        id(gan.ema): gan.ema,  # a temporary copy needs no average of its own
    }
    return copy.deepcopy(gan, own)
