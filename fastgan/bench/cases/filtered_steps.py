"""Discriminator steps in the idiom of StyleGAN2-ADA and R3GAN: by PyTorch's functions, and by fastgan's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from fastgan.bench import filtered
from fastgan.bench.case import BASELINE, COUNTS, Case, Make
from fastgan.bench.steps import NEGLIGIBLE, OBJECTIVES, PRECISIONS, RELATIVISTIC, d_step, seeded

_Model = Callable[[filtered.Functions], nn.Module]


def variants(
    model: _Model, shape: tuple[int, ...], objective: str, device: torch.device, dtype: torch.dtype
) -> dict[str, Make]:
    real, fake = (torch.randn(*shape, dtype=dtype, device=device) for _ in range(2))
    plain, fused = (
        d_step(seeded(partial(model, functions), device, dtype), real, fake, OBJECTIVES[objective])
        for functions in (filtered.PLAIN, filtered.OURS)
    )
    return {BASELINE: plain[BASELINE], "fastgan": fused["fastgan"]}


def _case(family: str, make: Callable[..., nn.Module], objective: str, pixels: int) -> Case:
    def model(functions: filtered.Functions) -> nn.Module:
        return make(functions, pixels, 16, 128)

    return Case(
        name=f"{objective}/{family}{pixels}-batch8",
        op=None,
        dtype=torch.float32,
        device_types=("cpu", "cuda"),
        bytes=None,
        operations=None,
        tolerance=PRECISIONS["float32"],
        setup=partial(variants, model, (8, 3, pixels, pixels), objective),
        suite="steps",
        counted=COUNTS,
        family=f"{objective}/{family.rstrip('-')}",
        sizes={"pixels": pixels, "batch": 8},
        negligible=NEGLIGIBLE,
    )


CASES = [
    *(_case("filtered-stylegan2-", filtered.stylegan2, "d-step/r1", pixels) for pixels in (64, 128)),
    *(_case("filtered-r3gan", filtered.r3gan, f"d-step/{RELATIVISTIC}", pixels) for pixels in (64, 128)),
]
