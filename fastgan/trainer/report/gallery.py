"""Pictures that show whether the latent space is smooth and whether the samples are new."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan.trainer.data.held_out import sample_reals
from fastgan.trainer.gan import GAN

ROWS = 6
COLUMNS = 10
NEAREST = 3
SEARCHED = 10_000  # training samples to search for neighbors


@torch.no_grad()
def interpolations(gan: GAN, seed: int, rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    """Return samples (rows * columns, *S) on great circles between pairs of latents. Each row keeps its class.

    A straight line between two Gaussian vectors would pass near the origin, which the generator never sees in training
    (White 2016).
    """
    start, end = torch.randn(2, rows, gan.latent_dim, generator=torch.Generator().manual_seed(seed), device="cpu")
    angle = torch.nn.functional.cosine_similarity(start, end).acos()[:, None, None]  # (R, 1, 1)
    t = torch.linspace(0, 1, columns, device="cpu")[:, None]  # (C, 1)
    z = (((1 - t) * angle).sin() * start[:, None] + (t * angle).sin() * end[:, None]) / angle.sin()  # (R, C, Z)
    z = z.flatten(0, 1).to(gan.device)
    labels = (torch.arange(rows, device=gan.device).repeat_interleave(columns) % gan.classes,) if gan.classes else ()
    samples: Tensor = gan.ema.module(z, *labels)
    return samples.cpu()


@torch.no_grad()
def nearest_reals(gan: GAN, samples: Tensor, seed: int, count: int = NEAREST) -> Tensor:
    """Return each of `samples` (N, *S), followed by its `count` nearest training samples: (N * (1 + count), *S).

    The distance is Euclidean in pixels, which reveals copies of training images.
    """
    pool = sample_reals(gan.source, min(SEARCHED, gan.source.size or SEARCHED), seed)[0].cpu()
    distance = torch.cdist(samples.flatten(1), pool.flatten(1))  # (N, P)
    index = distance.topk(min(count, len(pool)), largest=False).indices  # (N, count)
    return torch.cat([samples[:, None], pool[index]], 1).flatten(0, 1)
