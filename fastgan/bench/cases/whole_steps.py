"""Whole training steps: a model before and after ``fastgan.convert``.

A discriminator step consists of its losses on reals and fakes, its penalty, all gradients and Adam. A generator step
consists of its loss through a fixed discriminator, its gradients and Adam.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from fastgan.bench import discriminators, generators
from fastgan.bench.case import COUNTS, Case, Make
from fastgan.bench.cases.gradient_penalty import step_case
from fastgan.bench.steps import NEGLIGIBLE, PRECISIONS, RELATIVISTIC, g_step, seeded

_ANYWHERE, _ON_GPU = ("cpu", "cuda"), ("cuda",)
R1, R1_R2 = "d-step/r1", f"d-step/{RELATIVISTIC}"


def _g_step_case(
    family: str,
    generator: Callable[[], nn.Module],
    discriminator: Callable[[], nn.Module],
    pixels: int,
    batch: int,
) -> Case:
    def setup(device: torch.device, dtype: torch.dtype) -> dict[str, Make]:
        z = torch.randn(batch, generators.LATENT, device=device, dtype=dtype)
        return g_step(seeded(generator, device, dtype), seeded(discriminator, device, dtype), z)

    return Case(
        name=f"g-step/{family}{pixels}-batch{batch}",
        op=None,
        dtype=torch.float32,
        device_types=_ANYWHERE,
        bytes=None,
        operations=None,
        tolerance=PRECISIONS["float32"],
        setup=setup,
        suite="steps",
        counted=COUNTS,
        family=f"g-step/{family.rstrip('-')}",
        sizes={"pixels": pixels, "batch": batch},
        negligible=NEGLIGIBLE,
    )


def _cases() -> Iterator[Case]:
    images = (3, 64, 64)
    yield step_case("sngan-resnet", discriminators.SNGANResNet, (64, *images), "d-step/hinge", _ON_GPU)
    for precision in ("tf32", "bf16"):
        for pixels, width, batch in ((256, 64, 16), (512, 32, 8), (1024, 16, 4)):
            shape = (batch, 3, pixels, pixels)
            r3gan = partial(discriminators.R3GAN, pixels, width, 512)
            yield step_case("r3gan", r3gan, shape, R1_R2, _ON_GPU, precision)
            style = partial(discriminators.StyleGAN2, pixels, width)
            yield step_case("stylegan2-", style, shape, R1, _ON_GPU, precision)
    dcgan = partial(discriminators.critic, (3, 64, 128, 256, 512))
    # Published networks, with batches that a CPU finishes in seconds.
    yield step_case("sngan-resnet", discriminators.SNGANResNet, (16, *images), "d-step/hinge", _ANYWHERE)
    yield step_case("dcgan", dcgan, (16, *images), "d-step/wgan-gp", _ANYWHERE)
    layer_norm = partial(discriminators.layer_norm_critic, 64)
    yield step_case("layernorm", layer_norm, (16, *images), "d-step/wgan-gp", _ANYWHERE)
    yield step_case("r3gan", partial(discriminators.R3GAN, 64, 32, 256), (8, *images), R1_R2, _ANYWHERE)
    for pixels in (128, 64, 32):
        style = partial(discriminators.StyleGAN2, pixels, 16, 256)
        yield step_case("stylegan2-", style, (8, 3, pixels, pixels), R1, _ANYWHERE)
    for batch in (4, 16, 64):
        yield step_case("critic", discriminators.critic, (batch, *images), "d-step/wgan-gp", _ANYWHERE)
    yield _g_step_case("sngan-resnet", generators.resnet, discriminators.SNGANResNet, 64, 16)
    yield _g_step_case("dcgan", generators.dcgan, dcgan, 64, 16)
    small = partial(generators.resnet, (128, 64, 32, 16), 32)
    yield _g_step_case("stylegan2-", small, partial(discriminators.StyleGAN2, 32, 16, 256), 32, 8)


CASES = list(_cases())
