"""Discriminator steps: a penalty, or a loss and penalties, and the gradients of all parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import nn

from fastgan.bench import discriminators
from fastgan.bench.case import COUNTS, Case
from fastgan.bench.steps import NEGLIGIBLE, PRECISIONS, RELATIVISTIC, batches

_ANYWHERE, _ON_GPU = ("cpu", "cuda"), ("cuda",)


def step_case(
    family: str,
    make: Callable[[], nn.Module],
    shape: Sequence[int],
    objective: str,
    device_types: tuple[str, ...],
    precision: str = "float32",
) -> Case:
    """Build a case. ``family`` is the discriminator's name; for images, the case's name appends the resolution."""
    sizes = {"pixels": shape[-1], "batch": shape[0]} if len(shape) > 2 else {"batch": shape[0]}
    suffix = "" if precision == "float32" else f"/{precision}"
    return Case(
        name=f"{objective}/{family}{sizes.get('pixels', '')}-batch{shape[0]}{suffix}",
        op=None,
        dtype=torch.float32,
        device_types=device_types,
        bytes=None,
        operations=None,
        tolerance=PRECISIONS[precision],
        setup=lambda device, dtype: batches(make, shape, objective, device, dtype, precision),
        suite="steps",
        counted=COUNTS,
        family=f"{objective}/{family.rstrip('-')}{suffix}",
        sizes=sizes,
        negligible=NEGLIGIBLE,
    )


def _cases() -> Iterator[Case]:
    images = (3, 64, 64)
    for objective in ("wgan-gp", "loss+r1", RELATIVISTIC):
        yield step_case("critic", discriminators.critic, (32, *images), objective, _ANYWHERE)
    for objective in ("wgan-gp", "loss+r1"):
        yield step_case("critic", discriminators.critic, (4, *images), objective, _ANYWHERE)
        yield step_case("mlp512", discriminators.mlp, (256, 2), objective, _ANYWHERE)
        yield step_case("mlp16", partial(discriminators.mlp, 16, 2), (16, 2), objective, _ANYWHERE)
    dcgan = partial(discriminators.critic, (3, 64, 128, 256, 512))
    yield step_case("dcgan", dcgan, (8, *images), "wgan-gp", _ANYWHERE)
    layer_norm = partial(discriminators.layer_norm_critic, 32)
    yield step_case("layernorm", layer_norm, (8, *images), "wgan-gp", _ANYWHERE)
    for width, batch, where in ((16, 2, _ANYWHERE), (64, 4, _ANYWHERE), (64, 32, _ON_GPU)):
        sngan = partial(discriminators.SNGANResNet, width)
        yield step_case(f"sngan-width{width}-", sngan, (batch, 3, 128, 128), "loss+r1", where)
    large_critic = partial(discriminators.critic, (3, 32, 64, 128, 256), 256)
    yield step_case("critic", large_critic, (8, 3, 256, 256), "wgan-gp", _ANYWHERE)
    style = partial(discriminators.StyleGAN2, 128, 32, 128)
    yield step_case("stylegan2-", style, (8, 3, 128, 128), "loss+r1", _ANYWHERE)
    for stddev in (False, True):
        style = partial(discriminators.StyleGAN2, 32, 32, 128, stddev=stddev)
        yield step_case(f"stylegan2-{'' if stddev else 'no-stddev-'}", style, (8, 3, 32, 32), "loss+r1", _ANYWHERE)
    yield step_case("r3gan", partial(discriminators.R3GAN, 32, 32, 128), (8, 3, 32, 32), RELATIVISTIC, _ANYWHERE)
    for precision in PRECISIONS:
        for pixels, width, batch in ((256, 64, 16), (512, 32, 8), (1024, 16, 4)):
            style, shape = partial(discriminators.StyleGAN2, pixels, width), (batch, 3, pixels, pixels)
            yield step_case("stylegan2-", style, shape, "loss+r1", _ON_GPU, precision)
        r3gan = partial(discriminators.R3GAN, 256, 96)
        yield step_case("r3gan", r3gan, (16, 3, 256, 256), RELATIVISTIC, _ON_GPU, precision)


CASES = list(_cases())
