"""Waveforms, voxels and stacked pictures: small data sets for 1-D and 3-D networks, and one with many modes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgan.trainer.data.drawn import Drawn


class Waveforms(Drawn):
    """Plucked tones (1, 256) in [-1, 1]: two decaying harmonics of a random pitch. The label is the octave."""

    shape: tuple[int, ...] = (1, 256)
    scale = 1.0
    classes: int | None = 2

    def draw(self, count: int) -> tuple[Tensor, Tensor | None]:
        octave = torch.randint(2, (count,), generator=self.generator, device="cpu")
        pitch, phase, share, decay = torch.rand(4, count, 1, generator=self.generator, device="cpu")
        t = torch.linspace(0, 1, 256, device="cpu")
        cycles = 4 * 2 ** (octave[:, None] + pitch)  # in the whole waveform
        angle = 2 * math.pi * (cycles * t + phase)  # (N, 256)
        tone = (1 - share / 2) * angle.sin() + share / 2 * (2 * angle).sin()
        attack = (32 * t).clamp(max=1)
        waveform = attack * torch.exp(-(1 + 4 * decay) * t) * tone
        return waveform[:, None], octave


class Voxels(Drawn):
    """Soft-edged solids (1, 16, 16, 16) in [-1, 1] of random position and size. Label 0 is a ball, 1 a box."""

    shape: tuple[int, ...] = (1, 16, 16, 16)
    scale = 1.0
    classes: int | None = 2

    def draw(self, count: int) -> tuple[Tensor, Tensor | None]:
        kind = torch.randint(2, (count,), generator=self.generator, device="cpu")
        center = 5 + 5 * torch.rand(count, 3, 1, generator=self.generator, device="cpu")
        radius = 2 + 2.5 * torch.rand(count, 3, 1, generator=self.generator, device="cpu")
        away = ((torch.arange(16.0, device="cpu") - center).abs() / radius)[:, :, :, None, None]  # (N, 3, 16, 1, 1)
        x, y, z = away[:, 0], away[:, 1].transpose(1, 2), away[:, 2].transpose(1, 3)
        ball = (x.square() + y.square() + z.square()).sqrt()  # (N, 16, 16, 16)
        box = torch.maximum(torch.maximum(x, y), z)
        solid = torch.where(kind[:, None, None, None] == 0, ball, box)
        return torch.tanh(4 * (1 - solid))[:, None], kind


class Stacked(Drawn):
    """Three gray pictures of independent classes as red, green and blue. The label is 100 a + 10 b + c.

    These are the 1000 modes of Metz et al. 2017, with Fashion-MNIST instead of MNIST.

    Args:
        images: (N, 1, S, S) uint8.
        labels: (N,), from 0 to 9.
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
