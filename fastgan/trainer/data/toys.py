"""Waveforms, voxels and stacked pictures: small data for networks in one and three dimensions, and with many modes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgan.trainer.data.drawn import Drawn


class Waveforms(Drawn):
    """Plucked tones (1, 256) in [-1, 1]: two harmonics of a random pitch that die away; the label is the octave."""

    shape: tuple[int, ...] = (1, 256)
    scale = 1.0
    classes: int | None = 2

    def draw(self, count: int) -> tuple[Tensor, Tensor | None]:
        octave = torch.randint(2, (count,), generator=self.generator, device="cpu")
        pitch, phase, share, decay = torch.rand(4, count, 1, generator=self.generator, device="cpu")
        t = torch.linspace(0, 1, 256, device="cpu")
        cycles = 4 * 2 ** (octave[:, None] + pitch)  # over the waveform
        angle = 2 * math.pi * (cycles * t + phase)  # (N, 256)
        tone = (1 - share / 2) * angle.sin() + share / 2 * (2 * angle).sin()
        attack = (32 * t).clamp(max=1)
        waveform = attack * torch.exp(-(1 + 4 * decay) * t) * tone
        return waveform[:, None], octave


class Voxels(Drawn):
    """Soft-edged solids (1, 16, 16, 16) in [-1, 1] of random place and size; the label says ball or box."""

    shape: tuple[int, ...] = (1, 16, 16, 16)
    scale = 1.0
    classes: int | None = 2

    def draw(self, count: int) -> tuple[Tensor, Tensor | None]:
        kind = torch.randint(2, (count,), generator=self.generator, device="cpu")
        centre = 5 + 5 * torch.rand(count, 3, 1, generator=self.generator, device="cpu")
        radius = 2 + 2.5 * torch.rand(count, 3, 1, generator=self.generator, device="cpu")
        away = ((torch.arange(16.0, device="cpu") - centre).abs() / radius)[:, :, :, None, None]  # (N, 3, 16, 1, 1)
        x, y, z = away[:, 0], away[:, 1].transpose(1, 2), away[:, 2].transpose(1, 3)
        ball = (x.square() + y.square() + z.square()).sqrt()  # (N, 16, 16, 16)
        box = torch.maximum(torch.maximum(x, y), z)
        solid = torch.where(kind[:, None, None, None] == 0, ball, box)
        return torch.tanh(4 * (1 - solid))[:, None], kind


class Stacked(Drawn):
    """Three grey pictures of independent classes as red, green and blue; the label is 100 a + 10 b + c.

    The 1000 modes of Metz et al. 2017, with Fashion-MNIST for MNIST.

    Args:
        images: (N, 1, S, S) uint8.
        labels: (N,), 0 to 9.
    """

    scale = 1.0
    classes: int | None = 1000

    def __init__(self, images: Tensor, labels: Tensor, seed: int, device: torch.device) -> None:
        super().__init__(seed, device)
        self.images, self.labels = images.to(device), labels.to(device)
        self.shape = (3, *images.shape[2:])

    def draw(self, count: int) -> tuple[Tensor, Tensor | None]:
        index = torch.randint(len(self.images), (count, 3), generator=self.generator, device="cpu").to(self.device)
        pixels = self.images[:, 0][index]  # (N, 3, S, S)
        a, b, c = self.labels[index].unbind(1)
        return pixels.float().div_(127.5).sub_(1), 100 * a + 10 * b + c
