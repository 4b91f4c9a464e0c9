"""WGAN-GP (Gulrajani et al., 2017) on synthetic discs, in plain PyTorch."""

import torch
from torch import Tensor, nn

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


def make_critic() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(32, 64, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(64, 128, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(128 * 4 * 4, 1),
    )


def gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    alpha = torch.rand(len(real), 1, 1, 1)
    x_hat = (alpha * real + (1 - alpha) * fake).requires_grad_()
    (grad,) = torch.autograd.grad(critic(x_hat).sum(), x_hat, create_graph=True)
    return 10 * (grad.flatten(1).norm(dim=1) - 1).square().mean()


def train(steps: int, batch: int = 32, critic_steps: int = 2, seed: int = 0) -> list[float]:
    """Train, and return the critic's losses."""
    torch.manual_seed(seed)
    generator, critic = make_generator(), make_critic()
    g_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-4, betas=(0.0, 0.9))
    c_optimizer = torch.optim.Adam(critic.parameters(), lr=1e-4, betas=(0.0, 0.9))
    losses = []
    for _ in range(steps):
        for _ in range(critic_steps):
            real = discs(batch)
            fake = generator(torch.randn(batch, LATENT)).detach()
            loss = critic(fake).mean() - critic(real).mean() + gradient_penalty(critic, real, fake)
            c_optimizer.zero_grad()
            loss.backward()
            c_optimizer.step()
            losses.append(loss.item())
        g_optimizer.zero_grad()
        (-critic(generator(torch.randn(batch, LATENT))).mean()).backward()
        g_optimizer.step()
    return losses


if __name__ == "__main__":
    for i, loss in enumerate(train(steps=100)):
        print(i, f"{loss:.4f}")
