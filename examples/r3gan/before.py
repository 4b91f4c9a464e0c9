"""An R3GAN-like loop (Huang et al., 2024) on discs: relativistic loss, R1 and R2 on every step; plain PyTorch."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import softplus

LATENT, STAGES, WIDTH, GROUPS, WEIGHT = 32, 2, 12, 4, 0.2


def discs(count: int) -> Tensor:
    """Soft bright discs of random position and size, (count, 1, 16, 16) in [-1, 1]."""
    x, y, radius = torch.rand(3, count, 1, 1)
    axis = torch.arange(16.0)
    distance = torch.hypot(axis - (4 + 8 * x), axis[:, None] - (4 + 8 * y))
    return torch.tanh(2 + 2 * radius - distance)[:, None]


def upfirdn2d(x: Tensor, f: Tensor, up: int = 1, down: int = 1, padding: tuple = (), gain: float = 1) -> Tensor:
    """Insert zeros, pad, filter and keep every n-th element."""
    n, c, h, w = x.shape
    x = F.pad(x[:, :, :, None, :, None], [0, up - 1, 0, 0, 0, up - 1]).reshape(n, c, h * up, w * up)
    taps = torch.outer(f, f).flip([0, 1]) * gain
    return F.conv2d(F.pad(x, padding), taps.to(x.dtype).expand(c, 1, *taps.shape), groups=c)[:, :, ::down, ::down]


def bias_act(x: Tensor, b: Tensor, activation: str, gain: float | None) -> Tensor:
    return F.leaky_relu(x + b[:, None, None], 0.2) * 2**0.5


def conv(inputs: int, outputs: int, kernel: int, groups: int = 1, gain: float = 1.0) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
    nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.weight[0].numel()))
    return layer


class BiasedActivation(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return bias_act(x, self.bias, activation="lrelu", gain=None)


class ResidualBlock(nn.Module):
    """No normalization: the last convolution starts near zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            conv(channels, 2 * channels, 1),
            BiasedActivation(2 * channels),
            conv(2 * channels, 2 * channels, 3, GROUPS),
            BiasedActivation(2 * channels),
            conv(2 * channels, channels, 1, gain=0.1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Resample(nn.Module):
    """Doubles or halves the resolution with a binomial filter."""

    def __init__(self, up: bool) -> None:
        super().__init__()
        self.up = up
        self.register_buffer("taps", torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8)

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            return upfirdn2d(x, self.taps, up=2, padding=(2, 1, 2, 1), gain=4)
        return upfirdn2d(x, self.taps, down=2, padding=(1, 1, 1, 1))


def make_generator() -> nn.Module:
    stages = [layer for _ in range(STAGES) for layer in (Resample(up=True), ResidualBlock(WIDTH))]
    basis = nn.ConvTranspose2d(LATENT, WIDTH, 4, bias=False)
    return nn.Sequential(nn.Unflatten(1, (LATENT, 1, 1)), basis, ResidualBlock(WIDTH), *stages, conv(WIDTH, 1, 1))


def make_discriminator() -> nn.Module:
    stages = [layer for _ in range(STAGES) for layer in (ResidualBlock(WIDTH), Resample(up=False))]
    basis = nn.Conv2d(WIDTH, WIDTH, 4, groups=WIDTH, bias=False)
    return nn.Sequential(conv(1, WIDTH, 1), *stages, ResidualBlock(WIDTH), basis, nn.Flatten(), nn.Linear(WIDTH, 1))


def logits_and_penalty(discriminator: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    images = images.detach().requires_grad_()
    logits = discriminator(images)
    (grad,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return logits, WEIGHT / 2 * grad.square().sum([1, 2, 3]).mean()


def train(steps: int, batch: int = 16, seed: int = 0) -> list[float]:
    """Train, and return the discriminator's losses."""
    torch.manual_seed(seed)
    generator, discriminator = make_generator(), make_discriminator()
    g_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.0, 0.99))
    d_optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.0, 0.99))
    losses = []
    for _ in range(steps):
        real, fake = discs(batch), generator(torch.randn(batch, LATENT)).detach()
        real_logits, r1 = logits_and_penalty(discriminator, real)
        fake_logits, r2 = logits_and_penalty(discriminator, fake)
        loss = softplus(fake_logits - real_logits).mean() + r1 + r2
        d_optimizer.zero_grad()
        loss.backward()
        d_optimizer.step()
        losses.append(loss.item())

        fake_logits = discriminator(generator(torch.randn(batch, LATENT)))
        loss = softplus(discriminator(discs(batch)) - fake_logits).mean()
        g_optimizer.zero_grad()
        loss.backward()
        g_optimizer.step()
    return losses


if __name__ == "__main__":
    for i, loss in enumerate(train(steps=100)):
        print(i, f"{loss:.4f}")
