"""A StyleGAN2-like loop (Karras et al., 2020) on discs: residual D, minibatch stddev, lazy R1; with fastgan."""

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, leaky_relu, softplus

import fastgan
from fastgan.nn import MinibatchStdDev

LATENT, R1_WEIGHT, R1_EVERY = 64, 1.0, 4


def discs(count: int) -> Tensor:
    """Soft bright discs of random position and size, (count, 1, 32, 32) in [-1, 1]."""
    x, y, radius = torch.rand(3, count, 1, 1)
    axis = torch.arange(32.0)
    distance = torch.hypot(axis - (8 + 16 * x), axis[:, None] - (8 + 16 * y))
    return torch.tanh(4 + 4 * radius - distance)[:, None]


class StyleBlock(nn.Module):
    """Doubles the resolution. The style scales the channels of the convolution's input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.style = nn.Linear(LATENT, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        x = interpolate(x, scale_factor=2) * (1 + self.style(w))[:, :, None, None]
        return leaky_relu(self.conv(x), 0.2)


class Generator(nn.Module):
    def __init__(self, channels: int = 48) -> None:
        super().__init__()
        self.mapping = nn.Sequential(nn.Linear(LATENT, LATENT), nn.LeakyReLU(0.2), nn.Linear(LATENT, LATENT))
        self.constant = nn.Parameter(torch.randn(1, channels, 4, 4))
        self.blocks = nn.ModuleList(StyleBlock(channels) for _ in range(3))
        self.to_image = nn.Conv2d(channels, 1, 1)

    def forward(self, z: Tensor) -> Tensor:
        w = self.mapping(z)
        x = self.constant.expand(len(z), -1, -1, -1)
        for block in self.blocks:
            x = block(x, w)
        return self.to_image(x).tanh()


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, inputs, 3, padding=1)
        self.second = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = leaky_relu(self.first(x), 0.2)
        y = leaky_relu(self.second(avg_pool2d(y, 2)), 0.2)
        return (y + self.skip(avg_pool2d(x, 2))) / 2**0.5


def make_discriminator() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 1),
        nn.LeakyReLU(0.2),
        ResidualBlock(32, 48),
        ResidualBlock(48, 64),
        ResidualBlock(64, 64),
        MinibatchStdDev(),
        nn.Conv2d(65, 64, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 1),
    )


def train(steps: int, batch: int = 16, seed: int = 0) -> list[float]:
    """Train, and return the discriminator's losses."""
    torch.manual_seed(seed)
    generator, discriminator = Generator(), make_discriminator()
    g_optimizer = torch.optim.Adam(generator.parameters(), lr=2e-3, betas=(0.0, 0.99))
    d_optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-3, betas=(0.0, 0.99))
    losses = []
    for step in range(steps):
        real = discs(batch)
        fake = generator(torch.randn(batch, LATENT)).detach()
        loss = softplus(-discriminator(real)).mean() + softplus(discriminator(fake)).mean()
        if step % R1_EVERY == 0:
            loss = loss + R1_EVERY * fastgan.gradient_penalty(discriminator, real, kind="r1", weight=R1_WEIGHT)
        d_optimizer.zero_grad()
        loss.backward()
        d_optimizer.step()
        losses.append(loss.item())
        g_optimizer.zero_grad()
        softplus(-discriminator(generator(torch.randn(batch, LATENT)))).mean().backward()
        g_optimizer.step()
    return losses


if __name__ == "__main__":
    for i, loss in enumerate(train(steps=100)):
        print(i, f"{loss:.4f}")
