"""A tabular GAN with a packed critic like CTGAN's (Xu et al., 2019; packing: Lin et al., 2018), in plain PyTorch."""

import torch
from torch import Tensor, nn

COLUMNS, LATENT, PACK = 6, 32, 10


def rows(count: int) -> Tensor:
    """Rows of two clusters with correlated columns, (count, COLUMNS)."""
    cluster = torch.randint(2, (count, 1)).float()
    base = torch.randn(count, 1)
    return torch.tanh(base * torch.linspace(-1, 1, COLUMNS) + 2 * cluster - 1 + 0.1 * torch.randn(count, COLUMNS))


def make_generator() -> nn.Module:
    return nn.Sequential(
        nn.Linear(LATENT, 128),
        nn.BatchNorm1d(128),
        nn.ReLU(),
        nn.Linear(128, 128),
        nn.BatchNorm1d(128),
        nn.ReLU(),
        nn.Linear(128, COLUMNS),
        nn.Tanh(),
    )


def make_critic() -> nn.Module:
    """Return a critic that judges PACK rows together."""
    return nn.Sequential(
        nn.Linear(COLUMNS * PACK, 256),
        nn.LeakyReLU(0.2),
        nn.Dropout(0.5),
        nn.Linear(256, 256),
        nn.LeakyReLU(0.2),
        nn.Dropout(0.5),
        nn.Linear(256, 1),
    )


def pack(x: Tensor) -> Tensor:
    return x.view(-1, COLUMNS * PACK)


def gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    alpha = torch.rand(len(real), 1)
    x_hat = (alpha * real + (1 - alpha) * fake).requires_grad_()
    (grad,) = torch.autograd.grad(critic(x_hat).sum(), x_hat, create_graph=True)
    return 10 * (grad.norm(dim=1) - 1).square().mean()


def train(steps: int, batch: int = 200, seed: int = 0) -> list[float]:
    """Train, and return the critic's losses."""
    torch.manual_seed(seed)
    generator, critic = make_generator(), make_critic()
    g_optimizer = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.9))
    c_optimizer = torch.optim.Adam(critic.parameters(), lr=2e-4, betas=(0.5, 0.9))
    losses = []
    for _ in range(steps):
        real = pack(rows(batch))
        fake = pack(generator(torch.randn(batch, LATENT)).detach())
        loss = critic(fake).mean() - critic(real).mean() + gradient_penalty(critic, real, fake)
        c_optimizer.zero_grad()
        loss.backward()
        c_optimizer.step()
        losses.append(loss.item())
        g_optimizer.zero_grad()
        (-critic(pack(generator(torch.randn(batch, LATENT)))).mean()).backward()
        g_optimizer.step()
    return losses


if __name__ == "__main__":
    for i, loss in enumerate(train(steps=200)):
        print(i, f"{loss:.4f}")
