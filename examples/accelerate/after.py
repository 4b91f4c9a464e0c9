"""WGAN-GP on a ring of eight Gaussians under Hugging Face accelerate, with fastgan."""

import math

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import fastgan

LATENT, WIDTH = 8, 64


def ring(count: int) -> Tensor:
    angle = 2 * math.pi * torch.randint(8, (count,)) / 8
    return torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(count, 2)


def mlp(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, WIDTH),
        nn.LeakyReLU(0.2),
        nn.Linear(WIDTH, WIDTH),
        nn.LeakyReLU(0.2),
        nn.Linear(WIDTH, outputs),
    )


def train(steps: int, batch: int = 64, seed: int = 0) -> list[float]:
    """Train, and return the critic's losses."""
    torch.manual_seed(seed)
    accelerator = Accelerator()
    generator, critic = mlp(LATENT, 2), mlp(2, 1)
    g_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.0, 0.9))
    c_optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.0, 0.9))
    generator, critic, g_optimizer, c_optimizer = accelerator.prepare(generator, critic, g_optimizer, c_optimizer)
    losses = []
    for _ in range(steps):
        real = ring(batch).to(accelerator.device)
        fake = generator(torch.randn(batch, LATENT, device=accelerator.device)).detach()
        loss = critic(fake).mean() - critic(real).mean() + fastgan.gradient_penalty(critic, real, fake)
        c_optimizer.zero_grad()
        accelerator.backward(loss)
        c_optimizer.step()
        losses.append(loss.item())
        g_optimizer.zero_grad()
        accelerator.backward(-critic(generator(torch.randn(batch, LATENT, device=accelerator.device))).mean())
        g_optimizer.step()
    return losses


if __name__ == "__main__":
    for i, loss in enumerate(train(steps=200)):
        print(i, f"{loss:.4f}")
