"""Small discriminators with the architectures of well-known families."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from fastgan.bench import discriminators

SPECTRAL = parametrizations.spectral_norm
WEIGHT_NORM = parametrizations.weight_norm


def act(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)


class Convolutions(nn.Module):
    """Strided convolutions down to 4 x 4, and one logit. ``layer`` wraps each layer, and ``norm`` follows it."""

    def __init__(
        self,
        width: int,
        *,
        layer: Callable[[nn.Module], nn.Module] = lambda module: module,
        norm: Callable[[int, int], nn.Module] = lambda channels, side: nn.Identity(),
        between: Callable[[], nn.Module] = lambda: nn.LeakyReLU(0.2),
        extra: int = 0,
    ) -> None:
        super().__init__()
        widths = [3 + extra, width, 2 * width, 4 * width]
        parts: list[nn.Module] = []
        for level, (a, b) in enumerate(pairwise(widths)):
            parts += [layer(nn.Conv2d(a, b, 4, 2, 1)), norm(b, 16 >> level) if level else nn.Identity(), between()]
        self.features, self.head = nn.Sequential(*parts), layer(nn.Linear(16 * widths[-1], 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """Residual blocks with average pooling, a sum over positions and an optional class projection."""

    def __init__(
        self,
        width: int,
        *,
        layer: Callable[[nn.Module], nn.Module] = lambda module: module,
        classes: int = 0,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.first = layer(nn.Conv2d(3, width, 3, 1, 1))
        steps = ((width, width), (width, 2 * width))
        self.conv1 = nn.ModuleList(layer(nn.Conv2d(a, b, 3, 1, 1)) for a, b in steps)
        self.conv2 = nn.ModuleList(layer(nn.Conv2d(b, b, 3, 1, 1)) for _, b in steps)
        self.skip = nn.ModuleList(layer(nn.Conv2d(a, b, 1)) for a, b in steps)
        self.attention = Attention(width) if attention else None
        self.head = layer(nn.Linear(2 * width, 1))
        self.embedding = layer(nn.Embedding(classes, 2 * width)) if classes else None

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        h = self.first(x)
        for conv1, conv2, skip in zip(self.conv1, self.conv2, self.skip, strict=True):
            h = F.avg_pool2d(conv2(F.relu(conv1(F.relu(h)))) + skip(h), 2)
            if self.attention is not None and h.shape[1] == self.first.out_channels:
                h = self.attention(h)
        h = F.relu(h).sum((2, 3))
        logits: Tensor = self.head(h)
        if self.embedding is not None:
            logits = logits + (self.embedding(labels) * h).sum(1, keepdim=True)
        return logits


class Attention(nn.Module):
    """Attention from all positions to pooled positions, with a learned gate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Conv2d(width, w, 1, bias=False) for w in (width // 8, width // 8, width))
        self.gate = nn.Parameter(torch.full((), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.query(x), F.max_pool2d(self.key(x), 2), F.max_pool2d(self.value(x), 2)
        weights = torch.einsum("nchw,ncij->nhwij", query, key).flatten(3).softmax(-1)
        return x + self.gate * torch.einsum("nhwk,nck->nchw", weights, value.flatten(2))


class Equalized(nn.Module):
    """A convolution or linear layer whose weight is scaled by its fan-in in the forward, plus a bias."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 0) -> None:
        super().__init__()
        shape = (outputs, inputs, kernel, kernel) if kernel else (outputs, inputs)
        self.weight, self.bias = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.zeros(outputs))
        self.scale = 1 / sqrt(self.weight[0].numel())

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype) * self.scale
        if weight.ndim == 2:
            return F.linear(x, weight) + self.bias
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2) + self.bias.view(1, -1, 1, 1)


def blur(x: Tensor, down: int = 1) -> Tensor:
    """Apply a fixed filter to each channel."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype, device=x.device) / 8
    kernel = (taps[:, None] * taps).expand(x.shape[1], 1, 4, 4)
    return F.conv2d(F.pad(x, (1, 1, 1, 1) if down > 1 else (2, 1, 2, 1)), kernel, stride=down, groups=x.shape[1])


class Blur(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return blur(x)


class Style(nn.Module):
    """Equalized residual blocks that blur before downsampling, with optional minibatch standard deviation."""

    def __init__(self, width: int, *, stddev: bool = False, smooth: bool = True, tables: bool = False) -> None:
        super().__init__()
        self.smooth = smooth
        self.first = Equalized(3, width, 1)
        self.conv1, self.conv2, self.skip = (Equalized(width, width, kernel) for kernel in (3, 3, 1))
        self.stddev = discriminators.MinibatchStdDev() if stddev else nn.Identity()
        self.last = Equalized(width + stddev, width, 3)
        self.dense, self.head = Equalized(256 * width, width), Equalized(width, 1)
        self.table = nn.Parameter(torch.randn(1, width, 32, 32)) if tables else None

    def forward(self, x: Tensor) -> Tensor:
        h = act(self.first(x)) * sqrt(2)
        if self.table is not None:
            h = h + self.table
        h = (self.down(act(self.conv2(act(self.conv1(h))))) + self.skip(self.down(h))) / sqrt(2)
        h = act(self.last(self.stddev(h)))
        return self.head(act(self.dense(h.flatten(1))))  # type: ignore[no-any-return]

    def down(self, x: Tensor) -> Tensor:
        return blur(x, 2) if self.smooth else F.avg_pool2d(x, 2)


class UNet(nn.Module):
    """One logit per pixel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, width, 4, 2, 1), nn.Conv2d(width, 2 * width, 4, 2, 1)
        self.up1, self.up2 = (nn.Conv2d(3 * width, width, 3, 1, 1), nn.Conv2d(width, width, 3, 1, 1))
        self.head = nn.Conv2d(width, 1, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = act(self.down1(x))
        b = F.interpolate(act(self.down2(a)), scale_factor=2, mode="bilinear", align_corners=False)
        u = F.interpolate(act(self.up1(torch.cat([a, b], 1))), scale_factor=2, mode="nearest")
        return self.head(act(self.up2(u)))  # type: ignore[no-any-return]


def patches(width: int, layer: Callable[[nn.Module], nn.Module], norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """One logit per patch."""
    return nn.Sequential(
        *(layer(nn.Conv2d(3, width, 4, 2, 1)), nn.LeakyReLU(0.2)),
        *(layer(nn.Conv2d(width, 2 * width, 4, 2, 1)), norm(2 * width), nn.LeakyReLU(0.2)),
        *(layer(nn.Conv2d(2 * width, 4 * width, 4, 1, 1)), norm(4 * width), nn.LeakyReLU(0.2)),
        layer(nn.Conv2d(4 * width, 1, 4, 1, 1)),
    )


class Scales(nn.Module):
    """Patch logits of the image and of a downsampled image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(patches(width, lambda m: m, lambda _: nn.Identity()) for _ in range(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.parts[0](x), self.parts[1](F.avg_pool2d(x, 3, 2, 1, count_include_pad=False))]


class Heads(nn.Module):
    """Patch logits and class logits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.01), nn.Conv2d(width, 2 * width, 4, 2, 1)),
            *(nn.LeakyReLU(0.01), nn.Conv2d(2 * width, 4 * width, 4, 2, 1), nn.LeakyReLU(0.01)),
        )
        self.patch, self.classes = nn.Conv2d(4 * width, 1, 3, 1, 1), nn.Conv2d(4 * width, 5, 4, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return self.patch(h), self.classes(h).flatten(1)


class Periods(nn.Module):
    """A waveform folded by several periods. Each gives one row of logits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.periods = (2, 3)
        self.parts = nn.ModuleList(
            nn.Sequential(
                *(WEIGHT_NORM(nn.Conv2d(1, width, (5, 1), (3, 1), (2, 0))), nn.LeakyReLU(0.1)),
                *(WEIGHT_NORM(nn.Conv2d(width, 2 * width, (5, 1), (3, 1), (2, 0))), nn.LeakyReLU(0.1)),
                WEIGHT_NORM(nn.Conv2d(2 * width, 1, (3, 1), 1, (1, 0))),
            )
            for _ in self.periods
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        rows = []
        for period, part in zip(self.periods, self.parts, strict=True):
            padded = F.pad(x, (0, -x.shape[-1] % period), "reflect")
            rows.append(part(padded.view(len(x), 1, -1, period)).flatten(1))
        return rows


class Waves(nn.Module):
    """Grouped convolutions of a waveform and of a smoothed waveform. Each gives one row of logits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            nn.Sequential(
                *(layer(nn.Conv1d(1, width, 15, 1, 7)), nn.LeakyReLU(0.1)),
                *(layer(nn.Conv1d(width, 2 * width, 21, 2, 10, groups=4)), nn.LeakyReLU(0.1)),
                layer(nn.Conv1d(2 * width, 1, 3, 1, 1)),
            )
            for layer in (SPECTRAL, WEIGHT_NORM)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.parts[0](x).flatten(1), self.parts[1](F.avg_pool1d(x, 4, 2, 2)).flatten(1)]


class Points(nn.Module):
    """A point cloud: an MLP per point, and a maximum over the points."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.each = nn.Sequential(
            *(nn.Conv1d(3, width, 1), nn.LeakyReLU(0.2), nn.Conv1d(width, 2 * width, 1), nn.LeakyReLU(0.2))
        )
        self.head = nn.Sequential(nn.Linear(2 * width, width), nn.LeakyReLU(0.2), nn.Linear(width, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.each(x.transpose(1, 2))
        return self.head(F.adaptive_max_pool1d(h, 1).squeeze(-1))  # type: ignore[no-any-return]


class Mixing(nn.Module):
    """A linear layer over the tokens, and one over their features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix, self.up, self.down = nn.Linear(64, 64), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.mix(h.transpose(1, 2)).transpose(1, 2)
        return h + self.down(F.relu(self.up(h)))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Attention with layer norm and GELU; written out, because PyTorch's fused one has no second derivative."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm1(h)).view(*h.shape[:2], 12, -1).transpose(1, 2).chunk(3, 1)
        weights = (query @ key.transpose(2, 3) / sqrt(query.shape[-1])).softmax(-1)
        h = h + self.out((weights @ value).transpose(1, 2).flatten(2))
        return h + self.down(F.gelu(self.up(self.norm2(h))))  # type: ignore[no-any-return]


class Tokens(nn.Module):
    """Patches as tokens, with a position table, and their mean."""

    def __init__(self, width: int, block: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.patch, self.table = nn.Conv2d(3, width, 4, 4), nn.Parameter(torch.randn(1, 64, width))
        self.block, self.head = block(width), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patch(x).flatten(2).transpose(1, 2) + self.table  # (N, tokens, width)
        return self.head(self.block(h).mean(1))  # type: ignore[no-any-return]


class Coordinates(nn.Module):
    """Append the position of each pixel as two channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = Convolutions(width, extra=2)

    def forward(self, x: Tensor) -> Tensor:
        line = torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype, device=x.device)
        grid = torch.stack(torch.meshgrid(line, line, indexing="ij")).expand(len(x), -1, -1, -1)
        return self.net(torch.cat([x, grid], 1))  # type: ignore[no-any-return]


class Maxout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1, 2, *x.shape[2:]).amax(2)


def maxout(width: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 2 * width, 3, 2, 1), Maxout(), nn.Conv2d(width, 4 * width, 3, 2, 1), Maxout()),
        *(nn.Flatten(), nn.Linear(128 * width, 2 * width), Maxout(), nn.Linear(width, 1)),
    )


def max_pooling(width: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(width, 2 * width, 3, 1, 1), nn.ReLU()),
        *(nn.AdaptiveMaxPool2d(4), nn.Flatten(), nn.Linear(32 * width, 1)),
    )


def reflected(width: int) -> nn.Module:
    return nn.Sequential(
        *(nn.ReflectionPad2d(1), nn.Conv2d(3, width, 4, 2), nn.LeakyReLU(0.2)),
        *(nn.ReplicationPad2d(1), nn.Conv2d(width, 2 * width, 4, 2), nn.LeakyReLU(0.2)),
        *(nn.Flatten(), nn.Linear(128 * width, 1)),
    )


def mlp(width: int, inputs: int, dropout: float = 0.0) -> nn.Module:
    sizes = [inputs, 8 * width, 8 * width]
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.LeakyReLU(0.2), nn.Dropout(dropout))]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 1))
