"""Generators and discriminators: DCGAN for 32x32 images, a multilayer perceptron for points."""

from __future__ import annotations

from torch import Tensor, nn

import fastgan.nn as fnn
from fastgan.trainer.config import ModelConfig, SpectralNorm

# A spectrally normalised network has slope 1 at most, and logits must differ by about 1 between points
# that lie a few hundredths of the data's scale apart.
POINT_GAIN = 8.0


def build_models(shape: tuple[int, ...], scale: float, config: ModelConfig) -> tuple[nn.Module, nn.Module]:
    """A generator (N, latent_dim) -> (N, *shape) and a discriminator (N, *shape) -> (N, 1).

    `scale` is about the largest value in the data; networks for points compute in units of it.

    Both are initialised before spectral norm draws its vectors, so every kind of spectral norm starts
    from the same weights under the same seed.
    """
    if len(shape) == 3 and shape[1:] == (32, 32):
        generator = dcgan_generator(config.latent_dim, config.width, shape[0])
        discriminator = dcgan_discriminator(config.width, shape[0])
    elif len(shape) == 1:
        generator = nn.Sequential(mlp(config.latent_dim, config.width, shape[0]), Scale(scale))
        discriminator = nn.Sequential(Scale(POINT_GAIN / scale), mlp(shape[0], config.width, 1))
    else:
        raise ValueError(f"no model for samples of shape {shape}: wanted (C, 32, 32) or (F,)")
    return generator, normalise(discriminator, config.spectral_norm)


def dcgan_generator(latent_dim: int, width: int, channels: int) -> nn.Module:
    """Radford et al. 2016, from 4x4 to 32x32; batch norm takes the place of the convolutions' biases."""

    def up(inputs: int, outputs: int) -> list[nn.Module]:
        convolution = nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]

    return nn.Sequential(
        nn.Linear(latent_dim, 4 * width * 4 * 4, bias=False),
        nn.Unflatten(1, (4 * width, 4, 4)),  # (N, 4W, 4, 4)
        nn.BatchNorm2d(4 * width),
        nn.ReLU(inplace=True),
        *up(4 * width, 2 * width),  # (N, 2W, 8, 8)
        *up(2 * width, width),  # (N, W, 16, 16)
        nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1),  # (N, C, 32, 32)
        nn.Tanh(),
    )


def dcgan_discriminator(width: int, channels: int) -> nn.Module:
    """The generator's mirror image; no batch norm, for spectral norm bounds each layer instead."""

    def down(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), nn.LeakyReLU(0.1, inplace=True)]

    return nn.Sequential(
        *down(channels, width),  # (N, W, 16, 16)
        *down(width, 2 * width),  # (N, 2W, 8, 8)
        *down(2 * width, 4 * width),  # (N, 4W, 4, 4)
        nn.Flatten(),
        nn.Linear(4 * width * 4 * 4, 1),
    )


class Scale(nn.Module):
    """x -> factor * x"""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x

    def extra_repr(self) -> str:
        return f"{self.factor:g}"


def mlp(inputs: int, width: int, outputs: int) -> nn.Module:
    """Three hidden layers of `width` units."""
    layers: list[nn.Module] = []
    for size in (inputs, width, width):
        layers += [nn.Linear(size, width), nn.LeakyReLU(0.1, inplace=True)]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def normalise(model: nn.Module, kind: SpectralNorm) -> nn.Module:
    """Spectral norm on every convolution and linear layer of `model`, in place."""
    if kind == "none":
        return model
    for layer in list(model.modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            if kind == "torch":
                nn.utils.parametrizations.spectral_norm(layer)
            else:
                fnn.utils.spectral_norm(layer)
    return fnn.utils.fuse_spectral_norm(model) if kind == "fused" else model
