"""A StyleGAN2-ADA-like loop (Karras et al., 2020) on discs: lazy R1, path length, ADA; with fastgan."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import softplus
from torch_utils.ops import bias_act, grid_sample_gradfix, upfirdn2d

import fastgan

fastgan.patch_torch_utils()

LATENT, CHANNELS = 32, 16
R1_WEIGHT, R1_EVERY = 1.0, 16
PATH_WEIGHT, PATH_EVERY, PATH_DECAY = 2.0, 4, 0.01
ADA_TARGET, ADA_EVERY, ADA_IMAGES = 0.6, 4, 2000


def discs(count: int) -> Tensor:
    """Soft bright discs of random position and size, (count, 1, 16, 16) in [-1, 1]."""
    x, y, radius = torch.rand(3, count, 1, 1)
    axis = torch.arange(16.0)
    distance = torch.hypot(axis - (4 + 8 * x), axis[:, None] - (4 + 8 * y))
    return torch.tanh(2 + 2 * radius - distance)[:, None]


class FullyConnected(nn.Module):
    """Equalized: the weight is scaled at each call, so that all layers learn at the same rate."""

    def __init__(self, inputs: int, outputs: int, act: str = "linear", bias: float = 0.0, rate: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / rate)
        self.bias = nn.Parameter(torch.full([outputs], bias / rate))
        self.act, self.gain, self.rate = act, rate / math.sqrt(inputs), rate

    def forward(self, x: Tensor) -> Tensor:
        return bias_act.bias_act(x @ (self.weight * self.gain).T, self.bias * self.rate, act=self.act)


class Conv2d(nn.Module):
    """Equalized, with a filtered downsampling by ``down``."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, act: str = "linear", down: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.act, self.down, self.gain = act, down, 1 / math.sqrt(inputs * kernel**2)
        self.register_buffer("taps", upfirdn2d.setup_filter([1, 3, 3, 1]))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight * self.gain, padding=self.weight.shape[-1] // 2)
        if self.down > 1:
            x = upfirdn2d.downsample2d(x, self.taps, down=self.down)
        return bias_act.bias_act(x, self.bias, act=self.act)


class SynthesisLayer(nn.Module):
    """A convolution whose weights the style scales and whose result is normalized."""

    def __init__(self, channels: int, up: int = 1) -> None:
        super().__init__()
        self.style = FullyConnected(LATENT, channels, bias=1.0)
        self.weight = nn.Parameter(torch.randn(channels, channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.up = up
        self.register_buffer("taps", upfirdn2d.setup_filter([1, 3, 3, 1]))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        style = self.style(w)
        norm = ((self.weight.square().sum([2, 3]) @ style.square().T).T + 1e-8).rsqrt()  # (N, C)
        if self.up > 1:
            x = upfirdn2d.upsample2d(x, self.taps, up=self.up)
        x = F.conv2d(x * style[:, :, None, None], self.weight, padding=1) * norm[:, :, None, None]
        return bias_act.bias_act(x, self.bias, act="lrelu")


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mapping = nn.Sequential(*(FullyConnected(LATENT, LATENT, "lrelu", rate=0.01) for _ in range(2)))
        self.constant = nn.Parameter(torch.randn(1, CHANNELS, 4, 4))
        self.layers = nn.ModuleList(SynthesisLayer(CHANNELS, up=2) for _ in range(2))
        self.to_image = Conv2d(CHANNELS, 1, 1)

    def synthesis(self, ws: Tensor) -> Tensor:
        x = self.constant.expand(len(ws), -1, -1, -1)
        for layer, w in zip(self.layers, ws.unbind(1), strict=True):
            x = layer(x, w)
        return self.to_image(x)

    def styles(self, z: Tensor) -> Tensor:
        z = z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()
        return self.mapping(z)[:, None].expand(-1, len(self.layers), -1)

    def forward(self, z: Tensor) -> Tensor:
        return self.synthesis(self.styles(z))


class MinibatchStdLayer(nn.Module):
    def __init__(self, group_size: int, num_channels: int = 1) -> None:
        super().__init__()
        self.group_size, self.num_channels = group_size, num_channels

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        size, parts = min(self.group_size, n), self.num_channels
        y = x.reshape(size, -1, parts, c // parts, h, w)
        y = (y.var(0, correction=0) + 1e-8).sqrt().mean([2, 3, 4])  # (N / size, parts)
        return torch.cat([x, y.repeat(size, 1)[:, :, None, None].expand(-1, -1, h, w)], 1)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = Conv2d(inputs, inputs, 3, "lrelu")
        self.second = Conv2d(inputs, outputs, 3, "lrelu", down=2)
        self.skip = Conv2d(inputs, outputs, 1, down=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.second(self.first(x)) + self.skip(x)) / math.sqrt(2)


def make_discriminator() -> nn.Module:
    return nn.Sequential(
        Conv2d(1, CHANNELS, 1, "lrelu"),
        *(Block(CHANNELS, CHANNELS) for _ in range(2)),
        MinibatchStdLayer(group_size=4),
        Conv2d(CHANNELS + 1, CHANNELS, 3, "lrelu"),
        nn.Flatten(),
        FullyConnected(CHANNELS * 16, CHANNELS, "lrelu"),
        FullyConnected(CHANNELS, 1),
    )


class Augment:
    """ADA: flips, scales, rotations, shifts and brightness, each with a probability that follows the overfitting."""

    def __init__(self, p: float = 0.2) -> None:
        self.p, self.signs = p, []

    def __call__(self, x: Tensor) -> Tensor:
        n = len(x)
        flip, zoom, turn, shift, light = (torch.rand(5, n) < self.p).to(x.dtype)
        flip = 1 - 2 * flip * (torch.rand(n) < 0.5)
        size = torch.exp2(0.2 * zoom * torch.randn(n))
        angle = turn * (2 * torch.rand(n) - 1) * math.pi
        move = shift * torch.randn(2, n) / 8
        rows = [flip * angle.cos() * size, -angle.sin() * size, move[0], flip * angle.sin() * size, angle.cos() * size]
        theta = torch.stack([*rows, move[1]], 1).view(n, 2, 3)
        x = grid_sample_gradfix.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False))
        return x + (0.2 * light * torch.randn(n))[:, None, None, None]

    def adapt(self, batch: int) -> None:
        overfitting = torch.cat(self.signs).mean().item()
        self.p = max(0.0, self.p + math.copysign(batch * ADA_EVERY / ADA_IMAGES, overfitting - ADA_TARGET))
        self.signs.clear()


class PathLength:
    """How far an image moves for a step in the styles, compared with its running mean."""

    def __init__(self) -> None:
        self.mean = torch.zeros(())

    def __call__(self, generator: Generator, z: Tensor) -> Tensor:
        ws = generator.styles(z)
        images = generator.synthesis(ws)
        noise = torch.randn_like(images) / math.sqrt(images[0, 0].numel())
        (grad,) = torch.autograd.grad((images * noise).sum(), ws, create_graph=True)
        lengths = grad.square().sum(2).mean(1).sqrt()
        self.mean = self.mean.lerp(lengths.detach().mean(), PATH_DECAY)
        return PATH_WEIGHT * (lengths - self.mean).square().mean()


def r1(discriminator, augment: Augment, real: Tensor) -> Tensor:
    real = real.detach().requires_grad_()
    (grad,) = torch.autograd.grad(discriminator(augment(real)).sum(), real, create_graph=True)
    return R1_WEIGHT / 2 * grad.square().sum([1, 2, 3]).mean()


def lazy_adam(model: nn.Module, every: int) -> torch.optim.Adam:
    ratio = every / (every + 1)
    return torch.optim.Adam(model.parameters(), lr=2e-3 * ratio, betas=(0.0, 0.99**ratio), eps=1e-8)


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def train(steps: int, batch: int = 16, seed: int = 0) -> list[float]:
    """Train, and return the losses of both players and the penalties."""
    torch.manual_seed(seed)
    generator, discriminator = Generator(), make_discriminator()
    g_optimizer, d_optimizer = lazy_adam(generator, PATH_EVERY), lazy_adam(discriminator, R1_EVERY)
    augment, path_length = Augment(), PathLength()
    losses = []
    for step in range(steps):
        loss = softplus(-discriminator(augment(generator(torch.randn(batch, LATENT))))).mean()
        update(g_optimizer, loss)
        losses.append(loss.item())
        if step % PATH_EVERY == 0:
            penalty = path_length(generator, torch.randn(batch // 2, LATENT))
            update(g_optimizer, PATH_EVERY * penalty)
            losses.append(penalty.item())

        real = discs(batch)
        fake = generator(torch.randn(batch, LATENT)).detach()
        logits = discriminator(augment(real))
        augment.signs.append(logits.detach().sign())
        loss = softplus(-logits).mean() + softplus(discriminator(augment(fake))).mean()
        update(d_optimizer, loss)
        losses.append(loss.item())
        if step % R1_EVERY == 0:
            penalty = r1(discriminator, augment, real)
            update(d_optimizer, R1_EVERY * penalty)
            losses.append(penalty.item())
        if step % ADA_EVERY == ADA_EVERY - 1:
            augment.adapt(batch)
    return losses


if __name__ == "__main__":
    for i, loss in enumerate(train(steps=100)):
        print(i, f"{loss:.4f}")
