"""The table of architectures that tests and benchmarks run, with the sizes and properties of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastgan.bench import discriminators
from fastgan.bench.architectures import (
    SPECTRAL,
    WEIGHT_NORM,
    Blur,
    Convolutions,
    Coordinates,
    Heads,
    Mixing,
    Periods,
    Points,
    ResNet,
    Scales,
    Style,
    Tokens,
    Transformer,
    UNet,
    Waves,
    max_pooling,
    maxout,
    mlp,
    patches,
    reflected,
)


@dataclass(frozen=True)
class Form:
    """A discriminator as a function of its width, and the shape of its input."""

    make: Callable[[int], nn.Module]
    shape: tuple[int, ...] = (16, 3, 32, 32)  # the batch that benchmarks time
    width: int = 64  # the width that benchmarks time
    one_pass: bool = True
    shared: bool = True  # the loss has the same gradient for all logits of a sample
    select: int | tuple[int, ...] | None = None
    labels: int = 0  # the number of classes; 0: no labels
    critic: bool = False  # the loss is the mean of the logits, as in WGAN-GP
    draws: bool = False  # the forward draws random numbers

    def arguments(self, batch: int, device: torch.device) -> tuple[Any, ...]:
        return (torch.arange(batch, device=device) % self.labels,) if self.labels else ()


_SOUND, _WIDE = (8, 1, 2048), (512, 160)
FORMS = {
    "dcgan, no norm": Form(Convolutions),
    "dcgan, batch norm": Form(lambda w: Convolutions(w, norm=lambda c, _: nn.BatchNorm2d(c)), one_pass=False),
    "critic, layer norm": Form(lambda w: Convolutions(w, norm=lambda c, s: nn.LayerNorm([c, s, s])), one_pass=False),
    "critic, group norm": Form(lambda w: Convolutions(w, norm=lambda c, _: nn.GroupNorm(4, c)), one_pass=False),
    "spectral norm": Form(lambda w: Convolutions(w, layer=SPECTRAL)),
    "weight norm": Form(lambda w: Convolutions(w, layer=WEIGHT_NORM)),
    "dropout": Form(
        lambda w: Convolutions(w, between=lambda: nn.Sequential(nn.LeakyReLU(0.2), nn.Dropout2d(0.25))), draws=True
    ),
    "wgan-gp resnet": Form(ResNet, width=32),
    "sngan resnet": Form(lambda w: ResNet(w, layer=SPECTRAL), width=32),
    "projection": Form(lambda w: ResNet(w, classes=10), width=32, labels=10),
    "biggan": Form(lambda w: ResNet(w, layer=SPECTRAL, classes=10), width=32, labels=10),
    "biggan, attention": Form(
        lambda w: ResNet(w, layer=SPECTRAL, classes=10, attention=True), width=32, labels=10, one_pass=False
    ),
    "equalized": Form(lambda w: Style(w, smooth=False), width=32),
    "fir filters": Form(lambda w: nn.Sequential(Blur(), Convolutions(w))),
    "stylegan2, no stddev": Form(Style, width=32),
    "stylegan2": Form(lambda w: Style(w, stddev=True), width=32, one_pass=False),
    "position table": Form(lambda w: Style(w, tables=True), width=32),
    "coordinates": Form(Coordinates),
    "r3gan": Form(lambda w: discriminators.R3GAN(32, w, 4 * w), (8, 3, 32, 32), 32),
    "u-net": Form(UNet, width=32, shared=False),
    "patchgan": Form(lambda w: patches(w, lambda m: m, lambda _: nn.Identity()), width=32, shared=False),
    "patchgan, instance norm": Form(
        lambda w: patches(w, lambda m: m, nn.InstanceNorm2d), width=32, shared=False, one_pass=False
    ),
    "patchgan, two scales": Form(Scales, width=32, shared=False),
    "stargan": Form(Heads, select=0, critic=True),
    "hifi-gan periods": Form(Periods, _SOUND, shared=False, select=(0, 1)),
    "hifi-gan scales": Form(Waves, _SOUND, 32, shared=False),
    "ctgan, packs of ten": Form(lambda w: mlp(w, 160, 0.5), _WIDE, draws=True),
    "mlp": Form(lambda w: mlp(w, 160), _WIDE),
    "point cloud": Form(Points, (16, 2048, 3)),
    "tokens": Form(lambda w: Tokens(w, Mixing), width=128),
    "transformer": Form(lambda w: Tokens(w, Transformer), width=128, one_pass=False),
    "maxout": Form(maxout),
    "max pooling": Form(max_pooling),
    "reflection pads": Form(reflected),
}
