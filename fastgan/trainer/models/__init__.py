"""Generators and discriminators for samples (N, C, *S), where S has one to three sides, and for points (N, F)."""

from __future__ import annotations

from torch import nn

from fastgan.trainer.config import ModelConfig
from fastgan.trainer.models import dcgan, mlp, residual, resnet, sagan
from fastgan.trainer.models.layers import Discriminator, Head, Labeled, Scale, Shape, normalize

__all__ = ["build_models"]

# A spectrally normalized network has a slope of at most 1, but logits must differ by about 1 between points
# that are a few hundredths of the data's scale apart.
POINT_GAIN = 8.0


def build_models(
    shape: tuple[int, ...], scale: float, config: ModelConfig, classes: int | None = None
) -> tuple[nn.Module, nn.Module]:
    """Build a generator (N, latent_dim) -> (N, *shape) and a discriminator (N, pack * shape[0], *S) -> (N, 1).

    With ``classes``, both networks also take labels (N,). ``scale`` is about the largest value in the data. Networks
    for points compute in units of it.

    Both networks are initialized before spectral norm draws its vectors, so that every kind of spectral norm starts
    from the same weights under the same seed.

    Raises:
        ValueError: no network supports samples of this shape.
    """
    latent_dim = config.latent_dim if classes is None else 2 * config.latent_dim
    if len(shape) == 1:
        generator, features, feature_shape = points(shape[0], scale, config, latent_dim)
    else:
        generator, features, feature_shape = images(Shape.of(shape), config, latent_dim)
    if classes is not None:
        generator = Labeled(generator, classes, config.latent_dim)
    head = Head(feature_shape, config.minibatch, classes)
    return generator, normalize(Discriminator(features, head), config.spectral_norm, config.n_power_iterations)


Built = tuple[nn.Module, nn.Module, tuple[int, ...]]  # generator, feature network of the discriminator, feature shape


def points(size: int, scale: float, config: ModelConfig, latent_dim: int) -> Built:
    if config.architecture == "pacgan":
        return mlp.pacgan_generator(latent_dim, size), mlp.pacgan_features(config.pack * size), (mlp.PACGAN_UNITS,)
    if config.architecture not in ("auto", "mlp"):
        raise ValueError(f"architecture {config.architecture} makes images, not points: use mlp or pacgan")
    generator = nn.Sequential(mlp.mlp(latent_dim, config.width, size), Scale(scale))
    features = nn.Sequential(Scale(POINT_GAIN / scale), mlp.hidden(config.pack * size, config.width))
    return generator, features, (config.width,)


def images(shape: Shape, config: ModelConfig, latent_dim: int) -> Built:
    kinds = {"auto": dcgan, "dcgan": dcgan, "resnet": resnet, "residual": residual, "sagan": sagan}
    if config.architecture not in kinds:
        raise ValueError(f"architecture {config.architecture} makes points, not images: use one of {', '.join(kinds)}")
    kind = kinds[config.architecture]
    features = kind.features(config.width, shape, config.pack * shape.channels)
    return kind.generator(latent_dim, config.width, shape), features, kind.feature_shape(config.width, shape)
