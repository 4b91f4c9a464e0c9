"""Discriminators in the idiom of StyleGAN2-ADA's and R3GAN's code, on plain PyTorch functions or on fastgan's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import log2
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgan import ops

TAPS = (1.0, 3.0, 3.0, 1.0)
GAIN = 2**0.5


def resample(
    x: Tensor, f: Tensor, up: int = 1, down: int = 1, padding: Sequence[int] = (0, 0, 0, 0), gain: float = 1.0
) -> Tensor:
    """``ops.upfirdn2d`` by its definition: zeros, padding, a convolution of each channel, every n-th element."""
    n, c, h, w = x.shape
    if up > 1:
        x = F.pad(x[:, :, :, None, :, None], (0, up - 1, 0, 0, 0, up - 1)).reshape(n, c, h * up, w * up)
    plane = (torch.outer(f, f) * gain).expand(c, 1, len(f), len(f))
    return F.conv2d(F.pad(x, list(padding)), plane, groups=c)[:, :, ::down, ::down]


def _conv(x: Tensor, weight: Tensor, f: Tensor, down: int) -> Tensor:
    padding = weight.shape[-1] // 2
    if down == 1:
        return F.conv2d(x, weight, padding=padding)
    before, after = padding + (len(f) - down + 1) // 2, padding + (len(f) - down) // 2
    return F.conv2d(resample(x, f, padding=(before, after, before, after)), weight, stride=down)


def _fastgan_conv(x: Tensor, weight: Tensor, f: Tensor, down: int) -> Tensor:
    return ops.conv2d_resample(x, weight, f, down=down, padding=weight.shape[-1] // 2)


class Functions(NamedTuple):
    conv: Callable[[Tensor, Tensor, Tensor, int], Tensor]
    act: Callable[[Tensor, Tensor], Tensor]
    half: Callable[[Tensor, Tensor], Tensor]


PLAIN = Functions(
    _conv,
    lambda x, bias: F.leaky_relu(x + bias[:, None, None], 0.2) * GAIN,
    lambda x, f: resample(x, f, down=2, padding=(1, 1, 1, 1)),
)
OURS = Functions(
    _fastgan_conv,
    lambda x, bias: ops.bias_act(x, bias, gain=GAIN),
    lambda x, f: ops.upfirdn2d(x, f, down=2, padding=1),
)


class _Layer(nn.Module):
    """A convolution with an equalized learning rate, a bias and an activation."""

    f: Tensor

    def __init__(self, functions: Functions, a: int, b: int, kernel: int, down: int = 1, *, act: bool = True) -> None:
        super().__init__()
        self.functions, self.down, self.gain = functions, down, (a * kernel**2) ** -0.5
        self.weight = nn.Parameter(torch.randn(b, a, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(b)) if act else None
        self.register_buffer("f", torch.tensor(TAPS) / sum(TAPS))

    def forward(self, x: Tensor) -> Tensor:
        y = self.functions.conv(x, self.weight * self.gain, self.f, self.down)
        return y if self.bias is None else self.functions.act(y, self.bias)


class _StyleBlock(nn.Module):
    def __init__(self, functions: Functions, a: int, b: int) -> None:
        super().__init__()
        self.one, self.two = _Layer(functions, a, a, 3), _Layer(functions, a, b, 3, 2)
        self.skip = _Layer(functions, a, b, 1, 2, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.two(self.one(x)) + self.skip(x)) * 0.5**0.5  # type: ignore[no-any-return]


class _R3Block(nn.Module):
    def __init__(self, functions: Functions, width: int) -> None:
        super().__init__()
        self.one, self.two = _Layer(functions, width, 2 * width, 1), _Layer(functions, 2 * width, 2 * width, 3)
        self.three = _Layer(functions, 2 * width, width, 1, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.three(self.two(self.one(x)))  # type: ignore[no-any-return]


class _Downsample(nn.Module):
    f: Tensor

    def __init__(self, functions: Functions) -> None:
        super().__init__()
        self.functions = functions
        self.register_buffer("f", torch.tensor(TAPS) / sum(TAPS))

    def forward(self, x: Tensor) -> Tensor:
        return self.functions.half(x, self.f)


def _widths(pixels: int, width: int, widest: int) -> list[int]:
    return [min(width << level, widest) for level in range(int(log2(pixels)) - 1)]


def stylegan2(functions: Functions, pixels: int, width: int, widest: int) -> nn.Module:
    widths = _widths(pixels, width, widest)
    blocks = (_StyleBlock(functions, a, b) for a, b in pairwise(widths))
    return nn.Sequential(_Layer(functions, 3, widths[0], 1), *blocks, nn.Flatten(), nn.Linear(16 * widths[-1], 1))


def r3gan(functions: Functions, pixels: int, width: int, widest: int) -> nn.Module:
    widths = _widths(pixels, width, widest)
    layers: list[nn.Module] = [_Layer(functions, 3, widths[0], 1, act=False), _R3Block(functions, widths[0])]
    for a, b in pairwise(widths):
        layers += [_Downsample(functions), _Layer(functions, a, b, 1, act=False), _R3Block(functions, b)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * widths[-1], 1))
