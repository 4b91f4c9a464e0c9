"""SNGAN (Miyato et al., 2018) on synthetic discs: spectral norm on every layer of D, hinge loss, with fastgan."""

import torch
from torch import Tensor, nn
from torch.nn.functional import relu
from torch.nn.utils.parametrizations import spectral_norm

from fastgan.nn.utils import fuse_spectral_norm

LATENT = 64


def discs(count: int) -> Tensor:
    """Soft bright discs of random position and size, (count, 1, 32, 32) in [-1, 1]."""
    x, y, radius = torch.rand(3, count, 1, 1)
    axis = torch.arange(32.0)
    distance = torch.hypot(axis - (8 + 16 * x), axis[:, None] - (8 + 16 * y))
    return torch.tanh(4 + 4 * radius - distance)[:, None]


def make_generator() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (LATENT, 1, 1)),
        nn.ConvTranspose2d(LATENT, 128, 4),
        nn.BatchNorm2d(128),
        nn.ReLU(),
        nn.ConvTranspose2d(128, 64, 4, 2, 1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 4, 2, 1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 1, 4, 2, 1),
        nn.Tanh(),
    )


def make_discriminator() -> nn.Module:
    return nn.Sequential(
        spectral_norm(nn.Conv2d(1, 32, 3, 1, 1)),
        nn.LeakyReLU(0.1),
        spectral_norm(nn.Conv2d(32, 64, 4, 2, 1)),
        nn.LeakyReLU(0.1),
        spectral_norm(nn.Conv2d(64, 128, 4, 2, 1)),
        nn.LeakyReLU(0.1),
        nn.Flatten(),
        spectral_norm(nn.Linear(128 * 8 * 8, 1)),
    )


def train(steps: int, batch: int = 32, seed: int = 0) -> list[float]:
    """Train, and return the discriminator's losses."""
    torch.manual_seed(seed)
    generator, discriminator = make_generator(), fuse_spectral_norm(make_discriminator())
    g_optimizer = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.0, 0.9))
    d_optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.0, 0.9))
    losses = []
    for _ in range(steps):
        fake = generator(torch.randn(batch, LATENT)).detach()
        loss = relu(1 - discriminator(discs(batch))).mean() + relu(1 + discriminator(fake)).mean()
        d_optimizer.zero_grad()
        loss.backward()
        d_optimizer.step()
        losses.append(loss.item())
        g_optimizer.zero_grad()
        (-discriminator(generator(torch.randn(batch, LATENT))).mean()).backward()
        g_optimizer.step()
    return losses


if __name__ == "__main__":
    for i, loss in enumerate(train(steps=200)):
        print(i, f"{loss:.4f}")
